"""What cannot be trained is refused in one line before the first step."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmtune import load_config, train
from llmtune.adapters.bypassed import find_bypassed
from llmtune.errors import LlmtuneError
from tests.conftest import write_jsonl
from tests.project import make_project
from tests.tiny import make_model

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "jamba": {
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 64,  # 4 bits need inputs of that width
        "use_mamba_kernels": False,
    },
    "cpmant": {"dim_ff": 48, "dim_head": 8},
}


def make_run(directory, family: str, quantization: str | None = None, **settings):
    path = make_project(directory, "llama", **settings)
    make_model(family, directory / "base", **SMALL, **MODELS[family])
    packed = [] if quantization is None else [f"model.quantization.method={quantization}"]
    return load_config(path, ["train.max_steps=1", *packed])


@pytest.mark.parametrize(
    ("method", "quantization"), [("lora", None), ("dora", None), ("lora", "nf4"), ("lora", "int8")]
)
def test_a_module_whose_weight_the_model_reads_itself_is_named_before_training(
    tmp_path, method, quantization, monkeypatch
):
    monkeypatch.setattr("llmtune.adapters.offered.READ_BY_KERNELS", ())  # as if it were not known
    config = make_run(tmp_path, "jamba", quantization, adapter={"method": method, "rank": 2})
    with pytest.raises(LlmtuneError) as refused:
        train(config)
    line = str(refused.value)
    assert "model.layers.*.mamba.dt_proj itself, past the adapter" in line
    assert "target_modules=[in_proj, x_proj, out_proj" in line
    assert "dt_proj" not in line.rpartition("target_modules=")[2]
    assert not config.run.adapter_dir.exists()


@pytest.mark.parametrize(
    ("reads", "is_named"),
    [
        (lambda layer: layer.weight.data.clamp_(-120, 120), False),  # Gemma 3n's, as it trains
        (lambda layer: layer.weight.T.shape, False),
        (lambda layer: layer.weight.data.T @ layer.weight, True),
        (lambda layer: layer.weight.clamp(-120, 120), True),
    ],
)
def test_a_weight_that_is_looked_at_or_changed_in_place_is_not_read(reads, is_named):
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    attention = model.get_base_model().model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, _: [reads(module.q_proj), None][1])
    found = find_bypassed(model, lambda: model(torch.tensor([[2, 17, 33]])))
    assert found == (("model.layers.0.self_attn.q_proj",) if is_named else ())


def test_a_model_whose_own_code_fails_is_refused_in_one_line(tmp_path, monkeypatch):
    def fail(*_inputs, **_options):
        raise NotImplementedError("no kernel for this GPU")

    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaAttention.forward", fail, raising=True
    )
    config = load_config(make_project(tmp_path), ["train.max_steps=1"])
    with pytest.raises(LlmtuneError, match="LlamaForCausalLM does not run.*no kernel for this GPU"):
        train(config)
    assert not config.run.adapter_dir.exists()


def test_the_modules_that_are_left_can_be_trained(tmp_path):
    adapter = {"method": "lora", "rank": 2, "target_modules": ["in_proj", "x_proj", "q_proj"]}
    config = make_run(tmp_path, "jamba", adapter=adapter)
    train(config)
    assert config.run.adapter_dir.is_dir()


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    config = make_run(tmp_path, "cpmant")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "The film is warm."}] * 4)
    with pytest.raises(LlmtuneError, match="cpmant lets a token see those after it"):
        train(config)
