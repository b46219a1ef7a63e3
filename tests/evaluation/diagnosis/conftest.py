"""A tiny tuned model with the rows and suites of a small project."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from llmtune.data.config import DataConfig
from llmtune.data.prepare import prepare_examples
from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject
from llmtune.evaluation.suite import load_suite
from tests.evaluation.live import make_live
from tests.project import make_project
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """Return the directory of a small project."""
    return make_project(tmp_path_factory.mktemp("project")).parent


@pytest.fixture(scope="session")
def suites(project):
    return tuple(load_suite(project / f"{name}.yaml") for name in ("sentiment", "prose"))


@pytest.fixture(scope="session")
def tables(project):
    """Return the examples of both splits."""
    config = DataConfig(**json.loads((project / "config.yaml").read_text())["data"], cache=False)
    return [
        prepare_examples(config, make_tokenizer(), split=split, seed=0).examples
        for split in ("train", "evaluation")
    ]


@pytest.fixture
def subject(suites, tables):
    """A tiny Llama whose adapter changes what it says."""
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(make_model("llama"), lora).eval()
    train, held_out = tables
    return Subject(
        scored=make_live(model, make_tokenizer()),
        suites=suites,
        train=train,
        trained=tuple(range(len(train))),
        held_out=held_out,
    )


@pytest.fixture
def settings():
    return DiagnosisSettings(token_budget=400)
