"""SkyPilot: a task for any cloud; a bucket keeps the run when its machine is taken away (light)."""

import shlex

from llmtune.errors import LlmtuneError
from llmtune.launching.base import (
    CONFIG_FILE,
    FETCH_FILE,
    Engine,
    EngineOption,
    LaunchJob,
    dump_yaml,
    script,
)

HOME = "~/llmtune"
"""The job's folder there."""
VENV = "~/llmtune-venv"
STORE = "~/llmtune-store"
SAVE_SECONDS = 300
NOT_SAVED = "the run could not be saved in the bucket; it is tried again"
INTERRUPTED = 3
COPYING = {
    "s3": "aws s3 cp --recursive {place} {here}",
    "gs": "gcloud storage cp --recursive {place}/* {here}",
}


class SkyEngine(Engine):
    """A SkyPilot task: a managed job that recovers if there is a bucket, else a cluster."""

    name = "sky"
    program = "sky"
    file = "task.yaml"
    store_help = "s3://BUCKET/PATH or gs://BUCKET/PATH: a managed job that survives preemption"
    options = (
        EngineOption("accelerator", "Kind of GPU: H100."),
        EngineOption("infra", "Cloud, or cloud/region: aws/us-east-1."),
        EngineOption("spot", "Take machines that may be taken away; needs --store.", "flag"),
    )

    def check(self, job: LaunchJob) -> None:
        """Require a kind of GPU, and a bucket for machines that may go."""
        if job.gpus and job.option("accelerator") is None:
            raise LlmtuneError("--on sky: say which GPU: --accelerator H100 (sky show-gpus lists)")
        scheme, _, place = (job.store or "").partition("://")
        if job.store is not None and (scheme not in COPYING or not place.strip("/")):
            raise LlmtuneError(f"--store {job.store}: expected {self.store_help}")
        if job.option("spot") and job.store is None:
            raise LlmtuneError(f"--spot: what is saved needs a place: --store {self.store_help}")

    def files(self, job: LaunchJob) -> dict[str, str]:
        """Return the task, and the script that brings the run back."""
        resources: dict[str, object] = {"infra": infra} if (infra := job.option("infra")) else {}
        if job.gpus:
            resources["accelerators"] = f"{job.option('accelerator')}:{job.gpus}"
        else:
            resources["cpus"] = "4+"
        if job.option("spot"):
            resources["use_spot"] = True
        mounts: dict[str, object] = {f"{HOME}/{CONFIG_FILE}": str(job.config_path.absolute())}
        mounts |= {f"{HOME}/{name}": str(path.absolute()) for name, path in job.inputs.items()}
        if job.store is not None:
            resources["job_recovery"] = {"recover_on_exit_codes": [INTERRUPTED]}
            mounts[STORE] = {"source": job.store.rstrip("/"), "mode": "MOUNT"}
        task: dict[str, object] = {
            "name": job.name,
            "num_nodes": job.nodes,
            "resources": resources,
            "file_mounts": mounts,
        }
        if job.env:
            task["secrets"] = dict.fromkeys(job.env)
        if install := job.install_lines(VENV):
            task["setup"] = "\n".join(["set -euo pipefail", f"cd {HOME}", *install]) + "\n"
        task["run"] = "\n".join(self._run_lines(job)) + "\n"
        return {self.file: dump_yaml(task), FETCH_FILE: script(self._fetch_lines(job))}

    def _run_lines(self, job: LaunchJob) -> list[str]:
        python = "python" if job.package.is_installed else f"{VENV}/bin/python"
        command = job.command(
            CONFIG_FILE, python=python, node_rank='"$SKYPILOT_NODE_RANK"', address='"$address"'
        )
        lines = ["set -euo pipefail", f"cd {HOME}", *job.require_lines()]
        lines.append('address="$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"')
        if job.store is None:
            return [*lines, command]
        run_dir = shlex.quote(job.run_dir)
        return [
            *lines,
            f"store={STORE}/{job.name}",
            'mkdir -p "$store"',
            "# A bucket cannot rename: each state is a new file, named in `latest` when whole.",
            'if [ -e "$store/latest" ]; then tar -xf "$store/$(cat "$store/latest")"; fi',
            "save() {",
            f"  [ -d {run_dir} ] || return 0",
            "  state=state-$(date +%s).tar",
            "  # 1: a file grew meanwhile",
            f'  tar -cf "$store/$state" {run_dir} || [ $? -eq 1 ] || return 1',
            '  old="$(cat "$store/latest" 2>/dev/null || true)"',
            '  printf %s "$state" > "$store/latest" || return 1',
            '  if [ -n "$old" ] && [ "$old" != "$state" ]; then rm -f "$store/$old"; fi',
            "}",
            'if [ "$SKYPILOT_NODE_RANK" != 0 ]; then',
            f"  exec {command}",
            "fi",
            f"(while sleep {SAVE_SECONDS}; do save || echo '{NOT_SAVED}' >&2; done) &",
            "saving=$! code=0",
            f"{command} || code=$?",
            'kill "$saving" 2>/dev/null || true',
            'wait "$saving" 2>/dev/null || true',
            'save || [ "$code" -ne 0 ] || code=1',
            'if [ "$code" -eq 0 ]; then',
            f'  mkdir -p "$store/run" && cp -r {run_dir}/. "$store/run/"',
            "fi",
            'exit "$code"',
        ]

    def _fetch_lines(self, job: LaunchJob) -> list[str]:
        here = shlex.quote(str(job.local_run_dir.absolute()))
        lines = [f"mkdir -p {here}"]
        if job.store is not None:
            place = shlex.quote(f"{job.store.rstrip('/')}/{job.name}/run")
            copy = COPYING[job.store.partition("://")[0]]
            return [*lines, copy.format(place=place, here=f"{here}/")]
        there = shlex.quote(f"{job.name}:llmtune/{job.run_dir}/")
        return [
            *lines,
            f"rsync -a {there} {here}/",
            f"echo 'when you are done: sky down {job.name}'",
        ]

    def submit_command(self, job: LaunchJob) -> list[str]:
        """Return a managed job if there is a bucket, else a cluster of its own."""
        secrets = [word for name in job.env for word in ("--secret", name)]
        file = str(job.folder / self.file)
        if job.store is not None:
            return [self.program, "jobs", "launch", "--yes", "--name", job.name, *secrets, file]
        return [self.program, "launch", "--yes", "--cluster", job.name, *secrets, file]

    def notes(self, job: LaunchJob) -> list[str]:
        """Return how the run comes back, and what is lost without a bucket."""
        back = f"the run comes back with: bash {job.folder / FETCH_FILE}"
        if job.store is not None:
            return [f"saved every {SAVE_SECONDS // 60} minutes in {job.store}", back]
        return [
            back,
            "no --store: what a lost machine had done is lost; sky launch again starts over",
        ]
