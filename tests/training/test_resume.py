"""A run that was stopped continues as if it had not been, or says why it cannot."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

from llmtune.adapters.config import METHODS
from llmtune.adapters.inject import inject_adapter
from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.io.run_dir import RunDir
from llmtune.training import checkpoint as checkpoints
from llmtune.training.step import TrainingStep
from llmtune.training.train import train_adapter
from llmtune.training.trainer import AdapterTrainer
from tests.tiny import make_model
from tests.training.tiny_runs import (
    adapter_weights,
    make_adapter,
    make_config,
    make_request,
    make_rows,
)

KNOBS = {"max_steps": 8, "save_every": 2, "keep_checkpoints": 10, "schedule": "cosine"}


def run(path, *, dropout=0.1, identity=None, rows=None, **knobs):
    model = make_adapter(dropout=dropout)
    request = make_request(
        model,
        path,
        train=rows or make_rows(20),
        evaluation=make_rows(4, seed=5),
        identity=identity or {"data": "d", "base": "b"},
        quiet=False,
    )
    result = train_adapter(make_config(**(KNOBS | {"eval_every": 3} | knobs)), request)
    return result, adapter_weights(model)


def forget_after(path, step):
    """Leave a run as a kill right after the checkpoint of `step` would."""
    for checkpoint in checkpoints.list_checkpoints(path / "checkpoints"):
        if checkpoints.step_of(checkpoint) > step:
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# Steps of 8 over 20 rows: 3 steps an epoch, so 4 is inside an epoch and 6 at the end of one.
@pytest.mark.parametrize("step", [4, 6])
def test_a_continued_run_equals_a_straight_one_bit_for_bit(step, tmp_path):
    straight, weights = run(tmp_path)
    lines = metrics(tmp_path)
    forget_after(tmp_path, step)
    continued, again = run(tmp_path)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (continued.tokens, continued.trained_tokens) == (
        straight.tokens,
        straight.trained_tokens,
    )
    assert continued.final_loss == straight.final_loss
    losses = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in lines]
    assert losses == [
        (line["step"], line.get("loss"), line.get("eval_loss")) for line in metrics(tmp_path)
    ]


METHOD_KNOBS = {"miss": {"rank": 24}, "shira": {"rank": 4}, "vera": {"rank": 16}}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name())
def test_every_method_continues_bit_for_bit(method, tmp_path):
    def train():
        torch.manual_seed(0)
        targets = {"layers": "last-1", "target_modules": ["q_proj", "down_proj"]}
        adapter = method(**targets, **METHOD_KNOBS.get(method.name(), {}))
        model, _ = inject_adapter(make_model("llama"), adapter)
        config = make_config(max_steps=4, batch_size=2, save_every=2, keep_checkpoints=5)
        train_adapter(config, make_request(model, tmp_path, train=make_rows(4, longest=12)))
        return adapter_weights(model), get_peft_model_state_dict(model, save_embedding_layers=False)

    straight, saved = train()
    forget_after(tmp_path, 2)
    continued, again = train()
    assert straight.keys() == continued.keys() and saved.keys() == again.keys()
    assert all(torch.equal(straight[name], continued[name]) for name in straight)
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, weights = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    second, again = run(tmp_path)
    assert second.steps == first.steps == 8
    assert second.final_loss == first.final_loss
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_resume_never_starts_anew(tmp_path, capsys):
    run(tmp_path)
    run(tmp_path, resume="never")
    assert "continuing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "checksums.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "delete", "flip"])
def test_a_damaged_checkpoint_is_passed_over_and_named(name, damage, tmp_path):
    directory = tmp_path / "checkpoints"
    for step in (2, 4):
        checkpoints.write_checkpoint(checkpoints.checkpoint_dir(directory, step), write_some_files)
    file = directory / "checkpoint-4" / name
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()
    said = []
    found = checkpoints.find_checkpoint(directory, {"data": "d"}, said.append)
    assert found.name == "checkpoint-2"
    assert "checkpoint-4 is damaged" in said[0]


def write_some_files(directory: Path) -> None:
    for name in ("optimizer.pt", "adapter_model.safetensors", "trainer_state.json"):
        (directory / name).write_bytes(os.urandom(300))
    (directory / "llmtune.json").write_text(json.dumps({"identity": {"data": "d"}}))


def test_training_falls_back_to_the_checkpoint_before_a_damaged_one(tmp_path, capsys):
    _, weights = run(tmp_path)
    forget_after(tmp_path, 6)
    (tmp_path / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    _, again = run(tmp_path)
    said = capsys.readouterr().err
    assert "checkpoint-6 is damaged" in said
    assert "continuing after step 4" in said
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_damaged_checkpoints_are_not_kept_in_the_place_of_whole_ones(tmp_path):
    for step in (6, 8):
        checkpoints.write_checkpoint(checkpoints.checkpoint_dir(tmp_path, step), write_some_files)
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    said = []
    assert checkpoints.find_checkpoint(tmp_path, {"data": "d"}, said.append) is None
    assert "checkpoint-8 is damaged" in said[0] and "checkpoint-6 is damaged" in said[1]
    assert "no whole checkpoint: training starts over" in said[2]
    for step in (2, 4, 7):
        newest = checkpoints.checkpoint_dir(tmp_path, step)
        checkpoints.write_checkpoint(newest, write_some_files)
        checkpoints.remove_old_checkpoints(newest, keep=2, best_step=2)
        assert checkpoints.find_checkpoint(tmp_path, {"data": "d"}, print) == newest
    assert {path.name for path in tmp_path.iterdir()} == {
        f"checkpoint-{step}" for step in (2, 4, 7)
    }


def test_other_data_and_another_base_are_refused_by_name(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(LlmtuneError, match="a different base and a different data"):
        run(tmp_path, max_steps=2, identity={"data": "x", "base": "y"})


def test_another_batch_size_is_refused_but_another_micro_batch_is_not(tmp_path):
    run(tmp_path, max_steps=4)
    forget_after(tmp_path, 2)
    with pytest.raises(LlmtuneError, match="a different training section or seed"):
        run(tmp_path, max_steps=4, batch_size=4)
    run(tmp_path, max_steps=4, micro_batch_size=2)


def test_only_the_newest_and_the_best_checkpoints_stay(tmp_path):
    stopping = {"patience": 50}
    result, _ = run(tmp_path, keep_checkpoints=1, early_stopping=stopping, learning_rate=0.3)
    kept = {path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")}
    assert kept == {"checkpoint-8", Path(result.best_checkpoint).name}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_continues_exactly(number, tmp_path, monkeypatch):
    _, weights = run(tmp_path / "straight", max_steps=12, save_every=100)
    step, begun = AdapterTrainer.training_step, []

    def interrupted(self, *inputs):
        begun.append(self)
        if len(begun) == 5:
            os.kill(os.getpid(), number)
        return step(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(AdapterTrainer, "training_step", interrupted)
        with pytest.raises(RunInterrupted, match=signal.Signals(number).name) as caught:
            run(tmp_path / "cut", max_steps=12, save_every=100)
    assert caught.value.exit_code == 3
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path / "cut" / "checkpoints")
    assert checkpoints.step_of(checkpoint) == len(begun) == 5
    _, again = run(tmp_path / "cut", max_steps=12, save_every=100)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


WATCHED = {
    "max_steps": 7,
    "save_every": 100,
    "keep_checkpoints": 2,
    "log_every": 3,
    "eval_every": 2,
    "early_stopping": {"patience": 2, "min_delta": 0.05},
}
LASTING = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trained_tokens")
LASTING_RESULT = ("steps", "tokens", "trained_tokens", "final_loss", "final_eval_loss")


def run_watched(path, **knobs):
    """Return everything that decides a report: the result, the weights and the lines of metrics."""
    source = [replace(row, source_index=line % 2) for line, row in enumerate(make_rows(20))]
    model = make_adapter(dropout=0.1)
    request = make_request(model, path, train=source, evaluation=make_rows(4, seed=5))
    result = train_adapter(make_config(**WATCHED | knobs), request)
    lines = [
        {
            name: value
            for name, value in line.items()
            if name in LASTING or name.startswith(("loss/", "eval_loss"))
        }
        for line in metrics(path)
    ]
    chosen = {name: getattr(result, name) for name in (*LASTING_RESULT, "best_checkpoint")}
    return chosen | {"stopped_by": result.stopped_by}, adapter_weights(model), lines


@pytest.fixture(scope="module", params=[0.02, 0.3], ids=["to the end", "stopped early"])
def uninterrupted(request, tmp_path_factory):
    return request.param, run_watched(tmp_path_factory.mktemp("run"), learning_rate=request.param)


def interrupt(monkeypatch, where: str, count: int) -> None:
    """Send SIGTERM in the step, or during the evaluation, of this number."""
    seen = []
    name = {"step": "run", "evaluation": "_evaluate_rows"}[where]
    original = getattr(TrainingStep, name)

    def interrupted(self, *args, **options):
        seen.append(self)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(TrainingStep, name, interrupted)


@pytest.mark.parametrize(
    ("where", "count"),
    [*(("step", step) for step in range(1, 8)), ("evaluation", 1), ("evaluation", 3)],
)
def test_a_run_interrupted_anywhere_equals_an_uninterrupted_one(
    where, count, uninterrupted, tmp_path, monkeypatch
):
    learning_rate, (result, weights, lines) = uninterrupted
    with monkeypatch.context() as patched:
        interrupt(patched, where, count)
        with contextlib.suppress(RunInterrupted):
            run_watched(tmp_path, learning_rate=learning_rate)
    again, same_weights, same_lines = run_watched(tmp_path, learning_rate=learning_rate)
    assert again == result
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert same_lines == lines


def test_patience_that_ends_with_the_last_step_does_not_end_an_interrupted_run_early(
    tmp_path, monkeypatch
):
    knobs = {"max_steps": 4, "early_stopping": {"patience": 1, "min_delta": 100.0}}
    straight = run_watched(tmp_path / "straight", **knobs)
    with monkeypatch.context() as patched, pytest.raises(RunInterrupted):
        interrupt(patched, "step", 4)
        run_watched(tmp_path / "cut", **knobs)
    again = run_watched(tmp_path / "cut", **knobs)
    assert straight[0]["stopped_by"] == "max_steps"
    assert (again[0], again[2]) == (straight[0], straight[2])


def test_an_evaluation_that_is_interrupted_twice_is_still_made_up(
    uninterrupted, tmp_path, monkeypatch
):
    learning_rate, (result, weights, lines) = uninterrupted
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(RunInterrupted):
            interrupt(patched, "evaluation", 1)
            run_watched(tmp_path, learning_rate=learning_rate)
    again, same_weights, same_lines = run_watched(tmp_path, learning_rate=learning_rate)
    assert (again, same_lines) == (result, lines)
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_a_full_disk_is_one_clear_message_and_keeps_the_last_checkpoint(tmp_path):
    directory = tmp_path / "checkpoints"
    checkpoints.write_checkpoint(checkpoints.checkpoint_dir(directory, 2), write_some_files)

    def write_too_much(target: Path) -> None:
        torch.save(torch.zeros(1 << 18), target / "optimizer.pt")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(LlmtuneError, match=r"checkpoint-4: .* its end. [\d,]+ bytes are free"):
            checkpoints.write_checkpoint(checkpoints.checkpoint_dir(directory, 4), write_too_much)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.find_checkpoint(directory, {"data": "d"}, print).name == "checkpoint-2"
    assert [path.name for path in directory.iterdir()] == ["checkpoint-2"]


def test_a_failure_that_is_not_the_disks_is_not_blamed_on_it(tmp_path):
    def fail(directory: Path) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        checkpoints.write_checkpoint(checkpoints.checkpoint_dir(tmp_path, 1), fail)
    assert not list(tmp_path.iterdir())


KILLED_WRITER = """
import sys, pathlib, json, os
from llmtune.training import checkpoint
def write(directory):
    for name in ("a.bin", "b.bin", "c.bin"):
        (directory / name).write_bytes(os.urandom(200_000))
    (directory / "llmtune.json").write_text(json.dumps({"identity": {"data": "d"}}))
root = pathlib.Path(sys.argv[1])
for step in range(1, 100_000):
    newest = checkpoint.checkpoint_dir(root, step)
    checkpoint.write_checkpoint(newest, write)
    checkpoint.remove_old_checkpoints(newest, keep=2, best_step=None)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n"
    for attempt in range(20):
        time.sleep(0.003 + 0.0017 * attempt)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # until it stands still
        # A stopped process is a killed one as far as the disk can tell.
        whole = 0
        for found in checkpoints.list_checkpoints(tmp_path):
            try:
                checkpoints.check_files(found)
                whole += 1
            except (checkpoints.DamagedCheckpointError, FileNotFoundError):
                continue
        assert whole >= 1
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert checkpoints.find_checkpoint(tmp_path, {"data": "d"}, print) is not None


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    from llmtune.training.metrics import MetricsLog

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    log = MetricsLog(path, resumed_step=1)
    log.write({"step": 2, "loss": float("nan")})
    log.close()
    assert metrics(RunDir(tmp_path).path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
