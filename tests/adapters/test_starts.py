"""Starts from the base's weight train as peft's own do, and leave the base as it is."""

import os
import signal

import pytest
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file

from llmtune.adapters.inject import adapted_layers, inject_adapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.manifest import read_adapter_config
from llmtune.adapters.rslora import RsLoraAdapter
from llmtune.adapters.saved import save_adapter
from llmtune.adapters.starts import Sample, SampleRow, factors_of_weight, start_from_rows
from llmtune.cli import run_command
from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.training.trainer import AdapterTrainer
from tests.adapters.conftest import IDS, load, logits, manifest_of, stock
from tests.conftest import write_jsonl
from tests.project import make_project

KNOBS = {"rank": 4, "alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def descend(model, steps: int = 4) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "init"),
    [(LoraAdapter, "pissa"), (RsLoraAdapter, "olora")],
)
def test_training_from_the_weight_is_pefts_own(checkpoint, tmp_path, method, init):
    loaded = load(checkpoint())
    before = logits(loaded.model)
    torch.manual_seed(0)
    ours, _ = inject_adapter(loaded.model, method(**KNOBS, init=init))
    torch.testing.assert_close(logits(ours), before, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    theirs = get_peft_model(
        stock(checkpoint()),
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=KNOBS["target_modules"],
            init_lora_weights=init,
            use_rslora=method is RsLoraAdapter,
        ),
    )
    descend(ours)
    descend(theirs)

    assert not torch.allclose(logits(ours), before, atol=1e-2)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)
    saved = read_adapter_config(save_adapter(ours, tmp_path / "saved", manifest_of(loaded)))
    assert (saved["r"], saved["init_lora_weights"]) == (8, True)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), before)


ROWS = [SampleRow(row, [False] * 3 + [True] * 9) for row in IDS.tolist()]


@pytest.mark.parametrize(("init", "mode"), [("corda", "ipm"), ("corda_kpm", "kpm")])
def test_training_from_what_rows_use_of_the_weight_is_pefts_own(checkpoint, init, mode):
    loaded = load(checkpoint())
    before = logits(loaded.model)
    ids = torch.randint(4, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    rows = [SampleRow(row, [True] * 64) for row in ids.tolist()]
    ours, _ = inject_adapter(loaded.model, LoraAdapter(**KNOBS, init=init), rows=rows)
    torch.testing.assert_close(logits(ours), before, rtol=1e-4, atol=1e-5)
    base = stock(checkpoint())
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=KNOBS["target_modules"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    preprocess_corda(base, config, run_model=lambda: [base(row[None]) for row in ids])
    theirs = get_peft_model(base, config)
    descend(ours)
    descend(theirs)

    assert not torch.allclose(logits(ours), before, atol=1e-2)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)


def test_a_start_from_rows_is_the_principal_components_that_peft_finds(checkpoint):
    ours, _ = inject_adapter(load(checkpoint()).model, LoraAdapter(**KNOBS, init="eva"), rows=ROWS)
    theirs = get_peft_model(
        stock(checkpoint()),
        LoraConfig(
            r=4,
            target_modules=KNOBS["target_modules"],
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=1.0),
        ),
    )
    labels = torch.tensor([[-100] * 3 + [1] * 9] * 2)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
    initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    found, expected = (
        {n: p for n, p in model.named_parameters() if "lora_A" in n} for model in (ours, theirs)
    )

    assert found.keys() == expected.keys()
    for name, a in found.items():
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-4)
        overlap = torch.linalg.svdvals(a @ torch.nn.functional.normalize(expected[name]).T)
        assert overlap[2] > 0.98, name  # peft finds the last component roughly


def test_a_start_from_rows_needs_rows_enough(checkpoint):
    eva = LoraAdapter(**{**KNOBS, "rank": 30}, init="eva")
    with pytest.raises(LlmtuneError, match="train 18 tokens, and rank 30 needs more"):
        inject_adapter(load(checkpoint()).model, eva, rows=ROWS)
    with pytest.raises(LlmtuneError, match="init=eva starts from training rows, and there are no"):
        inject_adapter(load(checkpoint()).model, eva)


@pytest.mark.parametrize(("init", "num_tokens"), [("eva", 5), ("corda", 0)])
def test_a_layer_that_a_row_hardly_reaches_is_named(checkpoint, init, num_tokens):
    model, _ = inject_adapter(load(checkpoint()).model, LoraAdapter(**KNOBS))
    layers = adapted_layers(model)
    name, layer = next(iter(layers.items()))
    # as an expert, which is given some of a row's tokens
    layer.get_base_layer().register_forward_pre_hook(lambda _, given: given[0][:, :num_tokens])
    with pytest.raises(LlmtuneError, match=f"{name} is given {num_tokens} of the 12 tokens"):
        start_from_rows(layers, init, Sample(model, ROWS))


def test_fast_decomposition_is_nearly_the_best():
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    best, fast = (factors_of_weight(weight, init, 4, 0.5) for init in ("pissa", "pissa_niter_16"))
    lost = [(weight - 0.5 * b @ a).norm() for a, b in (best, fast)]

    assert lost[0] <= lost[1] < 1.01 * lost[0] < 0.9 * weight.norm()


@pytest.mark.parametrize(
    ("family", "knobs"), [("llama", {"quantization": {"method": "nf4"}}), ("gpt2", {})]
)
def test_the_start_is_kept_beside_what_is_trained(checkpoint, family, knobs):
    base = load(checkpoint(family), dtype="bfloat16", **knobs).model
    model, table = inject_adapter(base, LoraAdapter(rank=4, init="pissa"))
    name, factors = next((n, p) for n, p in model.named_parameters() if "lora_A" in n)
    before = factors.detach().clone()
    descend(model, steps=2)

    assert table.rows[0].settings["rank"] == 8, "what is saved, and what it costs"
    assert torch.equal(factors[4:], before[:4]), name
    assert not torch.equal(factors[:4], before[:4])


def test_weight_decay_would_shrink_the_start(tmp_path):
    given = {
        "run_dir": str(tmp_path),
        "model": {"base": "x/y"},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "adapter": {"init": "olora"},
    }
    RunConfig.model_validate(given)
    with pytest.raises(ValueError, match=r"train\.weight_decay=0"):
        RunConfig.model_validate({**given, "train": {"weight_decay": 0.1}})


def test_token_rows_and_biases_are_trained_beside(checkpoint):
    model = load(checkpoint(), dtype="bfloat16").model
    knobs = {"trainable_tokens": [5, 9], "lora_bias": True, "rank": 4}
    model, _ = inject_adapter(model, LoraAdapter(**knobs))
    descend(model, steps=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    assert any("trainable_tokens_delta" in name for name in trained)
    assert any("lora_B.default.bias" in name for name in trained)
    with pytest.raises(LlmtuneError, match="trainable_tokens: 99999 is not a token"):
        inject_adapter(load(checkpoint()).model, LoraAdapter(trainable_tokens=[99999]))


TABLE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("adapter", "others"),
    [
        ({"trainable_tokens": [2, 3], "lora_bias": True, "rank": 4}, (TABLE,)),
        ({"method": "layers", "parameters": ["norms", "biases"]}, (".ln_",)),
        ({"init": "corda", "init_rows": 9, "rank": 4}, ()),
    ],
)
def test_what_is_no_weight_of_a_layer_goes_through_a_stopped_run(
    adapter, others, tmp_path, monkeypatch, capsys
):
    """On a base whose head is the embedding, and whose linear layers all have biases."""
    config = str(make_project(tmp_path, "gpt2", adapter=adapter))
    run = ["run", config, "--quiet"]
    assert run_command(["train", config, f"run_dir={tmp_path / 'straight'}", "--quiet"]) == 0
    step, begun = AdapterTrainer.training_step, []

    def interrupted(self, *inputs):
        begun.append(self)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(AdapterTrainer, "training_step", interrupted)
        assert run_command(run) == 3
    assert run_command(run) == 0, capsys.readouterr().err
    straight, continued = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("straight", "run")
    )
    assert continued.keys() == straight.keys()
    assert all(torch.equal(tensor, straight[name]) for name, tensor in continued.items())

    base, merged = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "run/merged")
    )
    changed = {name for name, weight in base.items() if not torch.equal(weight, merged[name])}
    wanted = {name for name in base if any(mark in name for mark in (".c_", *others))}
    if "method" in adapter:
        wanted = {name for name in wanted if ".ln_" in name or name.endswith(".bias")}
    if "init" in adapter:
        wanted = {name for name in wanted if name.endswith(".weight")}
    assert changed == wanted
    rows = (base[TABLE] != merged[TABLE]).any(dim=1).nonzero().flatten().tolist()
    assert rows == adapter.get("trainable_tokens", [])
    live = PeftModel.from_pretrained(stock(tmp_path / "base"), tmp_path / "run" / "adapter")
    plain = logits(stock(tmp_path / "run" / "merged"))
    torch.testing.assert_close(plain, logits(live), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_token_that_only_ends_rows_is_refused_if_its_row_would_learn_nothing(tmp_path, capsys):
    config = make_project(tmp_path, "llama", adapter={"trainable_tokens": [3]})
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"The plot goes {i}."} for i in range(8)])
    assert run_command(["train", str(config), "--quiet"]) == 2
    assert "no trained token comes after the token 3" in capsys.readouterr().err
