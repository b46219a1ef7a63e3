"""`torchrun -m llmtune train`: one run in several processes, killed, stopped and continued."""

import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file

from llmtune import cli
from llmtune.config import load_config
from llmtune.errors import LlmtuneError, ProcessLost
from llmtune.evaluation import sharing
from llmtune.evaluation.run import score_items
from llmtune.io import lifelines, processes, store_talk
from llmtune.models.live import ModelIdentity
from llmtune.runs import pipeline
from llmtune.training import adapt, trainer
from llmtune.training import train as training
from llmtune.training.checkpoint import write_checkpoint
from tests.processes import Started, fork, free_port, run_command, wait_for
from tests.project import make_project

STEPS = {"learning_rate": 5e-3, "max_steps": 16, "batch_size": 6, "save_every": 4}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("project")
    model = {"base": str(directory / "base"), "dtype": "float32"}
    replayed = {"replay": {"source": str(directory / "prose.jsonl"), "share": 0.1}}
    return make_project(directory, model=model, train=STEPS, protect=replayed)


@pytest.fixture(scope="module")
def whole(project):
    """The adapter of one process that trains from the first step to the last."""
    assert train(project, 1, "whole").wait() == [0]
    return adapter(project, "whole")


def adapter(project, run):
    return load_file(project.parent / run / "adapter/adapter_model.safetensors")


def train(project, count, run, before_step=None, *settings):
    arguments = ["train", str(project), f"run_dir={project.parent / run}", *settings]
    return run_command(project.parent / f"{run}-out", count, arguments, before_step=before_step)


def send(number, *, to, after):
    """Return what sends a signal to one process before a step."""

    def before_step(rank, steps_done):
        if rank == to and steps_done == after:
            os.kill(os.getpid(), number)

    return before_step


def killed_after_some_items(*asked):
    """Score as ever in the first process; in the second one the machine ends it."""
    if processes.joined_processes().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return score_items(*asked)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def test_a_run_that_is_killed_and_stopped_continues_on_any_number_of_processes(project, whole):
    folder = project.parent
    killed = train(project, 2, "parts", send(signal.SIGKILL, to=1, after=6))
    assert killed.wait() == [3, -9]
    assert "ended without a message" in killed.output(0)
    assert killed.output(0).count("error:") == 1

    stopped = train(project, 1, "parts", send(signal.SIGTERM, to=0, after=8))
    assert stopped.wait() == [3]
    assert "continuing after step 4 of 16" in stopped.output(0)
    assert "stopped by SIGTERM after step 9 of 16" in stopped.output(0)

    # one process hears the signal in the last step, and both leave its evaluation to the next call
    stopped = train(project, 2, "parts", send(signal.SIGTERM, to=1, after=15))
    assert stopped.wait() == [3, 3]
    outputs = stopped.output(0) + stopped.output(1)
    assert outputs.count("stopped by SIGTERM after step 16 of 16") == 1
    ended = train(project, 2, "parts")
    assert ended.wait() == [0, 0]
    assert "2 share the rows of each step" in ended.output(0)
    assert "train data" not in ended.output(1)

    parts = adapter(project, "parts")
    assert max((whole[key] - parts[key]).abs().max().item() for key in whole) < 1e-5
    for one, other in zip(losses(folder / "whole"), losses(folder / "parts"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    manifests = [
        json.loads((folder / run / "manifest.json").read_text())["stages"]["train"]
        for run in ("whole", "parts")
    ]
    for key in ("steps", "tokens", "trained_tokens", "order_hash"):
        assert manifests[0]["result"][key] == manifests[1]["result"][key]


def test_all_that_are_stopped_wait_until_the_checkpoint_is_written(project, monkeypatch):
    def write_slowly(*given):
        time.sleep(1.5)
        write_checkpoint(*given)

    monkeypatch.setattr(trainer, "write_checkpoint", write_slowly)
    monkeypatch.setattr(lifelines, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(lifelines, "NOTICED_SECONDS", 0.3)
    stopped = train(project, 2, "slow", send(signal.SIGTERM, to=1, after=1))
    assert stopped.wait() == [3, 3]
    assert "ended without a message" not in stopped.output(0)
    assert (project.parent / "slow/checkpoints/checkpoint-2").is_dir()


def test_a_sharded_run_that_is_killed_continues_sharded_or_not_and_is_scored_by_parts(
    project, whole
):
    killed = train(project, 2, "cut", send(signal.SIGKILL, to=1, after=5), "train.shard=full")
    assert killed.wait() == [3, -9]
    assert "ended without a message" in killed.output(0)
    assert killed.output(0).count("error:") == 1 and "Traceback" not in killed.output(0)
    assert "layers are in each of 2 processes" in killed.output(0)

    stopped = train(project, 1, "cut", send(signal.SIGTERM, to=0, after=8), "train.shard=full")
    assert stopped.wait() == [3]
    assert "continuing after step 4 of 16" in stopped.output(0)

    # the second process lends its part of every layer to what the first one scores and writes
    run = project.parent / "cut"
    settings = [f"run_dir={run}", "train.shard=full", "evaluate.reuse_base=false"]
    ended = run_command(project.parent / "cut-out", 2, ["run", str(project), *settings])
    assert ended.wait() == [0, 0], ended.output(0) + ended.output(1)
    assert "has a part of every layer, and the first one scores" in ended.output(0)
    assert "answers ended by themselves" in ended.output(0)
    found = {path.name: json.loads(path.read_text()) for path in run.glob("evaluations/*.json")}
    texts, diagnostics = (run / "generations.json").read_text(), list_names(run / "diagnostics")
    arms = assert_as_in_one_process(run, found, load_config(project, settings))
    assert arms >= {"base", "tuned", "merged"}
    assert json.loads((run / "generations.json").read_text()) == json.loads(texts)
    assert list_names(run / "diagnostics") == diagnostics

    cut = adapter(project, "cut")
    assert max((whole[key] - cut[key]).abs().max().item() for key in whole) < 1e-5
    for one, other in zip(
        losses(project.parent / "whole"), losses(project.parent / "cut"), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-4)
    config = json.loads((project.parent / "cut" / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(project.parent / "base")


def test_an_error_in_one_process_ends_all_with_its_message_and_code(project):
    def fail(rank, steps_done):
        if rank == 1:
            raise LlmtuneError("no room here")

    failed = train(project, 2, "failed", fail)
    assert failed.wait() == [2, 2]
    assert "error: process 1 of 2: no room here" in failed.output(1)
    assert "error:" not in failed.output(0)


def kill_in(rank, function):
    """Return what ends one process where it would call a function."""

    def killed(*given, **named):
        if processes.joined_processes().rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)

    return killed


@pytest.mark.slow
def test_kills_at_any_moment_end_all_and_lose_nothing(project, monkeypatch):
    """In loading, in a step, in writing a checkpoint, and in saving the adapter."""
    assert train(project, 2, "twin").wait() == [0, 0]
    kills = [
        (1, training, "set_up", None),
        (0, trainer, "atomic_write_json", None),  # the weights are written, the checkpoint is not
        (0, None, "", send(signal.SIGKILL, to=0, after=6)),
        (0, adapt, "save_adapter", None),
    ]
    for victim, module, name, before_step in kills:
        with monkeypatch.context() as patch:
            if module is not None:
                patch.setattr(module, name, kill_in(victim, getattr(module, name)))
            killed = train(project, 2, "killed", before_step)
            codes = killed.wait()
        said = f"{name} in process {victim}: {codes}\n{killed.output(0)}\n{killed.output(1)}"
        assert codes[victim] == -9 and codes[1 - victim] == 3, said
        assert "Traceback" not in said
    assert train(project, 2, "killed").wait() == [0, 0]
    wanted, found = adapter(project, "twin"), adapter(project, "killed")
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)  # the very same bits


def test_a_call_from_python_in_several_processes_is_refused(project, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LlmtuneError, match="torchrun --nproc-per-node 2 -m llmtune run"):
        pipeline.train(load_config(project, [f"run_dir={project.parent / 'refused'}"]))
    assert not (project.parent / "refused").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is not set: start the command by torchrun"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2; expected 0 to 1"),
        ({"RANK": "x"}, "RANK is 'x', not a number"),
        ({"MASTER_PORT": "99999"}, "could not meet at 127.0.0.1:99999"),
    ],
)
def test_launcher_variables_that_cannot_be_are_said_at_once(monkeypatch, capsys, changed, message):
    keys = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    keys |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411"}
    keys |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # not left behind
    for key, value in (keys | changed).items():
        monkeypatch.setenv(key, value)
    assert cli.run_command(["train", "nowhere.yaml"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_what_the_cards_refuse_is_not_taken_for_a_killed_process(monkeypatch):
    monkeypatch.setattr(store_talk, "FAILURE_SECONDS", 0.1)
    one = processes.Processes(dist.HashStore(), rank=0, world_size=2, num_here=2)
    with (
        pytest.raises(ProcessLost, match="could not work together .*Duplicate GPU detected"),
        one._heeding(),
    ):
        raise dist.DistBackendError("NCCL error:\nDuplicate GPU detected")


def test_a_store_that_has_ended_with_its_process_is_one_clear_failure(monkeypatch):
    class EndedStore(dist.HashStore):
        def set(self, *_):
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr(store_talk, "FAILURE_SECONDS", 0.1)
    one = processes.Processes(EndedStore(), rank=0, world_size=2, num_here=2)
    for tell in (lambda: one.send(1, {"items": []}), one.end, one._come_together):
        with pytest.raises(ProcessLost, match="ended without a message"):
            tell()


def test_nobody_waits_at_the_end_for_what_is_gone(tmp_path, monkeypatch):
    """The first process for another one that was killed, and that one for the first's machine."""

    def end():
        joined = processes.join_processes()
        monkeypatch.setattr(joined, "_leave", lambda: os.kill(os.getpid(), signal.SIGKILL))
        joined.end() if joined.is_first else list(joined.orders())
        return 0

    started = time.monotonic()
    assert Started(tmp_path / "killed", 2, end).wait() == [0, -9]
    assert time.monotonic() - started < 15

    class StoreOfGoneMachine(dist.HashStore):
        def check(self, *_):
            time.sleep(60)

    def notice():
        processes.Processes(StoreOfGoneMachine(), 1, 2, 1)._end_at_once()

    monkeypatch.setattr(store_talk, "FAILURE_SECONDS", 0.1)
    monkeypatch.setattr(store_talk, "STORE_SECONDS", 0.1)
    gone = fork(tmp_path / "gone.txt", notice, {})
    assert wait_for([gone], 30) == [3]
    assert "ended without a message" in (tmp_path / "gone.txt").read_text()


def test_a_process_that_loads_another_model_than_the_first_one_scores_is_refused():
    first = ModelIdentity("base", "new", "float32", "none")
    share = {"model": "tuned", "dtype": "float32", "identity": first.as_dict()}
    asked: Any = SimpleNamespace(receive=lambda _: share)
    loaded: Any = SimpleNamespace(identity=replace(first, adapter="old"))
    with pytest.raises(LlmtuneError, match="put run_dir on a disk that all machines share"):
        sharing.help_scoring(asked, [], {}, lambda name, dtype: loaded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["eval", "runs/mine"], "works in one process, and 2 were started"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_once(tmp_path, arguments, message):
    started = run_command(tmp_path, 2, arguments)
    assert started.wait() == [2, 2]
    assert message in started.output(0)
    assert not started.output(1)


def ask_accelerate(monkeypatch, *arguments):
    """Return what accelerate gives to torchrun, with its variables set here."""
    given = []

    def take(args):
        given.append(args)
        for key, value in os.environ.items():
            if key.startswith("ACCELERATE_"):
                kept[key] = value

    kept = {}
    monkeypatch.setattr("torch.distributed.run.run", take)
    launch = ["--main_process_port", "0", "--mixed_precision", "bf16", *arguments]
    launch_command(launch_command_parser().parse_args([*launch, "-m", "llmtune", "train", "x"]))
    for key, value in kept.items():
        monkeypatch.setenv(key, value)
    return given[0]


def test_accelerate_launch_changes_nothing_but_the_number_of_processes(project, monkeypatch):
    short = "train.max_steps=2"
    assert train(project, 1, "plain", None, short).wait() == [0]
    given = ask_accelerate(monkeypatch, "--multi_gpu", "--num_processes", "2")
    assert given.module and given.training_script == "llmtune"
    assert given.training_script_args == ["train", "x"] and given.nproc_per_node == "2"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    # its precision is not taken for ours, in two processes and in one
    assert train(project, 2, "two", None, short).wait() == [0, 0]
    assert train(project, 1, "one", None, short).wait() == [0]
    plain = losses(project.parent / "plain")
    for run in ("two", "one"):
        for found, wanted in zip(losses(project.parent / run), plain, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)
    ask_accelerate(monkeypatch, "--use_fsdp", "--num_processes", "2")
    refused = train(project, 2, "refused")
    assert refused.wait() == [2, 2]
    assert "accelerate is set to use FSDP" in refused.output(0)
    assert "set train.shard=full" in refused.output(0)


def start_agent(directory, node, port, arguments):
    """Start torchrun's agent of one of two machines, forked, as its processes are."""

    def work():
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        launch = LaunchConfig(
            min_nodes=2,
            max_nodes=2,
            nproc_per_node=1,
            run_id="two",
            rdzv_backend="c10d",
            rdzv_endpoint=f"127.0.0.1:{port}",
            local_addr="127.0.0.1",
            start_method="fork",
            monitor_interval=0.1,
        )
        return max(elastic_launch(launch, cli.run_command)(arguments).values())

    return fork(directory / f"node-{node}.txt", work, {"OMP_NUM_THREADS": "1"})


def test_two_torchrun_nodes_that_find_each_other_do_one_run(project):
    folder = project.parent
    arguments = ["run", str(project), f"run_dir={folder / 'nodes'}", "train.max_steps=4"]
    port = free_port()
    codes = wait_for([start_agent(folder, node, port, arguments) for node in range(2)])
    outputs = [(folder / f"node-{node}.txt").read_text() for node in range(2)]
    assert codes == [0, 0], "\n".join(outputs)
    assert sum("2 share the rows of each step" in output for output in outputs) == 1
    assert (folder / "nodes" / "report.html").is_file()


def test_the_items_of_all_arms_are_shared_and_scored_as_in_one_process(project, monkeypatch):
    """Choices, written answers, documents, demonstrations and a prompt of the user's own."""
    run, prompt = project.parent / "shared", project.parent / "mine.jinja"
    prompt.write_text("Decide. {{ prompt }}")
    settings = [
        f"run_dir={run}",
        "train.max_steps=1",
        "evaluate.extent=none",
        "evaluate.strengths=[0.5]",
        "evaluate.few_shot.measure=true",
        f"evaluate.prompts={{mine: {prompt}}}",
        "evaluate.reuse_base=false",
    ]
    shared = run_command(project.parent / "shared-out", 2, ["run", str(project), *settings])
    assert shared.wait() == [0, 0], shared.output(0) + shared.output(1)
    assert "evaluate: sentiment, tuned: 12 of 12 items" in shared.output(0)
    found = {path.name: json.loads(path.read_text()) for path in run.glob("evaluations/*.json")}

    with monkeypatch.context() as patch:
        patch.setattr(sharing, "score_items", killed_after_some_items)
        more = ["run", str(project), *settings, "evaluate.strengths=[0.25]"]
        killed = run_command(project.parent / "shared-out", 2, more)
        assert killed.wait() == [3, -9]
        assert "ended without a message" in killed.output(0)

    arms = assert_as_in_one_process(run, found, load_config(project, settings))
    assert arms >= {"base", "tuned", "merged", "few-shot-1", "prompt-mine", "strength-0.5"}


def assert_as_in_one_process(run, found, config):
    """Evaluate a run again in this process, and compare with what was found; return the arms."""
    pipeline.evaluate(config, force=True)
    for name, result in found.items():
        alone = json.loads((run / "evaluations" / name).read_text())
        assert [item["id"] for item in result["items"]] == [item["id"] for item in alone["items"]]
        for item, wanted in zip(result["items"], alone["items"], strict=True):
            score, expected = item.pop("score"), wanted.pop("score")
            assert score == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert item.pop("details").keys() == wanted.pop("details").keys()
            assert item == wanted
        for changing in ("items", "seconds", "mean", "standard_error", "also"):
            del result[changing], alone[changing]
        assert result == alone
    return {name.split(".", 1)[1].removesuffix(".json") for name in found}


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())
