"""A plan is arithmetic on small files, agrees with what is loaded, and says what would fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter

from llmtune.cli import run_command
from llmtune.config import load_config
from llmtune.errors import LlmtuneError
from llmtune.io.sizes import GIB
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.models.quantization.config import DENSE
from llmtune.models.quantization.nf4 import Nf4Quantization
from llmtune.models.resolve import resolve_base
from llmtune.planning.base import read_base
from llmtune.planning.devices import given_gpu
from llmtune.planning.estimate import RUNTIME_BYTES, base_bytes, trained_bytes
from llmtune.planning.shape import read_shape
from llmtune.runs.pipeline import plan
from tests.planning.shapes import small_config
from tests.tiny import make_model
from tests.versions import without_torch

ROOT = Path(__file__).parent.parent.parent
EIGHT_B = ROOT / "docs" / "shapes" / "llama-3.1-8b"


def write_config(directory, **model):
    """Write a run's config about rows that are not there yet."""
    values = {
        "run_dir": str(directory / "run"),
        "model": {"device": "cuda", **model},
        "data": {"train": [{"path": str(directory / "to_come.jsonl")}], "max_length": 2048},
    }
    path = directory / "plan.yaml"
    path.write_text(json.dumps(values))
    return path


def plan_8b(directory, *overrides, gpu, quantization=None):
    path = write_config(directory, base=str(EIGHT_B), quantization=quantization)
    return plan(load_config(path, overrides), gpu=gpu)


@pytest.mark.parametrize(
    "quantization", [None, Nf4Quantization(), Nf4Quantization(double_quant=False)]
)
def test_the_bytes_of_a_base_are_those_of_the_loaded_one(tmp_path, quantization):
    make_model("llama", tmp_path)
    model = ModelConfig(base=str(tmp_path), quantization=quantization, device="cpu")
    loaded = load_model(model, resolve_base(model))
    shape = read_shape(json.loads((tmp_path / "config.json").read_text()), "here")
    assert sum(base_bytes(shape, quantization or DENSE, 2).values()) == loaded.quantized.bytes


def test_the_bases_states_that_protection_keeps_are_counted(tmp_path):
    settings = ["train.max_steps=16", "train.micro_batch_size=1"]
    kept = 64 * 127 * 4096 * 2  # rows, compared tokens, width, bytes
    with_states = plan_8b(tmp_path, *settings, "protect.kl_to_base={rows: 4}", gpu="80GB").memory
    assert with_states.components["the base's states"] == kept
    without = plan_8b(tmp_path, *settings, gpu="80GB").memory
    assert "the base's states" not in without.components
    assert with_states.total_bytes >= without.total_bytes + kept


def test_a_base_added_up_by_hand():
    shape = read_shape({**small_config("llama"), "model_type": "llama"}, "here")
    linear = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128)
    rest = 2 * 512 * 64 + 5 * 64
    assert base_bytes(shape, DENSE, 2) == {"16-bit": 2 * (linear + rest)}
    # every 64 weights share a byte, and here no layer has more than 256 such scales
    four_bit = linear // 2 + linear // 64 + 4 * 14
    assert base_bytes(shape, Nf4Quantization(), 2) == {"nf4": four_bit, "16-bit": 2 * rest}


def test_training_keeps_weight_gradient_and_two_moments():
    needed = trained_bytes(1000, "adamw", copy_bytes=2)
    assert needed == {
        "adapter": 4000,
        "gradients": 4000,
        "optimizer": 8000,
        "adapter copies": 2000,
    }
    assert trained_bytes(1000, "adamw_8bit", copy_bytes=0)["optimizer"] == 2031


def test_the_known_8b_is_counted_as_published(tmp_path):
    found = plan_8b(tmp_path, gpu="80GB")
    assert found.shape.num_parameters == 8_030_261_248
    assert found.adapter_parameters == 41_943_040
    assert found.memory.base == {"16-bit": 2 * 8_030_261_248}
    assert found.fits


def test_the_parts_add_up_to_no_more_than_the_card(tmp_path):
    found = plan_8b(tmp_path, gpu="24GB", quantization={"method": "nf4"})
    parts = found.memory.components
    assert parts["runtime"] == RUNTIME_BYTES["cuda"]
    assert found.memory.total_bytes == sum(parts.values()) <= 24 * GIB
    assert 0 < found.memory.recomputed_layers < 32


def test_gradients_take_no_room_beside_the_activations_of_an_only_micro_batch(tmp_path):
    one = ("train.batch_size=2", "train.micro_batch_size=2")
    assert "gradients" not in plan_8b(tmp_path, *one, gpu="80GB").memory.components
    several = ("train.batch_size=4", "train.micro_batch_size=2")
    parts = plan_8b(tmp_path, *several, gpu="80GB").memory.components
    assert parts["gradients"] == parts["adapter"]


def test_less_memory_means_more_recomputation_and_never_a_larger_micro_batch(tmp_path):
    plans = [plan_8b(tmp_path, gpu=f"{size}GB").memory for size in (160, 80, 48, 24)]
    recomputed = [each.recomputed_layers for each in plans]
    assert recomputed == sorted(recomputed)
    assert [each.fits for each in plans] == [True] * 4


def test_what_does_not_fit_names_settings_that_do(tmp_path):
    found = plan_8b(tmp_path, gpu="16GB")
    assert not found.fits
    assert found.advice[0].startswith("model.quantization='{method: nf4}': ")
    assert [line.endswith("in all") for line in found.advice[:2]] == [True, True]
    assert plan_8b(tmp_path, gpu="16GB", quantization={"method": "nf4"}).fits


def test_a_demand_that_is_too_much_is_first_asked_to_be_left_to_auto(tmp_path):
    fixed = ("train.micro_batch_size=16", "train.gradient_checkpointing=false")
    found = plan_8b(tmp_path, *fixed, gpu="80GB")
    assert not found.fits
    assert [line.endswith("in all") for line in found.advice[:2]] == [True, True]
    assert found.advice[0].startswith("train.gradient_checkpointing=auto")


def test_a_card_too_small_for_everything_says_so(tmp_path):
    found = plan_8b(tmp_path, gpu="4GB")
    assert "choose a smaller base" in found.advice[0]


def test_the_command_ends_with_1_where_it_does_not_fit(tmp_path, capsys):
    path = str(write_config(tmp_path, base=str(EIGHT_B)))
    assert run_command(["plan", path, "--gpu", "rtx4090"]) == 0
    assert run_command(["plan", path, "--gpu", "8GB", "--json"]) == 1
    written = capsys.readouterr().out
    shown = json.loads(written[written.index("\n{") :])
    assert shown["fits"] is False
    assert shown["memory"]["total_bytes"] == sum(shown["memory"]["components"].values())
    assert shown["advice"]


def scaling_8b(directory, capsys, *arguments, code=0):
    path = str(write_config(directory, base=str(EIGHT_B)))
    assert run_command(["plan", path, "train.batch_size=16", "--json", *arguments]) == code
    return json.loads(capsys.readouterr().out)


def test_several_cards_hold_the_whole_base_each_and_add_up_one_adapter_a_step(tmp_path, capsys):
    one = scaling_8b(tmp_path, capsys, "--gpu", "80GB")
    assert "scaling" not in one
    found = scaling_8b(tmp_path, capsys, "--gpu", "80GB", "--gpus", "4", "--nodes", "2")
    there, here = found["memory"]["components"], one["memory"]["components"]
    assert there["base"] == here["base"]
    assert there["activations"] < here["activations"], "a card has 2 of the 16 rows"
    assert found["memory"]["total_bytes"] == sum(there.values())
    scaling = found["scaling"]
    assert scaling["cards"] == 8 and scaling["rows_a_card"] == 2 and scaling["smallest_cards"] == 1
    assert scaling["reduced_bytes"] == 4 * found["adapter_parameters"] == there["reduction buffer"]
    assert scaling["sent_bytes"] == round(2 * 7 / 8 * scaling["reduced_bytes"])
    assert "between machines" in scaling["link_source"]
    assert scaling["step_source"].startswith("assumed")


def test_the_scaling_is_computed_from_the_step_and_the_link_that_are_given(tmp_path, capsys):
    given = ("--gpu", "80GB", "--link", "2", "--step-seconds", "8")
    scaling = scaling_8b(tmp_path, capsys, *given, "--gpus", "16")["scaling"]
    assert scaling["link_source"] == scaling["step_source"] == "given"
    expected = 8 / 16 + scaling["sent_bytes"] / 2e9
    assert scaling["step_seconds"] == pytest.approx(expected)
    assert scaling["speedup"] == pytest.approx(8 / expected)
    # of 16 rows the busiest of five cards gets four; 20 cards are no faster than 16
    assert scaling_8b(tmp_path, capsys, *given, "--gpus", "5")["scaling"]["rows_a_card"] == 4
    more = scaling_8b(tmp_path, capsys, *given, "--gpus", "20")["scaling"]
    assert more["speedup"] < scaling["speedup"] and more["efficiency"] < scaling["efficiency"]


def test_a_sharded_base_takes_a_part_of_every_card_and_of_the_link(tmp_path, capsys):
    whole = scaling_8b(tmp_path, capsys, "--gpu", "80GB", "--gpus", "4")
    found = scaling_8b(tmp_path, capsys, "train.shard=full", "--gpu", "80GB", "--gpus", "4")
    parts = found["memory"]["components"]
    tables = 2 * 2 * 128256 * 4096
    layers = whole["memory"]["components"]["base"] - tables
    assert parts["base"] == pytest.approx(tables + layers / 4, abs=4)
    assert parts["gathered layers"] == pytest.approx(3 * layers / 32, abs=4)
    assert found["scaling"]["gathered_bytes"] % (2 * round(layers * 3 / 4)) < 8
    given = ("train.shard=full", "--gpu", "16GB", "--step-seconds", "8", "--link", "1")
    found = scaling_8b(tmp_path, capsys, *given, "--gpus", "8")["scaling"]
    assert 1 < found["smallest_cards"] <= 8
    assert found["step_seconds"] == found["gather_seconds"] + found["reduction_seconds"]
    path = str(write_config(tmp_path, base=str(EIGHT_B)))
    assert run_command(["plan", path, "train.shard=full", "--gpu", "16GB", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "each with 1/8 of the base's layers" in printed and "are received by each" in printed


def test_traffic_scaling_and_fewest_cards_are_those_worked_out_by_hand(tmp_path, capsys):
    # rank 16 on q, o (4096 x 4096), k, v (1024 x 4096), gate, up, down (14336 x 4096), 32 times
    parameters = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert parameters == 41_943_040
    given = ("--gpu", "80GB", "--link", "10", "--step-seconds", "8", "--gpus", "4", "--nodes", "2")
    found = scaling_8b(tmp_path, capsys, *given)["scaling"]
    assert found["reduced_bytes"] == 160 << 20, "4 bytes each"
    assert found["sent_bytes"] == 280 << 20, "in a ring of 8, twice 7/8 of it"
    assert found["reduction_seconds"] == pytest.approx(0.029360, abs=1e-6), (
        "at 10^10 bytes a second"
    )
    assert found["step_seconds"] == pytest.approx(1.029360, abs=1e-6), "2 of the 16 rows are 1 s"
    assert found["speedup"] == pytest.approx(7.7718, abs=1e-4)

    def plan_rows(cards, gpu):
        rows = ("train.batch_size=12", "train.micro_batch_size=12")
        cards = ("--gpu", gpu, "--gpus", cards)
        return scaling_8b(tmp_path, capsys, *rows, *cards, code=int(cards[-1] != "12"))

    # Every layer is recomputed, so what is left grows by the row: two on 6 cards, one on 12.
    plans = {cards: plan_rows(cards, "18GB") for cards in ("6", "12")}
    two, one = (plan["memory"]["total_bytes"] / 2**30 for plan in plans.values())
    row = two - one
    assert one < 18 < two < 19 < two + row
    assert plans["6"]["scaling"]["smallest_cards"] == 12
    assert plan_rows("2", "19GB")["scaling"]["smallest_cards"] == 6


def test_where_the_base_is_larger_than_a_card_no_number_of_cards_is_enough(tmp_path, capsys):
    found = scaling_8b(tmp_path, capsys, "--gpu", "12GB", "--gpus", "8", code=1)["scaling"]
    assert found["smallest_cards"] is None
    assert "each card holds all of it" in found["way"]
    assert "model.quantization='{method: nf4}' one card is enough" in found["way"]
    nf4 = "model.quantization={method: nf4}"
    found = scaling_8b(tmp_path, capsys, nf4, "--gpu", "6GB", "--gpus", "8", code=1)["scaling"]
    assert "with train.shard=full model.quantization=null each holds a part" in found["way"]
    path = str(write_config(tmp_path, base=str(EIGHT_B)))
    assert run_command(["plan", path, "--gpu", "24GB", "--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "fits on 1 card\n" in printed and "computed, not measured" in printed
    assert run_command(["plan", path, "--gpu", "24GB", "--link", "3"]) == 2
    assert run_command(["plan", path, "model.device=cpu", "--gpus", "2"]) == 2
    assert "say which GPU with --gpu 80GB" in capsys.readouterr().err


@without_torch
def test_a_plan_imports_no_torch(tmp_path):
    path = write_config(tmp_path, base=str(EIGHT_B))
    code = (
        "import sys; from llmtune.cli import run_command; "
        f"run_command(['plan', {str(path)!r}, '--gpu', '80GB', '--quiet']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_card_is_an_error_that_lists_the_known():
    with pytest.raises(LlmtuneError, match="--gpu 'rtx9999': expected a size .* such as 24GB"):
        given_gpu("rtx9999")
    assert given_gpu("NVIDIA H100").memory_bytes == 80 * GIB


def test_a_gguf_file_is_planned_from_its_head(tmp_path):
    writer = GGUFWriter(tmp_path / "small.gguf", "qwen3")
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_token_list([f"word{index}" for index in range(512)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = read_base(ModelConfig(base=str(tmp_path / "small.gguf")))
    shape = read_shape(base.config, base.place)
    expected = {**small_config("qwen3"), "model_type": "qwen3", "tie_word_embeddings": True}
    assert shape == read_shape(expected, "here")


def test_a_file_that_is_no_gguf_is_an_error(tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGML and more bytes")
    with pytest.raises(LlmtuneError, match="first four bytes are not GGUF"):
        read_base(ModelConfig(base=str(tmp_path / "other.gguf")))


def test_the_rows_are_the_real_ones_where_they_are_there(tmp_path):
    make_model("llama", tmp_path / "base")
    rows = tmp_path / "to_come.jsonl"
    rows.write_text('{"text": "The quick brown fox jumps."}\n{"text": "Paris is the capital."}\n')
    found = plan(load_config(write_config(tmp_path, base=str(tmp_path / "base"))), gpu="8GB")
    assert found.rows.num_rows == 2
    assert found.rows.longest < 40
    assert found.steps == 1
    assert found.tokens == pytest.approx(2 * found.rows.mean, abs=1)


def test_the_documented_table_is_what_the_command_computes_now():
    documented = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8").splitlines()
    printed = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plan_table.py")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    start = documented.index(printed[0])
    assert documented[start : start + len(printed)] == printed
