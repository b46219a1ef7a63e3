"""`doctor --test` finds planted faults, switches only those off, and later runs say so."""

import json
import time
from pathlib import Path

import pytest
import torch

from llmtune.adapters import fused
from llmtune.checks import fast_paths
from llmtune.checks.fast_paths import list_switched_off, try_fast_paths
from llmtune.cli import run_command
from llmtune.io.environment import versions
from llmtune.models import fast_paths as kept_paths
from llmtune.models.fast_paths import SwitchedOff, keep_record, switched_off
from llmtune.ops import linear_cross_entropy, linear_kl, lora_linear, rms_norm, tiled_attention
from tests.project import make_project

PATHS = {
    "frozen_head",
    "fused_lora",
    "fused_blocks",
    "packing",
    "shared_beginnings",
    "kl_to_base",
    "fused_scoring",
}


@pytest.fixture
def small(monkeypatch):
    """Smaller models, fewer timings."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    monkeypatch.setattr(fast_paths, "SIZES", {**fast_paths.SIZES, **sizes})
    monkeypatch.setattr(fast_paths, "TIMED_STEPS", 2)
    monkeypatch.setattr(fast_paths, "SHAPES", {"llama": {}})


@pytest.fixture
def uncached_plans():
    caches = (
        tiled_attention.plan_tiles,
        tiled_attention.plan_stacks,
        tiled_attention._cut_mask,
    )
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def plant(monkeypatch, place, name, change):
    real = getattr(place, name)
    found = change(real)
    monkeypatch.setattr(place, name, staticmethod(found) if isinstance(place, type) else found)


def with_wrong_sign(backward):
    def flipped(*args):
        gradients = backward(*args)
        return tuple(-one if isinstance(one, torch.Tensor) else one for one in gradients)

    return flipped


def held_up(forward):
    def slow(*args):
        started = time.process_time()
        while time.process_time() < started + 0.01:
            pass
        return forward(*args)

    return slow


def with_a_hole(additive):
    """Let a token of long tiles, which no probe has, see a later one."""

    def wrong(is_seen):
        if len(is_seen) > 60:
            is_seen = is_seen.clone()
            is_seen[45, 50] = True
        return additive(is_seen)

    return wrong


def wrong_without_gradients(lora_linears):
    def wrong(*args):
        outputs = lora_linears(*args)
        return outputs if torch.is_grad_enabled() else [-output for output in outputs]

    return wrong


def states(directory):
    found = {}
    for result in try_fast_paths(directory, ["float32"], device="cpu", with_quantized=False):
        found[result.path] = result
    assert found.keys() == PATHS
    return found


def test_a_wrong_sign_a_wrong_mask_and_a_slow_path_are_found(
    small, uncached_plans, monkeypatch, tmp_path
):
    head = linear_cross_entropy._FrozenHeadCrossEntropy
    plant(monkeypatch, head, "backward", with_wrong_sign)
    plant(monkeypatch, rms_norm._RmsNorm, "forward", held_up)
    plant(monkeypatch, tiled_attention, "_additive", with_a_hole)
    found = states(tmp_path)
    assert {path: one.state for path, one in found.items()} == {
        "frozen_head": "wrong",
        "fused_lora": "used",
        "fused_blocks": "slow",
        "packing": "wrong",
        "shared_beginnings": "not used",  # rows are padded
        "kl_to_base": "not used",  # it needs the head
        "fused_scoring": "used",
    }
    assert "times as long" in found["fused_blocks"].reason
    off = list_switched_off(list(found.values()))
    assert {(one["path"], one["dtype"]) for one in off} == {
        ("frozen_head", "float32"),
        ("fused_blocks", "float32"),
        ("packing", "float32"),
    }


def test_what_is_wrong_elsewhere_leaves_the_other_paths_on(small, monkeypatch, tmp_path):
    plant(monkeypatch, lora_linear._LoraLinears, "backward", with_wrong_sign)
    plant(monkeypatch, linear_kl._FrozenHeadKl, "backward", with_wrong_sign)
    plant(monkeypatch, fused, "lora_linears", wrong_without_gradients)
    found = {path: one.state for path, one in states(tmp_path).items()}
    wrong = {"fused_lora", "kl_to_base", "fused_scoring"}
    assert found == {path: "wrong" if path in wrong else "used" for path in PATHS}


def test_the_command_tests_the_machine_and_keeps_what_it_found(small, capsys, monkeypatch):
    monkeypatch.setattr("llmtune.models.hardware.cpu_emulates_bfloat16", lambda: True)
    assert run_command(["doctor", "--test", "--json"]) == 0
    findings = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    for path in PATHS:
        assert findings[f"{path} (llama, float32)"]["found"].startswith("used: ")
    kept_in = Path(findings["test of this machine"]["found"].removeprefix("kept in "))
    record = json.loads(kept_in.read_text())
    assert record["kept"]["off"] == []
    assert record["kept"]["versions"] == versions()
    assert len(record["kept"]["results"]) == 2 * len(PATHS)  # and over a 4-bit base


def keep(*paths):
    off = [
        SwitchedOff(path=path, dtype="float32", is_quantized=False, reason="it is off by 2.1")
        for path in paths
    ]
    return keep_record("cpu", off, [])


def test_a_run_leaves_out_what_the_test_switched_off_and_says_so(tmp_path, capsys):
    config = str(make_project(tmp_path, model={"base": f"{tmp_path}/base", "dtype": "float32"}))
    path = keep("fused_blocks", "packing", "fused_scoring")
    assert run_command(["train", config, "train.max_steps=1"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "fused_blocks is switched off on this machine by `llmtune doctor --test`" in said
    assert "it is off by 2.1" in said and str(path) in said.replace(" ", "")
    assert "blocks: stock: switched off on this machine" in said
    assert "rows: padded: switched off on this machine" in said
    assert "LoRA layers: 14 fused" in said
    assert set(switched_off("float32", "cpu", is_quantized=False)) == {
        "fused_blocks",
        "packing",
        "fused_scoring",
    }
    assert not switched_off("bfloat16", "cpu", is_quantized=False)
    assert not switched_off("float32", "a GPU", is_quantized=False)


@pytest.mark.parametrize(
    ("path", "override", "advice"),
    [
        ("kl_to_base", "protect.kl_to_base={rows: 1}", "protect.kl_to_base=null"),
        ("packing", "data.packing=on", "data.packing=off"),
    ],
)
def test_what_is_off_and_asked_for_is_refused(tmp_path, capsys, path, override, advice):
    config = str(make_project(tmp_path, model={"base": f"{tmp_path}/base", "dtype": "float32"}))
    keep(path)
    assert run_command(["train", config, "train.max_steps=1", override]) == 2
    assert advice in capsys.readouterr().err


def test_other_versions_end_what_was_found_and_a_line_says_so(monkeypatch, caplog):
    path = keep("fused_lora")
    assert "fused_lora" in switched_off("float32", "cpu", is_quantized=False)
    monkeypatch.setattr(kept_paths, "_made_with", lambda: "f" * 64)
    assert not switched_off("float32", "cpu", is_quantized=False)
    assert "fused_lora: `llmtune doctor --test` switched it off with other versions" in caplog.text
    keep()
    assert not path.exists()
