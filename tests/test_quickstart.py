"""The main job on the real small model and data: slow, run once by continuous integration."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
UNSEEN = ("products", "tweets", "editorials")

pytestmark = pytest.mark.slow


def quickstart(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The user's own cache, and as many threads as there are cores.
    left_out = ("LLMTUNE_CACHE", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    return subprocess.run(
        ["bash", "scripts/quickstart.sh", f"run_dir={run_dir}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The quickstart as a user runs it, with a run directory of its own."""
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    done = quickstart(directory)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "movies" in done.stdout
    return directory


@pytest.fixture(scope="module")
def report(run_dir):
    return json.loads((run_dir / "report.json").read_text())


def test_movies_gain_at_least_ten_points_clear_of_zero(report):
    movies = report["suites"]["movies"]
    assert movies["difference"] >= 0.10
    assert movies["interval"][0] > 0
    assert movies["tuned"] > movies["majority"]


def test_at_least_two_unseen_domains_gain_clear_of_zero(report):
    gains = [name for name in UNSEEN if report["suites"][name]["interval"][0] > 0]
    assert len(gains) >= 2, {name: report["suites"][name]["interval"] for name in UNSEEN}


def test_the_general_suites_are_in_the_report_and_the_base_is_above_chance(report):
    general = report["suites"]["general"]
    assert general["n"] >= 200
    assert general["base"] > 2 * general["chance"]
    assert report["suites"]["passages"]["n"] == 50


def test_the_merged_model_keeps_the_gain(report):
    movies = report["suites"]["movies"]
    assert abs(movies["merged"] - movies["tuned"]) <= 0.05


def test_the_verdict_rests_on_what_stock_transformers_find(run_dir, report, monkeypatch):
    """A short form of scripts/recompute_verdict.py: few items, one by one, of every suite."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from recompute_verdict import recompute

    found = list(recompute(run_dir, None, limit=20))
    assert {each.name for each in found} == report["suites"].keys()
    for each in found:
        # The run scores in bfloat16, which rounds losses and may turn a choice as good as open.
        is_choice = each.ours["metric"] == "accuracy"
        assert each.distance <= (0.3 if is_choice else 0.05), each.as_row()
        assert each.num_same >= 0.75 * 2 * each.n, each.as_row()
        assert abs(each.found["mean"] - each.kept_mean) <= (0.2 if is_choice else 0.03)


def test_peak_memory_stays_under_eight_gigabytes(report):
    assert 0.5e9 < report["peak_bytes"] < 8e9


def test_merged_and_adapter_agree_in_float32(report):
    check = report["merge"]["check"]
    assert check["dtype"] == "float32"
    assert check["num_labels"] == 20
    # Rounding to 16 bits may turn a choice that was as good as open; each is listed with its lead.
    assert check["num_same_labels"] >= 19
    assert all(each["live_margin"] < 0.25 for each in check["label_differences"])
    assert check["num_open_prompts"] == 20
    listed = {each["prompt"] for each in check["divergences"]}
    assert len(listed) == 20 - check["num_same_texts"]
    assert all(each["live_margin"] >= 0 for each in check["divergences"])


def test_stock_libraries_load_adapter_and_merged_model(run_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = json.loads((run_dir / "adapter" / "llmtune_adapter.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(manifest["base"]["path"], dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, run_dir / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "merged")
    messages = [{"role": "user", "content": "Sentence: A warm and funny film.\nSentiment:"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        answers = [model(ids).logits[0, -1].argmax().item() for model in (tuned, merged)]
    assert tokenizer.decode(answers[:1]) == tokenizer.decode(answers[1:]) == "positive"


def test_a_second_call_skips_what_is_finished(run_dir):
    before = json.loads((run_dir / "manifest.json").read_text())["stages"]
    done = quickstart(run_dir)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "manifest.json").read_text())["stages"] == before
    assert done.stderr.count("skipped") == 3
