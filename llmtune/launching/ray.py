"""Ray: a job whose driver starts the same command on each node it was given (light)."""

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.launching.base import (
    CONFIG_FILE,
    Called,
    Engine,
    EngineOption,
    LaunchJob,
    R,
    T,
    dump_yaml,
)


class RayEngine(Engine):
    """A Ray job; the nodes keep the run in a directory that all of them see."""

    name = "ray"
    program = "ray"
    file = "runtime_env.yaml"
    gathers_inputs = True
    calls_functions = True
    store_help = "a directory that every node sees; on one machine any directory"
    options = (
        EngineOption("address", "Of the cluster's dashboard; http://127.0.0.1:8265 without it."),
    )

    def check(self, job: LaunchJob) -> None:
        """Require the place of the run."""
        if job.store is None or not Path(job.store).is_absolute():
            given = "--on ray" if job.store is None else f"--store {job.store}"
            raise LlmtuneError(f"{given}: give --store /PATH, {self.store_help}")

    def run_dir(self, run_dir: Path, store: str | None) -> str:
        """Return its place in the directory that all nodes see."""
        return str(Path(store or "/") / run_dir.absolute().name)

    def files(self, job: LaunchJob) -> dict[str, str]:
        """Return the runtime environment; pip's own name for the job's folder finds the wheel."""
        environment: dict[str, object] = {}
        if not job.package.is_installed:
            requirement = job.package.requirement()
            if job.package.wheel is not None:
                requirement = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/" + job.package.wheel.name
            environment["pip"] = [requirement]
        return {self.file: dump_yaml(environment)}

    def submit_command(self, job: LaunchJob) -> list[str]:
        """Return `ray job submit` of the driver in the job's folder."""
        driver = ["python", "-m", "llmtune.launching.ray_driver", CONFIG_FILE]
        driver += ["--nodes", str(job.nodes), "--gpus", str(job.gpus)]
        driver += [word for name in job.env for word in ("--env", name)]
        address = job.option("address")
        return [
            *(self.program, "job", "submit"),
            *(["--address", address] if address else []),
            *("--working-dir", str(job.folder.absolute())),
            *("--runtime-env", str(job.folder / self.file)),
            *("--", *driver),
        ]

    def call_each(
        self, function: Callable[[T], R], values: Sequence[T], *, wants_gpu: bool
    ) -> Iterator[Called[R]]:
        """Call it in tasks of the cluster that runs, or of one made here."""
        if importlib.util.find_spec("ray") is None:
            raise LlmtuneError(
                "--on ray: Ray is not installed here (python -m pip install ray); without --on "
                "everything runs here, one after another"
            )
        from llmtune.launching.ray_calls import call_each

        return call_each(function, values, wants_gpu=wants_gpu)

    def notes(self, job: LaunchJob) -> list[str]:
        """Return where the run appears, and what Ray needs."""
        lines = [f"the run appears in {job.run_dir}"]
        if Path(job.run_dir) != job.local_run_dir.absolute():
            here = shlex.quote(str(job.local_run_dir))
            back = f"mkdir -p {here} && cp -r {shlex.quote(job.run_dir)}/. {here}/"
            lines.append(f"it comes back with: {back}")
        if job.env:
            names = " ".join(job.env)
            lines.append(f"set before `ray start` on each node (Ray would show them): {names}")
        return lines
