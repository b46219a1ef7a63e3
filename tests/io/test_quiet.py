"""A logger is turned down only inside, only downwards, and left as it was found."""

import logging

import pytest

from llmtune.io.quiet import quieted
from llmtune.models.config import ModelConfig
from llmtune.planning.base import read_base


@pytest.fixture
def logger():
    return logging.getLogger("tests.quieted")


@pytest.fixture(autouse=True)
def as_found(logger):
    logger.setLevel(logging.NOTSET)
    yield
    assert logger.level == logging.NOTSET


def test_messages_below_the_level_are_hidden_inside_and_shown_again_after(logger, caplog):
    with quieted("tests.quieted"):
        logger.warning("hidden")
        logging.getLogger("tests.quieted.child").warning("hidden too")
        logger.error("shown")
    logger.warning("shown after")
    assert caplog.messages == ["shown", "shown after"]


def test_an_error_inside_leaves_the_logger_as_it_was(logger):
    with pytest.raises(ValueError), quieted("tests.quieted"):
        raise ValueError
    assert logger.level == logging.NOTSET


def test_a_logger_that_is_quieter_already_stays_so():
    parent = logging.getLogger("tests")
    parent.setLevel(logging.CRITICAL)
    try:
        with quieted("tests.quieted", logging.ERROR):
            assert not logging.getLogger("tests.quieted").isEnabledFor(logging.ERROR)
    finally:
        parent.setLevel(logging.NOTSET)


def test_those_who_hold_one_logger_may_leave_in_any_order(logger):
    first, second = quieted("tests.quieted", logging.CRITICAL), quieted("tests.quieted")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.ERROR
    second.__exit__(None, None, None)
    assert logger.level == logging.NOTSET


def test_a_plan_of_a_hub_base_does_not_silence_the_hubs_library_for_good():
    library = logging.getLogger("huggingface_hub")
    before = library.level
    with pytest.raises(Exception, match="org/absent"):
        read_base(ModelConfig(base="org/absent"))
    assert library.level == before
