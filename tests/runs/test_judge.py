"""An adapter or a model of another tool is judged like a run: same arms, verdict and page."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.evaluation import session
from llmtune.evaluation.main_arms import MAIN_ARMS
from llmtune.io.manifest import read_manifest
from llmtune.io.run_dir import RunDir
from llmtune.planning.devices import Device
from llmtune.runs.judge import RUNS_DIR, Asked, prepare_judgment
from llmtune.runs.targets import resolve_target
from tests.project import make_project

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from recompute_verdict import recompute


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A base, suites, a stock PEFT adapter, and the same adapter merged by PEFT; only read."""
    directory = tmp_path_factory.mktemp("judged")
    make_project(directory)
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    adapted.save_pretrained(directory / "stock" / "adapter")
    adapted.merge_and_unload().save_pretrained(directory / "merged")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(directory / "base" / file, directory / "merged" / file)
    return directory


def judge(project, target, *words):
    suites = [str(project / f"{name}.yaml") for name in ("sentiment", "prose")]
    return run_command(
        ["judge", str(target), *words, "--suites", *suites, "evaluate.bootstrap_samples=1000", "-q"]
    )


def read(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def judged(project):
    """The judgment of the stock adapter; only read."""
    out = project / "judged"
    assert judge(project, project / "stock" / "adapter", "--out", str(out)) == 0
    return out


def test_a_stock_adapter_gets_the_whole_report(judged):
    report = read(judged)
    for suite in report["suites"].values():
        assert suite["compared"] == ["original", "merged"]
        assert None not in [suite[arm] for arm in MAIN_ARMS]
        assert "strength-0.5" in suite["arms"]
    assert report["merge"]["check"]["kl"] < 1e-3
    assert report["diagnostics"]["divergence"] is not None
    assert report["diagnostics"]["contamination"] is None
    how = report["how_to_measure"]
    assert "loss curve" not in how
    assert how["contamination"] == (
        "llmtune judge RUN evaluate.extent=quick data.train='[{path: FILE}]'"
    )
    assert (judged / "report.html").stat().st_size > 1000


def test_the_directory_names_everything_and_a_second_call_measures_nothing(judged, capsys):
    before = read_manifest(RunDir(judged)).stages
    assert run_command(["judge", str(judged), "-q"]) == 0
    assert read_manifest(RunDir(judged)).stages == before
    # It is a target for whatever takes one, but not a run.
    assert resolve_target(str(judged)).arms == ("tuned", "base", "merged")
    assert run_command(["train", str(judged), "-q"]) == 2
    assert "holds a judgment" in capsys.readouterr().err
    assert run_command(["judge", str(judged), "--out", str(judged / "out"), "-q"]) == 2
    assert "--out: " in capsys.readouterr().err


def test_the_merged_model_of_another_tool_equals_the_merge_made_here(project, judged, tmp_path):
    given = ["--merged", str(project / "merged"), "evaluate.extent=none"]
    out = tmp_path / "out"
    assert judge(project, project / "stock" / "adapter", "--out", str(out), *given) == 0
    here, there = (read(each)["suites"]["prose"] for each in (judged, out))
    assert there["merged"] == pytest.approx(here["merged"], abs=1e-4)
    assert not (judged / "merged").is_symlink() and (out / "merged").is_symlink()


def test_a_whole_model_is_compared_with_its_base(project, tmp_path):
    out = tmp_path / "out"
    given = [str(project / "merged"), "--base", str(project / "base"), "--out", str(out)]
    assert judge(project, *given) == 0
    report = read(out)
    prose = report["suites"]["prose"]
    assert prose["compared"] == ["original", "merged"]
    assert prose["base"] is prose["tuned"] is None
    assert prose["merged"] != prose["original"]
    # What it says is what plain loops and stock transformers find.
    found = list(recompute(out, None, None))
    assert {each.name for each in found} == {"sentiment", "prose"}
    for each in found:
        assert each.num_same == 2 * each.n and each.distance < 0.05, each.as_row()
        assert each.found["mean"] == pytest.approx(each.ours["difference"], abs=0.02)
    [limited] = recompute(out, ["prose"], 2)
    assert limited.n == 2 and limited.holds is None
    assert not any("adapter" in name or "tuned" in name for name in report["missing"])
    # doing it again from the start removes the link and leaves the model alone
    assert judge(project, *given, "--force") == 0
    assert (project / "merged" / "config.json").is_file()
    assert read(out)["suites"]["prose"]["merged"] == prose["merged"]


TOOLS = {
    "axolotl": {
        "README.md": "---\nlibrary_name: peft\n---\n",
        "checkpoint-8/adapter_config.json": "{}",
        "checkpoint-8/trainer_state.json": "{}",
    },
    "llama-factory": {
        "all_results.json": "{}",
        "trainer_log.jsonl": "{}\n",
        "training_args.bin": "not read",
        "Modelfile": "FROM .\n",
    },
    "unsloth": {},
}
"""What these tools leave beside the two files of an adapter."""


@pytest.mark.parametrize("tool", TOOLS)
def test_an_adapter_as_each_tool_leaves_it_scores_what_the_stock_one_does(
    project, judged, tmp_path, tool
):
    adapter, out = tmp_path / tool, tmp_path / "out"
    shutil.copytree(project / "stock" / "adapter", adapter)
    for name, text in TOOLS[tool].items():
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text(text)
    config = json.loads((adapter / "adapter_config.json").read_text())
    if tool == "unsloth":  # its bases are quantized copies, and its class is patched
        config["base_model_name_or_path"] = "unsloth/tiny-bnb-4bit"
        config["auto_mapping"] = {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        }
        config["target_modules"] = (
            r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?"
            r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
        )
    else:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(project / "base" / file, adapter / file)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"a_later_key": None}))
    given = ["--base", str(project / "base"), "--no-merge", "evaluate.extent=none"]
    assert judge(project, adapter, "--out", str(out), *given) == 0
    here, there = (read(each)["suites"]["prose"] for each in (judged, out))
    assert there["tuned"] == pytest.approx(here["tuned"], abs=1e-4)


def test_rows_that_are_named_are_looked_for_in_the_suites(project, tmp_path):
    out = tmp_path / "out"
    rows = f"data.train=[{{path: {project / 'train.jsonl'}}}]"
    adapter = project / "stock" / "adapter"
    short = ["--no-merge", "evaluate.strengths=[]", "evaluate.divergence=false"]
    assert judge(project, adapter, "--out", str(out), rows, *short) == 0
    report = read(out)
    assert report["diagnostics"]["contamination"]["n_train_rows"] == 48
    prose = report["suites"]["prose"]
    assert prose["compared"] == ["original", "tuned"] and prose["merged"] is None


def test_an_original_that_does_not_fit_is_said_and_the_quantized_base_takes_its_place(
    project, tmp_path, monkeypatch
):
    monkeypatch.setattr(session, "free_device", lambda name: Device(name, "cpu", 1000))
    adapter, out = project / "stock" / "adapter", tmp_path / "out"
    words = ["--quantization", "nf4", "--no-merge", "evaluate.extent=none"]
    assert judge(project, adapter, "--out", str(out), *words) == 0
    report = read(out)
    assert report["suites"]["prose"]["compared"] == ["base", "tuned"]
    assert "base + adapter against the quantized base (nf4)" in report["compared"]
    assert "what quantization costs is not counted" in report["compared"]
    assert "evaluation of the original base" in report["missing"]
    left_out = read_manifest(RunDir(out)).stages["evaluate"]["result"]["left_out"]
    assert "its weights need" in left_out["original"]


def test_an_adapter_is_found_by_its_hub_id(project, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--org--tuned"
    shutil.copytree(project / "stock" / "adapter", repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = Asked("org/tuned", suites=[str(project / "prose.yaml")])
    judgment = prepare_judgment(asked)
    assert judgment.judged.adapter == (repo / "snapshots" / ("a" * 40)).resolve()
    assert judgment.model.base == str(project / "base")
    assert judgment.run_dir == RUNS_DIR / "tuned-judged"
    with pytest.raises(LlmtuneError, match="org/nowhere: no such local path"):
        prepare_judgment(replace(asked, name="org/nowhere"))


def test_the_template_inside_an_adapters_tokenizer_is_what_both_are_asked_in(project, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(project / "stock" / "adapter", adapter)
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    judgment = prepare_judgment(Asked(str(adapter), suites=[str(project / "sentiment.yaml")]))
    assert judgment.model.chat_template.read_text() == template


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{p}/merged"], "say which model it was made from: --base"),
        (["{p}/merged", "--base", "{p}/base", "--no-merge"], "--no-merge: is for adapters"),
        (["{p}/stock/adapter", "--base", "{p}/base", "train.max_steps=3"], "train"),
        (["{p}/config.yaml"], "llmtune run"),
        (["{p}/nowhere", "--base", "{p}/base"], "nowhere"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_written(
    project, tmp_path, capsys, words, said
):
    words = [word.format(p=project) for word in words]
    assert judge(project, *words, "--out", str(tmp_path / "out")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_suites_it_says_what_writes_them(project, capsys):
    assert run_command(["judge", str(project / "stock" / "adapter")]) == 2
    assert "llmtune init --eval" in capsys.readouterr().err
