"""The command line: help, exit codes, one clear line for every mistake, nothing half-written."""

import json
import shutil
import subprocess
import sys

import pytest

from llmtune.cli import cli, run_command
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir
from tests.conftest import write_jsonl
from tests.project import chat_row, make_project

SHORT = ["train.max_steps=2", "evaluate.limit=4"]


@pytest.fixture
def config(tmp_path):
    return make_project(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """Run a command line that must be refused with exit code 2; return its message."""
    capsys.readouterr()
    code = run_command([*arguments, "--quiet"])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err.removeprefix("error: ").strip()


def edited(config, **sections):
    """Lay whole sections over the config file."""
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | sections, indent=1))
    return str(config)


def test_every_command_has_help_with_an_example(capsys):
    for name, command in cli.commands.items():
        assert run_command([name, "--help"]) == 0
        text = capsys.readouterr().out
        if name not in {"config", "data", "suite"}:
            assert f"llmtune {name}" in text.split("Usage:")[1], text
            assert "--json" in text and "--quiet" in text
        assert command.help


@pytest.mark.parametrize("arguments", [["--help"], ["config", "show"], ["config", "schema"]])
def test_light_commands_load_no_torch(config, arguments):
    given = [*arguments, str(config)] if arguments[-1] == "show" else arguments
    program = (
        "import sys\nfrom llmtune.cli import run_command\n"
        f"code = run_command({given!r})\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_run_prints_the_report_and_leaves_everything(config, capsys):
    assert run_command(["run", str(config), *SHORT, "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["suites"]["sentiment"]["n"] == 4
    run_dir = config.parent / "run"
    for name in ("adapter", "merged", "evaluations", "metrics.jsonl", "report.html"):
        assert (run_dir / name).exists(), name
    assert run_command(["report", str(run_dir)]) == 0
    assert "sentiment" in capsys.readouterr().out
    assert run_command(["runs", str(config.parent), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed[0]["state"] == "evaluated" and listed[0]["verdict"] == values["verdict"]


def test_eval_scores_a_run_an_adapter_and_a_model_alone(config, capsys):
    assert run_command(["train", str(config), "train.max_steps=2", "--quiet"]) == 0
    suite = str(config.parent / "sentiment.yaml")
    run_dir = config.parent / "run"
    arms = {}
    for target in (run_dir, run_dir / "adapter", config.parent / "base"):
        capsys.readouterr()
        assert run_command(["eval", str(target), "--suite", suite, "--json", "--quiet"]) == 0
        scores = json.loads(capsys.readouterr().out)["sentiment"]
        arms[target.name] = scores["arms"]
    assert set(arms["run"]) == set(arms["adapter"]) == {"base", "tuned"}
    assert arms["run"] == arms["adapter"]
    assert set(arms["base"]) == {"base"}
    assert arms["base"]["base"] == arms["run"]["base"]


def test_predict_answers_in_order_and_keeps_the_rows(config, tmp_path, capsys):
    assert run_command(["train", str(config), *SHORT, "--quiet"]) == 0
    rows = [
        {"id": 1, "prompt": "The film is warm."},
        {"id": 2, "messages": [{"role": "user", "content": "The plot is dull, and long too."}]},
    ]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    answers = {}
    for arm in ("base", "tuned"):
        output = tmp_path / f"{arm}.jsonl"
        command = ["predict", str(config), "--arm", arm, "--max-new-tokens", "5", "--quiet"]
        assert run_command([*command, "--input", str(prompts), "--output", str(output)]) == 0
        answers[arm] = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["id"] for row in answers[arm]] == [1, 2]
        assert all(isinstance(row["answer"], str) for row in answers[arm])


def test_chat_lets_each_model_have_its_own_history(config, capsys, monkeypatch, tmp_path):
    import io

    from llmtune.scoring.generate import stream_text
    from llmtune.serving import chat

    stopped: list[bool] = []

    def stopped_once(*arguments):
        """Answer as ever, but to the one question that is interrupted."""
        if any("slow" in text for text in asked[-1:]):
            asked.append("")
            yield "half"
            stopped.append(True)
            raise KeyboardInterrupt
        yield from stream_text(*arguments)

    asked, own_answer = [], chat.Chat.answer

    def answer(self, question, arm=None):
        asked.append(question)
        return own_answer(self, question, arm)

    monkeypatch.setattr(chat, "stream_text", stopped_once)
    monkeypatch.setattr(chat.Chat, "answer", answer)
    assert run_command(["train", str(config), *SHORT, "--quiet"]) == 0
    capsys.readouterr()
    rows = tmp_path / "said.jsonl"
    lines = [f"/save {rows}", "The film is warm.", "/base", "And<|im_end|>", "And the plot?",
             "/system Be brief.", "/compare A slow one", "/compare And the cast?", "/system",
             f"/save {tmp_path}/no/x", f"/save {rows}", f"/save {rows}", "/merged", "/help",
             "/nonsense", "/base now", "\udcff", "/clear", "/quit"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    command = ["chat", str(config), "--max-new-tokens", "4", "--json", "--quiet"]
    assert run_command(command) == 0
    captured = capsys.readouterr()
    spoken = [json.loads(line) for line in captured.out.splitlines()]
    assert [turn["model"] for turn in spoken] == ["tuned", "base", "tuned", "tuned", "base"]
    assert stopped and spoken[2]["answer"] == "half"
    for words in (
        "no merged model here",
        "message 1 (user): content holds the control token",
        "/save: nothing was answered yet",
        f"2 rows in {rows}",
        f"/save {rows}: exists already",
        f"/save {tmp_path}/no/x: its directory does not exist",
        "/compare [TEXT]",
        "/nonsense: unknown",
        "/base: takes nothing after it",
        "what you typed is not UTF-8 text",
        "no system prompt",
        "(stopped)",
    ):
        assert words in captured.err, words
    saved = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    questions = [[m["content"] for m in row if m["role"] == "user"] for row in saved]
    assert questions == [
        ["The film is warm.", "A slow one", "And the cast?"],
        ["And the plot?", "And the cast?"],
    ]
    assert all(row[0] == {"role": "system", "content": "Be brief."} for row in saved)
    marks = [[m.get("train") for m in row if m["role"] == "assistant"] for row in saved]
    assert marks == [[False, None, None], [False, None]]  # answered before there was a system
    assert not (tmp_path / "no").exists()
    own = [f"data.train=[{{path: {rows}}}]", "data.evaluation=[]"]
    assert run_command(["data", "check", str(config), *own, "--quiet"]) == 0


def test_the_system_prompt_of_the_data_is_printed_wherever_the_model_is_used(config, capsys):
    from llmtune.config import load_config
    from llmtune.models.chat_template import apply_chat_template, default_system
    from llmtune.runs.targets import resolve_target
    from llmtune.runs.train import TrainStage

    asked = [{"role": "user", "content": "Hello?"}]
    own = [{"role": "system", "content": "Be long."}, *asked]
    system = 'Say "yes".\nBe brief \U0001f600.'
    given = f"data.system={json.dumps(system, ensure_ascii=False)}"
    half = refused(capsys, "data", "check", str(config), f"data.system={json.dumps(system)}")
    assert "half of a character pair" in half
    assert run_command(["data", "check", str(config), given]) == 0
    assert 'system prompt of chats without one: "Say "yes".' in capsys.readouterr().out
    assert run_command(["train", str(config), *SHORT, given, "--quiet"]) == 0
    run = config.parent / "run"
    for target in (run, run / "adapter"):
        tokenizer = resolve_target(str(target)).base.tokenizer
        assert default_system(tokenizer) == system
        text = apply_chat_template(tokenizer, asked)
        assert system in text
        assert text == apply_chat_template(
            tokenizer, [{"role": "system", "content": system}, *asked]
        )
        assert system not in apply_chat_template(tokenizer, own)
    stages = [TrainStage(load_config(config, [*SHORT, *more])) for more in ([], [given])]
    assert len({json.dumps(s.source.tokenizer.chat_template) for s in stages}) == 2
    template = config.parent / "base" / "chat_template.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    said = refused(capsys, "data", "check", str(config), given)
    assert "data.system: the chat template does not print a system prompt" in said


def test_an_answer_does_nothing_to_the_terminal():
    from llmtune.serving.chat import _visible

    assert _visible("\x1b[2J\ta\x9b\r\n") == "\u241b[2J\ta\u241b\u240d\n"


def test_a_line_that_is_not_utf8_is_refused_and_the_next_one_read(config, capfd, monkeypatch):
    import io

    typed = io.TextIOWrapper(io.BytesIO(b"\xe2\n/nonsense\n\xff"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert run_command(["chat", str(config.parent / "base"), "--quiet"]) == 0
    said = capfd.readouterr().err
    assert said.count("not UTF-8 text") == 2 and "/nonsense: unknown" in said


def test_ctrl_c_where_the_user_types_leaves_the_chat(config, capsys, monkeypatch):
    class Interrupted:
        def isatty(self):
            return True

        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert run_command(["chat", str(config.parent / "base"), "--quiet"]) == 0
    assert capsys.readouterr().err == "base model; /help says what you can do.\nyou> \n"


def test_merge_puts_an_adapter_anywhere(config, tmp_path, capsys):
    assert run_command(["train", str(config), *SHORT, "--quiet"]) == 0
    adapter, out = config.parent / "run" / "adapter", tmp_path / "half"
    command = ["merge", str(adapter), "--out", str(out), "--strength", "0.5", "--quiet"]
    assert run_command(command) == 0
    assert (out / "model.safetensors").is_file()
    assert "exists already" in refused(capsys, *command[:-1])
    assert "--out" in refused(capsys, "merge", str(adapter))


def test_config_show_names_the_origin_of_every_value(config, capsys):
    assert run_command(["config", "show", str(config), "adapter.rank=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("adapter.rank: 2" in line and "# override adapter.rank=2" in line for line in lines)
    assert any("train.max_steps: 3" in line and f"# {config}:" in line for line in lines)
    assert any("adapter.dropout: 0.0" in line and "# default" in line for line in lines)


def test_config_schema_knows_every_section(capsys):
    assert run_command(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"model", "adapter", "data", "train", "merge", "evaluate"} <= set(schema["properties"])


def test_data_check_and_show_need_no_model(config, capsys, tmp_path):
    assert run_command(["data", "check", str(config), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert run_command(["data", "show", str(config), "--row", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["line"] == 2
    trained = [label for label in shown["labels"] if label != -100]
    assert trained and trained == shown["input_ids"][-len(trained) - 1 : -1]
    page = tmp_path / "rows.html"
    assert run_command(["data", "show", str(config), "--html", str(page)]) == 0
    assert "http" not in page.read_text()
    assert run_command(["data", "check", str(config), "--quiet", "--html", str(page)]) == 0
    assert "train: the first 48 usable rows" in page.read_text()


def test_data_check_ends_with_one_where_a_run_would_stop(config, capsys):
    rows = config.parent / "train.jsonl"
    rows.write_text(rows.read_text() + '{"messages": []}\n')
    assert run_command(["data", "check", str(config), "--quiet"]) == 1
    assert "train.jsonl:49" in capsys.readouterr().out


def test_init_writes_a_config_that_trains(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "mine.yaml"
    rows = str(config.parent / "train.jsonl")
    command = ["init", rows, "--base", str(config.parent / "base"), "--out", str(out), "--quiet"]
    assert run_command(command) == 0
    assert "exists already" in refused(capsys, *command[:-1])
    overrides = ["train.max_steps=1", "train.num_epochs=null", "model.quantization=null"]
    assert run_command(["train", str(out), *overrides, "--quiet"]) == 0


def test_doctor_looks_at_everything(capsys):
    assert run_command(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    subjects = {finding["subject"] for finding in findings}
    assert {"python", "torch", "memory", "4-bit quantization"} <= subjects


def test_a_missing_base_gives_both_readings(config, capsys):
    said = refused(capsys, "run", str(config), "model.base=no/such/dir/here")
    assert "no/such/dir/here" in said
    assert not (config.parent / "run").exists()


def test_a_hub_id_while_offline_is_one_clear_error(config):
    """In a process of its own, with the hub client believing it is online.

    That it is given up within five seconds is tested with the look-up, without the imports.
    """
    program = (
        "import sys, tests.conftest as c, os, socket\n"
        "socket.socket.connect = c._connect_locally\n"
        "del os.environ['HF_HUB_OFFLINE']\n"
        "from llmtune.cli import run_command\n"
        f"sys.exit(run_command(['train', {str(config)!r}, 'model.base=org/name', '-q']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "org/name" in done.stderr and "Traceback" not in done.stderr
    assert "hub could not be reached" in done.stderr and "offline mode" not in done.stderr


def test_an_unknown_key_names_file_line_and_nearest(config, capsys):
    text = config.read_text().replace('"rank"', '"rnk"')
    config.write_text(text)
    line = next(i for i, each in enumerate(text.splitlines(), 1) if '"rnk"' in each)
    said = refused(capsys, "run", str(config))
    assert f"{config}:{line}: adapter.rnk: unknown key; did you mean adapter.rank?" in said


def test_mistakes_and_missing_words_are_clear_with_an_older_click_too(monkeypatch, capsys):
    monkeypatch.delattr("click.exceptions.NoArgsIsHelpError", raising=False)
    assert "no such file" in refused(capsys, "plan", "gone.yaml")
    assert "No such command" in refused(capsys, "gone")
    assert run_command(["data"]) == 2
    assert "Usage: llmtune data" in capsys.readouterr().err


def test_a_wrong_type_names_what_was_expected(config, capsys):
    said = refused(capsys, "run", str(config), "train.max_steps=many")
    assert "train.max_steps: expected a valid integer, found 'many'" in said


def test_two_mistakes_are_reported_together(config, capsys):
    said = refused(capsys, "run", str(config), "train.max_steps=many", "sed=3")
    assert said.startswith("2 problems:") and "did you mean seed?" in said


def test_a_missing_data_file_is_named_before_the_model_is_loaded(config, capsys):
    said = refused(capsys, "run", str(config), "data.train=[{path: none.jsonl}]")
    assert "none.jsonl" in said
    assert not (config.parent / "run").exists()


def test_a_bad_row_is_named_by_line_and_can_be_dropped(config, capsys):
    rows = config.parent / "train.jsonl"
    lines = rows.read_text().splitlines()
    lines[4] = '{"messages": [{"role": "usr", "content": "x"}]}'
    lines[6] = '{"messages": ['
    rows.write_text("\n".join(lines) + "\n")
    said = refused(capsys, "train", str(config))
    assert "train.jsonl:5" in said and "train.jsonl:7" in said
    assert not (config.parent / "run").exists()
    assert run_command(["train", str(config), *SHORT, "data.on_bad_row=drop", "-q"]) == 0
    manifest = json.loads((config.parent / "run" / "manifest.json").read_text())
    assert manifest["data"]["train"]["rows_kept"] == len(lines) - 2


def test_rows_without_an_assistant_turn_are_refused(config, capsys):
    row = {"messages": [{"role": "user", "content": "only a question"}]}
    write_jsonl(config.parent / "train.jsonl", [row])
    assert "assistant" in refused(capsys, "train", str(config))


def test_rows_that_are_all_too_long_speak_of_length(config, capsys):
    said = refused(capsys, "train", str(config), "data.max_length=4")
    assert "length" in said


def test_another_config_does_not_touch_a_run(config, capsys):
    assert run_command(["train", str(config), *SHORT, "--quiet"]) == 0
    weights = config.parent / "run" / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    said = refused(capsys, "train", str(config), *SHORT, "adapter.rank=2")
    assert "adapter.rank: was 4, is 2" in said and "--force" in said
    assert weights.read_bytes() == before
    assert run_command(["train", str(config), *SHORT, "adapter.rank=2", "--force", "-q"]) == 0
    assert weights.read_bytes() != before


def test_an_adapter_does_not_go_onto_another_base(config, capsys):
    from tests.tiny import make_model

    assert run_command(["train", str(config), *SHORT, "--quiet"]) == 0
    make_model("llama", config.parent / "other", seed=1)
    adapter = config.parent / "run" / "adapter"
    said = refused(
        capsys,
        "eval",
        str(adapter),
        f"model.base={config.parent / 'other'}",
        "--suite",
        str(config.parent / "sentiment.yaml"),
    )
    assert "different base" in said


def test_a_changed_template_is_refused(config, capsys):
    assert run_command(["train", str(config), *SHORT, "--quiet"]) == 0
    template = config.parent / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    said = refused(capsys, "chat", str(config.parent / "run"))
    assert "template" in said


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(config, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "cuda" in refused(capsys, "train", str(config), "model.device=cuda").lower()


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_disk_that_is_full_leaves_a_clear_line(config, capsys, tmp_path, command):
    """On a file system of 1 MiB, where this process may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        said = refused(capsys, command, str(config), *SHORT, f"run_dir={small / 'run'}")
        assert "space" in said or "disk" in said
        assert not (small / "run" / "adapter").exists()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_an_empty_training_file_is_refused(config, capsys):
    (config.parent / "train.jsonl").write_text("")
    assert "train.jsonl" in refused(capsys, "train", str(config))


def test_evaluation_rows_may_not_be_training_rows(config, capsys):
    shared = [chat_row("The film is warm.", "positive")] * 2
    write_jsonl(config.parent / "train.jsonl", shared)
    write_jsonl(config.parent / "validation.jsonl", shared[:1])
    assert "validation.jsonl" in refused(capsys, "train", str(config))


@pytest.mark.parametrize("columns", [20, 40, 80, 160, None])
def test_the_list_of_runs_breaks_no_word_at_any_width(tmp_path, capsys, monkeypatch, columns):
    base = "/models/of/mine/SmolLM2-135M-Instruct.Q4_1.gguf"
    run = RunDir(tmp_path / "a-run-with-a-long-name")
    run.path.mkdir()
    manifest = Manifest(config={"model": {"base": base}}, created="2026-03-04T05:06:07")
    manifest.start("evaluate", "hash", {}).save(run)
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    assert run_command(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for word in (str(run.path), "evaluate unfinished", base, "2026-03-04 05:06"):
        assert word in shown
