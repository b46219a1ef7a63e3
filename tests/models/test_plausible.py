"""A config.json that its weights cannot be is refused before a model is built from it."""

import json

import pytest

from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.plausible import check_config
from tests.merging.adapters import make_base
from tests.tiny import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_plausible(tmp_path, family):
    make_model(family, tmp_path)
    Checkpoint.open(tmp_path).require_whole(allow_pickle=False)


def test_numbers_as_published_configs_write_them_are_taken():
    for written in (
        {"max_position_embeddings": 1200.0, "sliding_window": None, "head_dim": None},
        {"num_key_value_heads": [4, 0, 4], "intermediate_size": [8, 16], "n_inner": None},
        {"pad_token_id": -1, "eos_token_id": [1, 2], "text_config": None, "rope_scaling": None},
    ):
        check_config(written, "config.json")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 10**7, "is '10000000'; expected a whole number from 1 to 10,000"),
        ("num_hidden_layers", 5_000, "its weights have 21 tensors"),
        ("hidden_size", 10**6, "far too few"),
        ("vocab_size", 10**8, "far too few"),
        ("intermediate_size", 10**7, "far too few"),
        ("num_hidden_layers", 0, "expected a whole number"),
        ("num_hidden_layers", "2", "expected a whole number"),
        ("hidden_size", True, "expected a whole number"),
        ("pad_token_id", "x", "expected a token's id"),
        ("rope_parameters", [1], "expected an object"),
        ("text_config", {"quantization_config": "nf4"}, "quantization_config is 'nf4'; expected"),
    ],
)
def test_what_the_files_cannot_hold_is_refused(tmp_path, key, value, words):
    path = make_base(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(LlmtuneError, match=words) as caught:
        Checkpoint.open(tmp_path).require_whole(allow_pickle=False)
    assert "config.json: " in str(caught.value)
