"""Slurm: an sbatch script; the nodes share the files, so the run stays where it is (light)."""

import shlex
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.launching.base import Engine, EngineOption, LaunchJob

WARNING_SECONDS = 300
"""How long before the time limit training is told to save; evaluation is just ended."""


class SlurmEngine(Engine):
    """A batch job of one task a node; before its time is over it saves and queues itself again."""

    name = "slurm"
    program = "sbatch"
    file = "job.sbatch"
    shares_files = True
    options = (
        EngineOption("partition", "Slurm's partition."),
        EngineOption("account", "Slurm's account."),
        EngineOption("time", "Time limit, as Slurm reads it: 8:00:00."),
        EngineOption("accelerator", "Kind of GPU: H100."),
        EngineOption("setup", "A shell line to run first: 'module load cuda'."),
    )

    def check(self, job: LaunchJob) -> None:
        """Require options that are one word: they become lines that Slurm reads."""
        for name in ("partition", "account", "time", "accelerator"):
            value = job.option(name)
            if value is not None and not all(c.isalnum() or c in "-_.:,+" for c in value):
                raise LlmtuneError(f"--{name} {value!r}: expected one word, as sbatch takes it")

    def run_dir(self, run_dir: Path, store: str | None) -> str:
        """Return the config's own: nothing is moved."""
        return str(run_dir)

    def files(self, job: LaunchJob) -> dict[str, str]:
        """Return the batch script."""
        folder = job.folder.absolute()
        venv = shlex.quote(str(folder / f"venv-{job.package.key}"))
        lines = ["#!/usr/bin/env bash", *(f"#SBATCH {each}" for each in self._directives(job))]
        lines += ["set -euo pipefail", *([setup] if (setup := job.option("setup")) else [])]
        lines += job.require_lines()
        if install := job.install_lines(venv, is_shared=True):
            lines += [
                f"if [ ! -e {venv}/ready ]; then",
                *(f"  {line}" for line in install),
                f"  touch {venv}/ready",
                "fi",
            ]
        python = shlex.quote(job.python) if job.package.is_installed else f"{venv}/bin/python"
        command = job.command(
            str(job.config_path.absolute()),
            python=python,
            node_rank='"$SLURM_PROCID"',
            address='"$MASTER_ADDR"',
        )
        lines += [
            f"cd {shlex.quote(str(Path.cwd()))}",
            'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            "export MASTER_ADDR",
            "",
            f"# Slurm sends USR1 {WARNING_SECONDS} s before the time limit: save, and queue again.",
            "again=",
            """trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1""",
            f"srun --kill-on-bad-exit=1 bash -c {shlex.quote('exec ' + command)} &",
            "job=$! code=0",
            'wait "$job" || code=$?',
            "# The signal ends the first wait, not the job.",
            'if [ -n "$again" ] && [ "$code" -gt 128 ]; then code=0; wait "$job" || code=$?; fi',
            'if [ -n "$again" ] && [ "$code" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
        ]
        return {self.file: "\n".join(lines) + "\n"}

    def _directives(self, job: LaunchJob) -> list[str]:
        kind = f"{job.option('accelerator')}:" if job.option("accelerator") else ""
        log = job.folder.absolute() / "%x-%j.log"
        lines = [
            f"--job-name={job.name}",
            f"--nodes={job.nodes}",
            "--ntasks-per-node=1",
            *([f"--gpus-per-node={kind}{job.gpus}"] if job.gpus else []),
            f"--cpus-per-task={4 * max(job.gpus, 1)}",
            "--requeue",
            f"--signal=B:USR1@{WARNING_SECONDS}",
            "--open-mode=append",
            f'--output="{log}"',
        ]
        for name in ("partition", "account", "time"):
            if value := job.option(name):
                lines.append(f"--{name}={value}")
        return lines

    def submit_command(self, job: LaunchJob) -> list[str]:
        """Return sbatch with the script."""
        return [self.program, str(job.folder / self.file)]

    def notes(self, job: LaunchJob) -> list[str]:
        """Return where the run appears."""
        return [
            f"the nodes must see this directory; the run appears in {job.local_run_dir}",
            f"log: {job.folder}/{job.name}-JOBID.log",
        ]
