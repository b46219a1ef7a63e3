"""Several adapters of one base become one model, or one new adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llmtune.cli import run_command
from llmtune.merging.combine import combine_deltas, drop_and_rescale, factorize_product, ties
from llmtune.merging.config import Combination
from llmtune.models.checkpoint import Checkpoint
from tests.merging.adapters import load_adapter, load_base, logits, make_adapter, make_base

WEIGHTS = (0.6, 0.4)
A_CONFIG: dict[str, Any] = {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
B_CONFIG: dict[str, Any] = {"r": 6, "lora_alpha": 3, "rank_pattern": {"up_proj": 2}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, and two adapters of other ranks, alphas, scalings and modules on it."""
    place = tmp_path_factory.mktemp("made")
    make_base(place / "base")
    make_adapter(place / "base", place / "a", seed=1, **A_CONFIG)
    make_adapter(place / "base", place / "b", seed=2, target_modules="all-linear", **B_CONFIG)
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for name in "ab":
        path = tmp_path / name / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
        path.write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(capsys, *arguments: str) -> dict:
    command = ["merge", "--adapters", "a=0.6", "b=0.4", "--json", "--quiet", *arguments]
    assert run_command(command) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    assert run_command(["merge", *arguments, "--out", "out", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not Path("out").exists()
    return error


def deltas(place: Path) -> dict[str, list[torch.Tensor]]:
    """Return each module's `scaling * B @ A` of each adapter, as peft computes them."""
    found: dict[str, list[torch.Tensor]] = {}
    for name in "ab":
        for module_name, module in load_adapter(place / "base", place / name).named_modules():
            if hasattr(module, "lora_A"):
                key = module_name.removeprefix("base_model.model.")
                found.setdefault(key, []).append((name, module.get_delta_weight("default").clone()))
    return found


def test_adapters_line_of_the_issue_gives_the_weighted_sum_to_the_bit(place, capsys):
    result = merge(capsys, "--method", "linear", "--out", "out")
    assert result["changes"] == {"lora": 14}
    assert result["check"]["kl"] < 1e-6
    before, after = load_file("base/model.safetensors"), load_file("out/model.safetensors")
    files = [load_file(f"{name}/adapter_model.safetensors") for name in "ab"]
    key = "base_model.model.model.layers.0.mlp.up_proj"
    expected = before["model.layers.0.mlp.up_proj.weight"].clone()
    # a: rank 4 and alpha 8 with rsLoRA; b: rank 2 and alpha 3
    for tensors, scaling, weight in zip(files, (8 / 4**0.5, 3 / 2), WEIGHTS, strict=True):
        a, b = (tensors[f"{key}.lora_{part}.weight"] for part in "AB")
        expected += (b @ a) * (scaling * weight)
    assert torch.equal(after["model.layers.0.mlp.up_proj.weight"], expected)


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_adapter_of_a_sum_is_exact_and_stock_peft_loads_it(place, capsys, method):
    result = merge(capsys, "--method", method, "--to", "adapter", "--out", "out")
    assert (result["ranks"], result["lost_energy"]) == ({"10": 2, "6": 12}, 0)
    merge(capsys, "--out", "merged")
    combined = logits(load_adapter(place / "base", place / "out"))
    torch.testing.assert_close(combined, logits(load_base(place / "merged")), atol=2e-5, rtol=0)
    assert (combined - logits(load_base(place / "base"))).abs().max() > 0.05


def test_cat_and_svd_are_pefts_own(place, capsys):
    model = PeftModel.from_pretrained(load_base(place / "base"), place / "b", adapter_name="b")
    make_adapter(place / "base", place / "c", seed=3, target_modules="all-linear", **B_CONFIG)
    model.load_adapter(place / "c", adapter_name="c")
    options = {"adapters": ["b", "c"], "weights": [0.7, 0.3]}
    model.add_weighted_adapter(**options, adapter_name="cat", combination_type="cat")
    model.add_weighted_adapter(**options, adapter_name="svd", combination_type="svd", svd_rank=3)
    adapters = ("--adapters", "b=0.7", "c=0.3", "--to", "adapter", "--quiet")
    assert run_command(["merge", *adapters, "--method", "cat", "--out", "cat"]) == 0
    assert run_command(["merge", *adapters, "--method", "svd", "--rank", "3", "--out", "svd"]) == 0
    for method in ("cat", "svd"):
        ours = dict(load_adapter(place / "base", place / method).named_modules())
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                expected = module.get_delta_weight(method)
                found = ours[name].get_delta_weight("default")
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    capsys.readouterr()


def test_pefts_linear_has_cross_terms_and_ours_has_not(place, capsys):
    make_adapter(place / "base", place / "c", seed=3, target_modules="all-linear", **B_CONFIG)
    model = PeftModel.from_pretrained(load_base(place / "base"), place / "b", adapter_name="b")
    model.load_adapter(place / "c", adapter_name="c")
    model.add_weighted_adapter(["b", "c"], [0.5, 0.5], "both", combination_type="linear")
    command = ["merge", "--adapters", "b=0.5", "c=0.5", "--to", "adapter", "--out", "out", "-q"]
    assert run_command(command) == 0
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    module = model.get_submodule(name)
    exact = 0.5 * (module.get_delta_weight("b") + module.get_delta_weight("c"))
    ours = load_adapter(place / "base", place / "out").get_submodule(name)
    torch.testing.assert_close(ours.get_delta_weight("default"), exact, atol=1e-6, rtol=1e-5)
    assert (module.get_delta_weight("both") - exact).norm() > 0.3 * exact.norm()


def test_ties_is_pefts_on_whole_deltas(made):
    from peft.utils.merge_utils import ties as stock

    pairs = [[one for _, one in found] for found in deltas(made).values() if len(found) == 2]
    assert len(pairs) == 4
    for pair in pairs:
        expected = stock(pair, torch.tensor(WEIGHTS), density=0.3)
        torch.testing.assert_close(ties(pair, WEIGHTS, 0.3), expected)


def test_ties_by_hand():
    one, other = torch.tensor([[4.0, -3.0, 0.1, 2.0]]), torch.tensor([[2.0, 5.0, 0.2, -0.1]])
    # trimmed: [4, -3, 0, 0] and [2, 5, 0, 0]; signs + and +
    expected = torch.tensor([[(0.5 * 4 + 1.0 * 2) / 2, 5.0, 0.0, 0.0]])
    assert torch.equal(ties([one, other], (0.5, 1.0), 0.5), expected)


def test_dare_keeps_the_mean_and_depends_on_the_seed_alone():
    delta = torch.ones(400, 400)
    kept = drop_and_rescale(delta, 0.25, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    pair = [delta, 2 * delta]
    runs = [
        combine_deltas(pair, WEIGHTS, Combination("dare", seed=seed), name="w")
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("method", ["ties", "dare", "svd"])
def test_dense_methods_make_a_model_of_the_whole_combined_delta(place, capsys, method):
    result = merge(capsys, "--method", method, "--rank", "5", "--out", "out")
    assert result["method"] == method
    before, after = load_file("base/model.safetensors"), load_file("out/model.safetensors")
    how = Combination(method, rank=5)
    for key, found in deltas(place).items():
        weights = [dict(zip("ab", WEIGHTS, strict=True))[name] for name, _ in found]
        name = f"{key}.weight"
        delta = combine_deltas([one for _, one in found], weights, how, name=f"{name}/0")
        torch.testing.assert_close(after[name] - before[name], delta, atol=1e-5, rtol=1e-4)


def test_cutting_the_rank_tells_what_it_lost():
    a, b = torch.randn(8, 30), torch.randn(20, 8)
    delta = (b @ a).double()
    new_a, new_b, lost, energy = factorize_product(a, b, 3)
    assert (new_a.shape, new_b.shape) == ((3, 30), (20, 3))
    rest = (delta - new_b.double() @ new_a.double()).square().sum() / delta.square().sum()
    assert lost == pytest.approx(rest.item(), rel=1e-4)
    assert energy == pytest.approx(delta.square().sum().item(), rel=1e-4)


def test_lost_energy_is_in_the_result(place, capsys):
    result = merge(capsys, "--method", "ties", "--rank", "3", "--to", "adapter", "--out", "out")
    assert 0 < result["lost_energy"] < result["worst_lost_energy"] < 1
    assert result["ranks"] == {"3": 14}


def test_plan_of_several_names_every_delta(place, capsys):
    plan = merge(capsys, "--out", "out", "--dry-run")["plans"][0]
    first = next(one for one in plan["changed"] if "up_proj" in one["tensor"])
    assert [(one["rank"], one["weight"]) for one in first["deltas"]] == [(4, 0.6), (2, 0.4)]
    assert not Path("out").exists()


@pytest.mark.parametrize("to", ["adapter", "model"])
def test_an_earlier_result_is_replaced_when_asked(place, capsys, to):
    merge(capsys, "--to", to, "--out", "out")
    weights = next(Path("out").glob("*model.safetensors"))
    before = weights.read_bytes()
    command = ["merge", "--adapters", "a=1", "b=2", "--to", to, "--out", "out", "--quiet"]
    assert run_command(command) == 2
    assert "give --force" in capsys.readouterr().err and weights.read_bytes() == before
    assert run_command([*command, "--force"]) == 0
    assert weights.read_bytes() != before
    assert sorted(path.name for path in place.iterdir()) == ["a", "b", "base", "out"]


@pytest.mark.parametrize(
    ("to", "out"),
    [("adapter", "a"), ("adapter", "base"), ("model", "base"), ("adapter", "."), ("model", "mine")],
)
def test_what_is_no_such_result_or_is_read_is_never_replaced(place, capsys, to, out):
    Path("mine").mkdir()
    for marker in ("llmtune_merge.json", "llmtune_combined.json"):
        Path("base", marker).write_text("{}")
        Path("a", marker).write_text("{}")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    command = ["merge", "--adapters", "a=1", "b=2", "--to", to, "--out", out, "--force", "--quiet"]
    assert run_command(command) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_adapters_that_cannot_be_combined_are_refused(place, capsys):
    pair = ("--adapters", "a=1", "--adapters", "b=1")
    assert "at least two" in refused(capsys, "--adapters", "a=1")
    assert "same adapter" in refused(capsys, "--adapters", "a=1", "a=0.5")
    assert "NAME_OR_PATH=WEIGHT" in refused(capsys, "--adapters", "a=1", "b=nan")
    assert "neither an adapter" in refused(capsys, "--adapters", "a=1", "missing=1")
    assert "needs --rank" in refused(capsys, *pair, "--method", "svd")
    make_adapter(place / "base", place / "dora", use_dora=True)
    assert "DoRA" in refused(capsys, "--adapters", "a=1", "dora=1")
    for name in ("whole", "other"):
        make_adapter(
            place / "base", place / name, target_modules=["k_proj"], modules_to_save=["norm"]
        )
    shutil.copytree("whole", "again")
    tensors = load_file("again/adapter_model.safetensors")
    save_file({k: 2 * v for k, v in tensors.items()}, "again/adapter_model.safetensors")
    assert "cannot be combined" in refused(capsys, "--adapters", "whole=1", "again=1")
    assert "modules_to_save" in refused(capsys, "--adapters", "a=1", "whole=1", "--to", "adapter")
    path = place / "b" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    assert "not finite" in refused(capsys, *pair)


def test_adapters_of_different_bases_are_refused(place, capsys):
    for name, fingerprint in (("a", Checkpoint.open(place / "base").fingerprint), ("b", "0" * 64)):
        base = {"origin": str(place / "base"), "path": str(place / "base")}
        manifest = {"format": 1, "base": base | {"fingerprint": fingerprint}}
        (place / name / "llmtune_adapter.json").write_text(json.dumps(manifest))
    assert "different bases" in refused(capsys, "--adapters", "a=0.6", "b=0.4")
