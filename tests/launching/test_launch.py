"""`llmtune launch`: each engine's file is what that engine takes, and does what a user would."""

import base64
import functools
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jsonschema
import pytest
import yaml
from torch.distributed import DistNetworkError

from llmtune.cli import run_command
from llmtune.config import load_config
from llmtune.errors import LlmtuneError
from llmtune.launching import torchrun
from llmtune.launching.base import Called
from llmtune.launching.config import ENGINES
from tests.processes import free_port
from tests.project import make_project

GIT = f"git+https://example.org/team/tuner@{'0123456789' * 4}"
NEEDED = {
    "sky": ("--accelerator", "H100", "--store", "s3://bucket/runs"),
    "slurm": (),
    "k8s": ("--store", "claim", "model.base=org/small"),
    "ray": ("--store", "/shared/runs"),
}
TASK_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "num_nodes", "resources", "run"],
    "properties": {
        "name": {"type": "string"},
        "num_nodes": {"type": "integer"},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "accelerators": {"type": "string", "pattern": r"^[\w-]+:\d+$"},
                "cpus": {"type": "string"},
                "infra": {"type": "string"},
                "use_spot": {"type": "boolean"},
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"recover_on_exit_codes": {"type": "array"}},
                },
            },
        },
        "file_mounts": {
            "type": "object",
            "additionalProperties": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "object", "required": ["source", "mode"], "maxProperties": 2},
                ]
            },
        },
        "secrets": {"type": "object", "additionalProperties": {"type": "null"}},
        "setup": {"type": "string"},
        "run": {"type": "string"},
    },
}
"""What a SkyPilot task may hold, as far as ours do."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a project in `tiny/`."""
    directory = tmp_path_factory.mktemp("my jobs")
    make_project(directory / "tiny")
    return directory


class Launch:
    """Calls the command; returns its JSON result, or its message."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys

    def __call__(self, engine, *arguments, package=GIT, code=0):
        found = run_command(
            ["launch", "tiny/config.yaml", "--on", engine, *NEEDED[engine], *arguments]
            + ["--out", str(self.folder), "--json"]
            + ([] if package is None else ["--package", package])
        )
        printed = self.capsys.readouterr()
        assert found == code, printed.err
        return json.loads(printed.out) if code == 0 else printed.err


@pytest.fixture
def launch(place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_TOKEN", "the-secret-value")

    return Launch(tmp_path / "job", capsys)


def stub(folder, name, body):
    """Put a program on the path of a script, in place of an engine's."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def files_of(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("engine", [engine.name for engine in ENGINES])
def test_a_dry_run_writes_a_config_that_loads_and_no_secret(launch, engine):
    result = launch(engine, "--env", "HF_TOKEN", "--dry-run")
    assert not result["submitted"]
    texts = files_of(launch.folder)
    assert all("the-secret-value" not in text for text in texts.values())
    assert "the-secret-value" not in json.dumps(result)
    there = load_config(launch.folder / "config.yaml")
    assert there.train == load_config("tiny/config.yaml").train
    for name, text in texts.items():
        if name.endswith(("sh", "sbatch")):
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    # the same folder is written again, and no folder of someone else
    launch(engine, "--dry-run")
    (launch.folder / "config.yaml").unlink()
    assert "choose another --out" in launch(engine, "--dry-run", code=2)


@pytest.mark.parametrize(
    ("engine", "package", "arguments", "message"),
    [
        ("slurm", None, (), "--package: say where"),
        ("slurm", "llmtune", (), "belongs to somebody else"),
        ("slurm", "llmtune==0.1.0", (), "belongs to somebody else"),
        ("slurm", "git+https://example.org/team/tuner", (), "no commit or tag"),
        ("slurm", "git+https://example.org/team/tuner@main", (), "'main' may be a branch"),
        ("slurm", "git+ssh://git@example.org/team/tuner@a/b", (), "or a tag as @refs/tags/a/b"),
        ("slurm", "git+ssh://git@example.org/team/tuner", (), "no commit or tag"),
        ("slurm", "git+https://me:token@example.org/team/tuner@v1", (), "a user or a password"),
        ("slurm", "llmtune-9-py3-none-any.whl", (), "no such file"),
        ("slurm", "git+https://me:token@[abc/tuner@v1", (), "cannot be read as an address"),
        ("slurm", GIT, ("--env", "HF_TOKEN=abc"), "the name of an environment variable alone"),
        ("slurm", GIT, ("--store", "x"), "keeps the run where the config says"),
        ("slurm", GIT, ("--image", "x"), "has no use for it"),
        ("slurm", GIT, ("--partition", "a b"), "expected one word"),
        ("sky", GIT, ("--store", "/here"), "expected s3://"),
        ("k8s", GIT, ("--store", "Not A Name"), "PersistentVolumeClaim"),
        ("k8s", GIT, ("--kind", "pod"), "expected one of job, pytorchjob, trainjob"),
        ("k8s", GIT, ("--kind", "job", "--nodes", "2"), "expected pytorchjob or trainjob"),
        ("k8s", GIT, ("--kind", "pytorchjob"), "expected job or trainjob"),
        ("ray", GIT, ("--store", "here"), "every node sees"),
        ("slurm", GIT, ("model.base=models/gone.gguf",), "no such file here"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    launch, engine, package, arguments, message
):
    error = launch(engine, "--dry-run", *arguments, package=package, code=2)
    assert message in error and "abc" not in error and "me:token" not in error
    assert not launch.folder.exists()


def test_the_engines_command_is_called_or_the_file_is_kept(launch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    error = launch("slurm", code=2)
    assert "sbatch is not installed here" in error and (launch.folder / "job.sbatch").is_file()
    stub(tmp_path / "bin", "sbatch", f'printf "%s" "$1" > {tmp_path}/seen')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert launch("slurm")["submitted"]
    assert (tmp_path / "seen").read_text() == str(launch.folder / "job.sbatch")
    assert "GONE: not set in this shell" in launch("slurm", "--env", "GONE", code=2)
    stub(tmp_path / "bin", "sbatch", "exit 7")
    assert "exit code 7" in launch("slurm", code=2)


def test_links_of_an_earlier_launch_lead_nowhere(launch, place, monkeypatch):
    rows = place / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text("{}")
    for sources in ("[{path: rows}]", "[{path: rows/a.jsonl}]", "[{path: rows}]"):
        launch("ray", "--dry-run", f"data.train={sources}", "data.evaluation=[]")
        launch(
            "ray", "--dry-run", f"data.train={sources}", "data.evaluation=[{path: rows/a.jsonl}]"
        )
        assert (launch.folder / "rows" / "a.jsonl").read_text() == "{}"
    (launch.folder / "rows").unlink()
    (launch.folder / "rows").write_text("mine")
    assert "in the way" in launch("ray", "--dry-run", "data.train=[{path: rows}]", code=2)
    assert (launch.folder / "rows").read_text() == "mine" and not (rows / "a.jsonl").is_symlink()
    monkeypatch.chdir(launch.folder)
    command = ["launch", f"{place}/tiny/config.yaml", "--on", "ray", *NEEDED["ray"], "--out", "."]
    assert run_command([*command, "--package", GIT, "--dry-run"]) == 2
    assert "holds the inputs themselves" in launch.capsys.readouterr().err


SBATCH = {
    "job-name": r"[a-z0-9-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "requeue": "",
    "signal": r"(B:)?[A-Z0-9]+@\d+",
    "open-mode": "append|truncate",
    "output": r"/.+%x-%j\.log",
    "partition": r"[\w.,-]+",
    "account": r"[\w.-]+",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
}
"""Options that sbatch documents: those of ours, with the form of their values."""


def directives(text):
    """Return what sbatch reads of a script: an option a line, before the first command."""
    found = {}
    lines = text.splitlines()
    assert lines[0].startswith("#!/"), "sbatch takes no script without an interpreter"
    for number, line in enumerate(lines[1:], start=1):
        if not line.startswith("#SBATCH "):
            assert not any(line.startswith("#SBATCH") for line in lines[number:])
            break
        (word,) = shlex.split(line.removeprefix("#SBATCH "))
        name, _, value = word.removeprefix("--").partition("=")
        assert word.startswith("--") and name not in found
        assert re.fullmatch(SBATCH[name], value), line
        found[name] = value
    return found


def test_slurm_starts_torchrun_on_each_node_and_queues_again_before_its_time_is_over(
    launch, tmp_path, place
):
    queue = ("--partition", "long", "--account", "team-1", "--accelerator", "H100")
    launch("slurm", "--nodes", "2", "--gpus", "4", "--time", "8:00:00", *queue, "--dry-run")
    text = (launch.folder / "job.sbatch").read_text()
    given = directives(text)
    assert (
        given["nodes"] == "2" and given["gpus-per-node"] == "H100:4" and given["time"] == "8:00:00"
    )
    assert given["ntasks-per-node"] == "1" and "requeue" in given
    assert given["signal"].startswith("B:USR1@")
    assert GIT in text and "--nnodes 2" in text and "--nproc-per-node 4" in text

    wheel = tmp_path / "llmtune-0.1.0-py3-none-any.whl"
    ready = []
    for content in (b"first", b"made again"):
        wheel.write_bytes(content)
        launch("slurm", "--dry-run", package=str(wheel))
        text = (launch.folder / "job.sbatch").read_text()
        ready += [line for line in text.splitlines() if line.startswith("if [ ! -e ")]
    assert len(set(ready)) == 2, "an environment that has a different wheel is not taken"

    launch("slurm", "--dry-run", package="installed")
    text = (launch.folder / "job.sbatch").read_text()
    assert f"exec {sys.executable} -m llmtune run {launch.folder}/config.yaml" in text
    log, bin_dir = tmp_path / "log", tmp_path / "bin"
    stub(bin_dir, "scontrol", f'echo "scontrol $*" >> {log}; echo node1')
    stub(bin_dir, "scancel", f'echo "scancel $*" >> {log}; kill "$(cat {tmp_path}/running)"')
    stub(
        bin_dir,
        "srun",
        f"""trap 'kill %1; exit 3' TERM
        echo "srun in $PWD: $4" >> {log}; sleep 60 & echo $$ > {tmp_path}/running; wait""",
    )
    process = subprocess.Popen(
        ["bash", str(launch.folder / "job.sbatch")],
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
        | {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node1"},
    )
    while not (tmp_path / "running").exists() or not (tmp_path / "running").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 3
    lines = log.read_text().splitlines()
    assert lines[0] == "scontrol show hostnames node1"
    assert lines[1].startswith(f"srun in {place}: exec ")
    assert lines[2:] == ["scancel --signal=TERM 77", "scontrol requeue 77"]


def check_sky(text):
    """Check a task against our schema, and against SkyPilot's own if it is installed."""
    task = yaml.safe_load(text)
    jsonschema.validate(task, TASK_SCHEMA)
    if importlib.util.find_spec("sky") is not None:
        from sky.utils import schemas

        resources = task.get("resources", {})
        jsonschema.validate({**task}, schemas.get_task_schema())
        jsonschema.validate(resources, schemas.get_resources_schema())
    return task


def test_sky_brings_the_files_and_a_lost_machine_continues_from_the_bucket(launch, tmp_path, place):
    spot = ("--spot", "--env", "HF_TOKEN", "--infra", "aws/us-east-1")
    command = launch("sky", "--gpus", "8", "--nodes", "2", *spot, "--dry-run")["command"]
    assert command[:3] == ["sky", "jobs", "launch"] and "--secret" in command
    task = check_sky((launch.folder / "task.yaml").read_text())
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"]
    mounts = task["file_mounts"]
    assert mounts["~/llmtune/tiny/base"] == str(place / "tiny" / "base")
    assert mounts["~/llmtune/tiny/items.jsonl"], "the items of a suite come along"
    assert mounts["~/llmtune-store"] == {"source": "s3://bucket/runs", "mode": "MOUNT"}
    assert "--nnodes 2" in task["run"] and GIT in task["setup"]

    launch("sky", "--dry-run", package="installed")
    text = check_sky((launch.folder / "task.yaml").read_text())["run"]
    home, bin_dir = tmp_path / "home", tmp_path / "bin"
    stub(bin_dir, "python", 'mkdir -p runs/run; echo "$*" >> runs/run/calls; exit "$CODE"')

    def machine(code):
        """Run the task on a new machine, of which only the bucket is left afterwards."""
        subprocess.run(["rm", "-rf", str(home / "llmtune")], check=True)
        (home / "llmtune").mkdir(parents=True)
        environment = {**os.environ, "HOME": str(home), "CODE": str(code)}
        environment |= {"PATH": f"{bin_dir}:{os.environ['PATH']}", "SKYPILOT_NODE_RANK": "0"}
        environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1"}
        return subprocess.run(["bash", "-c", text], env=environment, check=False).returncode

    kept = home / "llmtune-store" / "llmtune-run"
    assert machine(3) == 3 and not (kept / "run").exists()
    assert machine(0) == 0
    assert (kept / "run" / "calls").read_text() == "-m llmtune run config.yaml\n" * 2
    (state,) = kept.glob("state-*.tar")
    stub(bin_dir, "tar", '[ "$1" != -cf ] || exit 2; exec /bin/tar "$@"')
    assert machine(3) == 3 and machine(0) == 1, "what could not be saved is no success"
    assert (kept / "latest").read_text() == state.name and state.is_file()


def test_without_a_bucket_sky_takes_a_cluster_and_the_run_is_copied_from_it(launch, monkeypatch):
    monkeypatch.setitem(NEEDED, "sky", ("--accelerator", "H100"))
    result = launch("sky", "--dry-run")
    assert result["command"][:2] == ["sky", "launch"]
    assert "rsync -a llmtune-run:llmtune/runs/run/ " in files_of(launch.folder)["fetch.sh"]
    assert "what is saved needs a place" in launch("sky", "--spot", "--dry-run", code=2)
    monkeypatch.setitem(NEEDED, "sky", ())
    launch("sky", "--gpus", "0", "--dry-run")
    assert "accelerators" not in check_sky(files_of(launch.folder)["task.yaml"])["resources"]
    assert "--accelerator" in launch("sky", "--dry-run", code=2)


def wrong_input_of(policy):
    """Return which exit codes of which container end a job at once."""
    rules = [rule for rule in policy["rules"] if rule["action"] == "FailJob"]
    return {rule["onExitCodes"]["containerName"]: rule["onExitCodes"]["values"] for rule in rules}


def check_trainer(document):
    """Check a document against the models that Kubeflow Trainer publishes, if they are here."""
    if importlib.util.find_spec("kubeflow_trainer_api") is not None:
        from kubeflow_trainer_api import models

        read = getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document)
        assert read.to_dict() == document, "a field that it does not know is left out"


def test_kubernetes_gets_kubeflows_kinds_on_several_nodes(launch):
    def documents(*arguments):
        result = launch("k8s", "--gpus", "8", "--dry-run", *arguments)
        _, *found = yaml.safe_load_all((launch.folder / "job.yaml").read_text())
        return " ".join(result["notes"]), found

    notes, (job,) = documents("--nodes", "3")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert "Training Operator" in notes and "ReadWriteMany" in notes
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1 and replicas["Worker"]["replicas"] == 2
    for part in replicas.values():
        assert part["restartPolicy"] == "ExitCode", "below 128 it is not started again"
        (container,) = part["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        text = container["command"][2]
        assert "--temporary-code 143 --nproc-per-node 8 --nnodes 3" in text
        assert text.index("trap 'exit 143' ERR") < text.index("pip install")

    notes, (runtime, job) = documents("--nodes", "3", "--kind", "trainjob", "--env", "HF_TOKEN")
    assert "Trainer 2" in notes
    for document in (runtime, job):
        assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        check_trainer(document)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"] == "TrainingRuntime"
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 3
    jobs = runtime["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (node,) = jobs["replicatedJobs"]
    assert wrong_input_of(node["template"]["spec"]["podFailurePolicy"]) == {"node": [2]}
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    assert container["name"] == node["name"] == "node", "so the operator finds it"
    assert '--node-rank "${PET_NODE_RANK:-$RANK}"' in container["command"][2]

    _, (runtime, job) = documents("--kind", "trainjob")
    assert job["spec"]["trainer"]["numNodes"] == 1


@pytest.fixture
def handlers():
    """Give signals back to whom they belonged: torchrun keeps them."""
    kept = {number: signal.getsignal(number) for number in (1, 2, 3, 15)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


KILLED_BESIDE_ONE_THAT_SAYS_3 = """
trap 'exit 3' TERM
[ $RANK = 1 ] || { until [ -e "$TRAP_IS_SET" ]; do sleep 0.02; done; kill -9 $BASHPID; }
touch "$TRAP_IS_SET"
sleep 5 & wait
"""


@pytest.mark.parametrize(
    ("given", "ends", "code"),
    [
        (("--temporary-code", "143"), "exit 2", 2),
        ((), KILLED_BESIDE_ONE_THAT_SAYS_3, 3),
        (("--temporary-code", "143"), "kill -9 $BASHPID", 143),
    ],
)
def test_torchrun_ends_with_the_exit_code_of_the_run(
    handlers, tmp_path, monkeypatch, given, ends, code
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRAP_IS_SET", str(tmp_path / "set"))
    shape = ("--nproc-per-node", "2", "--master-port", str(free_port()))
    quick = ("--monitor-interval", "0.05", "--no-python")
    assert torchrun.main([*given, *shape, *quick, "bash", "-c", ends]) == code
    assert torchrun.exit_code([-9, -9]) == 137


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (FileNotFoundError(2, "No such file", "gone"), "could not start the processes", 2),
        (OSError(28, "No space left on device"), "could not start the processes, or lost", 3),
        (ConnectionRefusedError(111, "Connection refused"), "the machines could not meet", 3),
        (DistNetworkError("timed out"), "the machines could not meet", 3),
    ],
)
def test_torchrun_says_what_it_failed_by(monkeypatch, capsys, error, said, code):
    def fail(_):
        raise error

    monkeypatch.setattr("torch.distributed.run.run", fail)
    assert torchrun.main(["--standalone", "-m", "llmtune"]) == code
    assert said in capsys.readouterr().err


def test_kubernetes_gets_a_job_with_the_files_in_it(launch, monkeypatch):
    launch("k8s", "--gpus", "2", "--env", "HF_TOKEN", "--namespace", "team", "--dry-run")
    inputs, job = yaml.safe_load_all((launch.folder / "job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["metadata"]["name"] == "llmtune-run" and job["metadata"]["namespace"] == "team"
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a pod failure policy needs it"
    (container,) = pod["containers"]
    assert wrong_input_of(job["spec"]["podFailurePolicy"]) == {container["name"]: [2]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "llmtune-run-env"
    assert {each["name"] for each in container["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }
    text = container["command"][2]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "--standalone" in text and GIT in text
    packed = base64.b64decode(inputs["binaryData"]["files.tar.gz"])
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        names = archive.getnames()
        there = yaml.safe_load(archive.extractfile("config.yaml").read())
    assert {"tiny/train.jsonl", "tiny/items.jsonl"} <= set(names)
    assert there["run_dir"] == "/llmtune-volume/run"
    assert there["model"]["base"] == "org/small"

    launch("k8s", "run_dir=runs/my $(run)", "--dry-run")
    fetch = (launch.folder / "fetch.sh").read_text()
    assert "cp 'llmtune-my-run-fetch:/llmtune-volume/my $(run)' " in fetch
    monkeypatch.setattr("llmtune.launching.k8s.MAX_MAP_BYTES", 1000)
    assert "of files here are more than" in launch("k8s", "--dry-run", code=2)


def test_files_from_outside_get_a_place_in_the_job(launch, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inputs" / "1").mkdir(parents=True)
    (tmp_path / "inputs" / "1" / "train.jsonl").write_text("mine")
    config = str(place / "tiny" / "config.yaml")
    command = ["launch", config, "--on", "ray", *NEEDED["ray"], "--package", GIT, "--dry-run"]
    pattern = f"data.train=[{{path: {place}/tiny/tr*.jsonl}}, {{path: inputs/1/train.jsonl}}]"
    assert run_command([*command, "data.evaluation=[{path: /gone/rows.jsonl}]", pattern]) == 0
    folder = tmp_path / "launch" / "llmtune-run-ray"
    monkeypatch.chdir(folder)
    there = load_config("config.yaml")
    assert Path(there.model.base, "config.json").is_file() and "inputs/" in there.model.base
    assert list(Path.cwd().glob(there.data.train[0].path))
    assert Path(there.data.train[1].path).read_text() == "mine", "its place is not taken"
    assert there.data.evaluation[0].path == "/gone/rows.jsonl"
    suite = Path(there.evaluate.suites[0])
    assert (suite.parent / yaml.safe_load(suite.read_text())["items"]).is_file()


def test_ray_gets_a_runtime_environment_with_the_wheel_in_it(launch, tmp_path):
    wheel = tmp_path / "llmtune-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    result = launch("ray", "--nodes", "2", "--gpus", "0", "--dry-run", package=str(wheel))
    environment = yaml.safe_load((launch.folder / "runtime_env.yaml").read_text())
    assert environment == {"pip": ["${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/" + wheel.name]}
    assert (launch.folder / wheel.name).resolve() == wheel
    driver = result["command"][result["command"].index("--") + 1 :]
    assert driver[:3] == ["python", "-m", "llmtune.launching.ray_driver"]
    assert driver[3:] == ["config.yaml", "--nodes", "2", "--gpus", "0"]
    if importlib.util.find_spec("ray") is not None:
        from ray.runtime_env import RuntimeEnv

        RuntimeEnv(**environment, working_dir="https://example.org/job.zip")


class StandIn(ModuleType):
    """Ray as far as calls of a function need it: the task that was started last ends first."""

    def __init__(self, nodes):
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=OSError, RayTaskError=ArithmeticError)
        self.is_running, self.cancelled, self.started = False, [], []
        self.silent_waits = 0
        self.nodes = lambda: nodes

    def is_initialized(self):
        return self.is_running

    def init(self, **_options):
        self.is_running = True

    def shutdown(self):
        self.is_running = False

    def remote(self, **options):
        def start(function, *arguments):
            node = options["scheduling_strategy"].node_id
            self.started.append((arguments[1], node, options["num_cpus"], options["num_gpus"]))
            return functools.partial(function, *arguments)

        return lambda function: SimpleNamespace(remote=functools.partial(start, function))

    def wait(self, tasks, num_returns, timeout=None):
        if self.silent_waits:
            assert timeout
            self.silent_waits -= 1
            return [], tasks
        return tasks[-num_returns:], tasks[:-num_returns]

    def get(self, task):
        return task()

    def cancel(self, task):
        self.cancelled.append(task)


def node(name, cpus, gpus=0, *, is_alive=True):
    return {"NodeID": name, "Alive": is_alive, "Resources": {"CPU": cpus, "GPU": gpus}}


@pytest.fixture
def stand_in(monkeypatch):
    """Return what makes a Ray of some nodes, and the module that calls it."""
    logger = logging.getLogger("llmtune")
    kept = logger.handlers, logger.level

    def make(*nodes):
        ray, strategies = StandIn(nodes), ModuleType("ray.util.scheduling_strategies")
        vars(strategies)["NodeAffinitySchedulingStrategy"] = SimpleNamespace
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
        monkeypatch.setitem(sys.modules, strategies.__name__, strategies)
        monkeypatch.setitem(sys.modules, "llmtune.launching.ray_calls", None)
        del sys.modules["llmtune.launching.ray_calls"]
        return ray, importlib.import_module("llmtune.launching.ray_calls")

    yield make
    logger.handlers, logger.level = kept


@pytest.mark.parametrize(
    ("nodes", "wants_gpu", "started"),
    [
        ([node("a", 16, 2), node("b", 64)], True, [(0, "a", 8, 1), (1, "a", 8, 1), (2, "a", 8, 1)]),
        (
            [node("a", 16, 4), node("b", 8, is_alive=False)],
            False,
            [(n, "a", 16, 0) for n in (0, 1, 2)],
        ),
        (
            [node("a", 0), node("b", 64), node("c", 2)],
            True,
            [(0, "b", 64, 0), (1, "c", 2, 0), (2, "c", 2, 0)],
        ),
        ([node("a", 0, 2)], True, [(0, "a", 0, 1), (1, "a", 0, 1), (2, "a", 0, 1)]),
    ],
)
def test_on_ray_one_call_at_a_time_has_a_gpu_or_a_whole_node(stand_in, nodes, wants_gpu, started):
    ray, ray_calls = stand_in(*nodes)
    found = list(ray_calls.call_each(str, [0, 1, 2], wants_gpu=wants_gpu))
    assert ray.started == started and not ray.is_running
    assert sorted(found, key=lambda each: each.number) == [Called(n, str(n)) for n in (0, 1, 2)]


def test_on_ray_what_was_lost_is_called_again_and_a_bug_is_not(stand_in):
    nodes = [node("a", 2, 2)]
    ray, ray_calls = stand_in(*nodes)

    def lose(value):
        if value == "lost":
            raise OSError("noise\nthe worker died")
        return 1 // value

    calls = ray_calls.call_each(lose, [1, "lost", 0, 1], wants_gpu=True)
    assert [next(calls).number for _ in range(2)] == [2, 3]
    assert next(calls) == Called(1, lost="its process on Ray was lost: the worker died")
    assert [value for value, *_ in ray.started].count("lost") == 1 + ray_calls.RETRIES
    calls.close()
    assert len(ray.cancelled) == 1 and not ray.is_running
    (broken,) = ray_calls.call_each(lose, [0], wants_gpu=False)
    assert broken.broken.startswith("it failed in a way that is a bug: integer division")

    def end_cluster(value):
        nodes[0]["Alive"] = False
        raise OSError("the node died")

    (gone,) = ray_calls.call_each(end_cluster, [0], wants_gpu=False)
    assert gone.lost == "the cluster lost its nodes"
    with pytest.raises(LlmtuneError, match="no node of the cluster has a CPU"):
        list(ray_calls.call_each(lose, [1], wants_gpu=False))


def test_on_ray_a_node_that_loses_its_calls_is_avoided_while_another_is_there(stand_in):
    ray, ray_calls = stand_in(node("good", 2), node("bad", 2))

    def work(value):
        if ray.last_node == "bad":
            raise OSError("the worker died")
        return value

    get = ray.get

    def get_where_it_ran(task):
        ray.last_node = next(at for one, at, *_ in reversed(ray.started) if one == task.args[1])
        return get(task)

    ray.get = get_where_it_ran
    found = list(ray_calls.call_each(work, [0, 1, 2, 3], wants_gpu=False))
    assert [each.lost for each in found] == [None] * 4
    assert [at for _, at, *_ in ray.started].count("bad") == ray_calls.NODE_LOSSES


def test_on_ray_a_lost_call_goes_to_a_different_node(stand_in):
    ray, ray_calls = stand_in(node("a", 2), node("b", 2), node("c", 2))

    def lose(_value):
        raise OSError("the worker died")

    (lost,) = ray_calls.call_each(lose, [0], wants_gpu=False)
    assert lost.lost
    assert [at for _, at, *_ in ray.started] == ["a", "b", "c", "a", "a", "a"]


def test_on_ray_it_is_said_once_that_no_call_ends(stand_in, caplog):
    ray, ray_calls = stand_in(node("a", 4), node("b", 2))
    ray.silent_waits = 3
    with caplog.at_level("INFO", "llmtune"):
        assert len(list(ray_calls.call_each(str, [0, 1], wants_gpu=False))) == 2
    (said,) = (record.getMessage() for record in caplog.records)
    assert "2 calls run or wait, on the nodes a, b: one begins when its CPUs there (2 or 4)" in said
