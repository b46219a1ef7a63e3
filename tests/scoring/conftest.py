"""A tokenizer and tiny models, made once for all scoring tests."""

import pytest
from peft import LoraConfig, get_peft_model

from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def llama():
    return make_model("llama")


@pytest.fixture
def adapted():
    """A tiny Llama whose adapter changes what it says."""
    model = get_peft_model(
        make_model("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    )
    return model.eval()
