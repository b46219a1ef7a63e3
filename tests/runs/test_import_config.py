"""Configs of other tools become ours: every key is taken, or named with why not."""

import json
from pathlib import Path

import pytest
import yaml

from llmtune.cli import run_command
from llmtune.config import load_config
from llmtune.runs.import_config import import_config
from tests.conftest import write_jsonl
from tests.tiny import make_model

FOREIGN = Path(__file__).parent / "foreign"
FILES = sorted(path.name for path in FOREIGN.iterdir())
ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("foreign")
    make_model("llama", directory / "base")
    write_jsonl(directory / "rows.jsonl", ROWS)
    (directory / "data").mkdir()
    (directory / "data" / "more.json").write_text(json.dumps(ROWS))
    info = {"rows": {"file_name": "../rows.jsonl", "columns": {"prompt": "instruction"}}}
    (directory / "data" / "dataset_info.json").write_text(json.dumps(info))
    for name in FILES:
        text = (FOREIGN / name).read_text(encoding="utf-8").replace("BASE", "base")
        (directory / name).write_text(text)
    return directory


@pytest.mark.parametrize("name", FILES)
def test_a_whole_qlora_file_is_imported_planned_and_every_key_is_accounted_for(
    folder, monkeypatch, capsys, name
):
    monkeypatch.chdir(folder)
    assert run_command(["config", "import", name, "--out", "no/mine.yaml"]) == 2
    assert not Path("no").exists()
    assert run_command(["config", "import", name, "--out", "mine.yaml", "--force", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    config = load_config("mine.yaml")
    assert config.model.base == "base" and config.model.quantization_method == "nf4"
    assert config.adapter.target_modules == "all-linear"
    text = Path("mine.yaml").read_text()
    given = yaml.safe_load(Path(name).read_text())
    for key, value in given.items():
        parts = {"load_in_8bit", "load_in_4bit", "use_peft", "stage", "finetuning_type"}
        parts |= {"chat_template", "template", "eval_strategy", "use_bnb_nested_quant"}
        parts |= {"bf16", "max_samples", "adapter", "lora_target_linear"}
        assert value is None or key in text or key in parts, key
    assert run_command(["plan", "mine.yaml", "data.train=[{path: rows.jsonl}]"]) in (0, 1)
    assert "memory" in capsys.readouterr().out
    assert said["skipped"] and said["changed"]


def test_values_are_what_the_files_say(folder, monkeypatch):
    monkeypatch.chdir(folder)
    axolotl, factory, trl = (import_config(Path(name)).values for name in FILES)
    assert axolotl["train.batch_size"] == 8 and trl["train.batch_size"] == 16
    assert axolotl["data.length_policy"] == "drop" and axolotl["data.packing"] == "on"
    assert axolotl["train.learning_rates"] == {"lora_B": 0.0032}
    assert [one["path"] for one in axolotl["data.train"]] == ["rows.jsonl", "org/chats"]
    assert factory["adapter.rank"] == 8 and factory["train.num_epochs"] == 3
    assert [Path(one["path"]).name for one in factory["data.train"]] == ["rows.jsonl", "more.json"]
    assert factory["data.train"][0]["limit"] == 1000
    assert factory["train.eval_every"] == 500 and factory["data.evaluation_share"] == 0.1
    assert trl["model.quantization"]["double_quant"] is True
    assert trl["data.loss_on"] == "assistant" and trl["train.optimizer"] == "paged_adamw_8bit"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n", "not a config that can be imported"),
        ("base_model: b\nsequence_len: 9\ndatasets: [{path: a}]\n", "trains all weights"),
        ("base_model: b\nsequence_len: 9\ndatasets: []\nadapter: lora\nrl: dpo\n", "no DPO"),
        ("model_name_or_path: b\nstage: sft\ntemplate: x\n", "data.train"),
        ("[1]\n", "expected `key: value` lines"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert run_command(["config", "import", str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["a.yaml"]


def test_a_foreign_config_and_foreign_names_are_recognized(folder, tmp_path, capsys):
    for name, title in zip(FILES, ("axolotl", "LLaMA-Factory", "TRL"), strict=True):
        if name.endswith(".yaml"):
            assert run_command(["plan", str(folder / name)]) == 2
            said = capsys.readouterr().err
            assert title in said and "llmtune config import" in said and said.count("\n") == 1
    ours = {
        "run_dir": "r",
        "model": {"base": "b"},
        "adapter": {"method": "lora", "lora_r": 8},
        "data": {"train": [{"path": "a"}], "cutoff_len": 9, "template": "x"},
        "train": {"per_device_train_batch_size": 2, "lr": 1},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(ours))
    assert run_command(["config", "show", str(path)]) == 2
    said = capsys.readouterr().err
    for words in ("lora_r is adapter.rank", "data.max_length", "chat template", "train.batch_size"):
        assert words in said


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("finetuning_type: oft\noft_block_size: 16\nlora_rank: 8\n",
         {"adapter.method": "oft", "adapter.block_size": 16}),
        ("finetuning_type: lora\npissa_init: true\nlora_rank: 8\n",
         {"adapter.init": "pissa_niter_16", "adapter.rank": 8}),
        ("finetuning_type: lora\npissa_init: true\npissa_iter: -1\n", {"adapter.init": "pissa"}),
        ("finetuning_type: lora\ndefault_system: Be kind.\n", {"data.system": "Be kind."}),
    ],
)  # fmt: skip
def test_methods_and_starts_are_taken(tmp_path, text, values):
    path = tmp_path / "factory.yaml"
    path.write_text(f"model_name_or_path: b\nstage: sft\ntemplate: x\ndataset: d\n{text}")
    found = import_config(path).values

    taken = {key: found[key] for key in found if key.startswith(("adapter.", "data.system"))}
    assert taken == values
