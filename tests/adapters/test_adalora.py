"""AdaLoRA cuts what stock peft cuts, continues from any step, and merges with what is left."""

import copy
import json

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file

from llmtune.adapters.adalora import AdaLoraAdapter
from llmtune.adapters.inject import inject_adapter
from llmtune.adapters.rank_budget import orthogonality_penalty, rank_budget
from llmtune.adapters.saved import load_adapter
from llmtune.errors import LlmtuneError
from llmtune.merging.merge import merge_adapter
from tests.adapters.conftest import IDS, load
from tests.tiny import make_model

STEPS = 8
SETTLED = 6


def trained(model, *, is_stock: bool, save_after: int | None = None):
    """Train for a few steps; return what is trained, and the course's state after one of them."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
    state = {}
    for step in range(1, STEPS + 1):
        if is_stock:
            loss = model(IDS, labels=IDS).loss
        else:
            loss = model.get_base_model()(IDS, labels=IDS).loss + orthogonality_penalty(model)
        loss.backward()
        optimizer.step()
        if is_stock:
            model.base_model.update_and_allocate(step)
        else:
            rank_budget(model).after_step(step)
            if step == save_after:
                state = copy.deepcopy(rank_budget(model).state())
                rank_budget(model).restore({})
                rank_budget(model).restore(state)
        optimizer.zero_grad()
    return own, state


def stock_config(**changes) -> AdaLoraConfig:
    course = {"tinit": 1, "tfinal": STEPS - SETTLED, "total_step": STEPS, "orth_reg_weight": 0.1}
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        init_r=6,
        target_r=3,
        lora_alpha=12,
        **course | changes,
    )


@pytest.fixture
def stock():
    torch.manual_seed(0)
    return get_peft_model(make_model("llama"), stock_config())


@pytest.mark.parametrize("save_after", [3, SETTLED])
def test_the_same_directions_are_cut_as_by_peft_and_a_saved_course_continues(stock, save_after):
    adapter = AdaLoraAdapter(
        rank=3, first_rank=6, alpha=12, cut_from=0.125, cut_until=0.75, orthogonality=0.1,
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    ours, table = inject_adapter(make_model("llama"), adapter)
    rank_budget(ours).spread_over(STEPS)
    config = ours.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step) == (1, 2, STEPS)
    assert table.trainable_parameters == sum(
        p.numel() for p in stock.parameters() if p.requires_grad
    )
    theirs = {n: p for n, p in stock.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(theirs[name])

    expected, _ = trained(stock, is_stock=True)
    found, state = trained(ours, is_stock=False, save_after=save_after)
    assert found.keys() == expected.keys() and state
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], msg=name)
    left = {n: int((p != 0).sum()) for n, p in found.items() if "lora_E" in n}
    assert sum(left.values()) == 3 * len(left) and len(set(left.values())) > 1
    assert config.rank_pattern is None, "a file keeps the width that the optimizer knows"


def test_a_file_of_stock_peft_without_cut_directions_merges_as_peft_merges(stock, tmp_path):
    trained(stock, is_stock=True)
    stock.save_pretrained(str(tmp_path / "adapter"))
    source = load(_saved_base(tmp_path)).source.directory
    ranks = {
        value.shape[0]
        for name, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
        if name.endswith("lora_A")
    }
    assert len(ranks) > 1, "every layer has its own rank in the file"

    merge_adapter(source, tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    expected = stock.merge_and_unload().state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)

    config = tmp_path / "adapter/adapter_config.json"
    known = json.loads(config.read_text())
    kept = known["rank_pattern"]
    for wrong, reason in (
        (dict.fromkeys(kept, 3), "lists of true and false by module"),
        ({f"other.{name}": one for name, one in kept.items()}, "adapter_config.json"),
    ):
        config.write_text(json.dumps(known | {"rank_pattern": wrong}))
        with pytest.raises(LlmtuneError, match=reason):
            fresh = load(tmp_path / "base")
            load_adapter(fresh.model, tmp_path / "adapter", base_fingerprint=fresh.fingerprint)


def test_over_16_bits_a_file_of_stock_peft_is_not_rounded(stock, tmp_path):
    trained(stock, is_stock=True)
    stock.save_pretrained(str(tmp_path / "adapter"))
    _saved_base(tmp_path, dtype=torch.bfloat16)
    fresh = load(tmp_path / "base", dtype="bfloat16")
    model = load_adapter(fresh.model, tmp_path / "adapter", base_fingerprint=fresh.fingerprint)
    own = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(own) == len(saved)
    for name, parameter in own.items():
        assert torch.equal(parameter, saved[name.replace(".default", "")]), name
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
    ranks = [parameter for name, parameter in model.named_parameters() if "ranknum" in name]
    assert all(rank.dtype == torch.float32 and rank == 6 for rank in ranks)
    assert not any(rank.requires_grad for rank in ranks)
    assert model.peft_config["default"].rank_pattern, "it is saved again as it was"


def test_directions_are_cut_though_float16_left_every_step_before_out(caplog):
    model, _ = inject_adapter(make_model("llama"), AdaLoraAdapter(rank=3, first_rank=6))
    budget = rank_budget(model)
    budget.spread_over(STEPS)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for step in range(1, STEPS + 1):
        for parameter in own.values():
            parameter.data.normal_()
            parameter.grad = torch.full_like(parameter, torch.inf if step <= SETTLED else 0.1)
        budget.after_step(step)
    left = [int((p != 0).sum()) for n, p in own.items() if "lora_E" in n]
    assert sum(left) == 3 * len(left)
    assert caplog.text.count("float16 left every step before 7 out") == 1


def _saved_base(place, **knobs):
    make_model("llama", place / "base", **knobs)
    return place / "base"


def test_the_rank_is_no_trained_number_over_16_bits():
    """peft's own layer rounds it to them and gives it a gradient."""
    base = make_model("llama", dtype=torch.bfloat16)
    model, _ = inject_adapter(base, AdaLoraAdapter(first_rank=12, rank=4))
    ranks = [parameter for name, parameter in model.named_parameters() if "ranknum" in name]
    assert ranks and not any(rank.requires_grad for rank in ranks)
    assert all(rank.dtype == torch.float32 and rank == 12 for rank in ranks)


def test_a_course_needs_steps_and_directions_to_cut():
    model, _ = inject_adapter(make_model("llama"), AdaLoraAdapter())
    with pytest.raises(LlmtuneError, match="train.max_steps must be 2 or more"):
        rank_budget(model).spread_over(1)
    rank_budget(model).spread_over(2)
    config = model.peft_config["default"]
    assert (config.tinit, config.tfinal) == (0, 0)
    with pytest.raises(ValueError, match="must be below adapter.first_rank=12"):
        AdaLoraAdapter(rank=12)
    with pytest.raises(ValueError, match="must be below adapter.cut_until"):
        AdaLoraAdapter(cut_from=0.8)
