"""Kubernetes: a Job, on several nodes one of Kubeflow's kinds; a volume keeps the run (light)."""

import base64
import gzip
import io
import re
import shlex
import tarfile
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.io.sizes import format_size
from llmtune.launching import kubeflow
from llmtune.launching.base import (
    CONFIG_FILE,
    FETCH_FILE,
    Engine,
    EngineOption,
    LaunchJob,
    dump_yaml,
    script,
)
from llmtune.launching.kubeflow import Value

MAX_MAP_BYTES = 700_000
"""Of the packed inputs: a ConfigMap holds 1 MiB, and base64 makes three bytes four."""
IMAGE = "python:3.12"
VOLUME = "/llmtune-volume"
FILES = "/llmtune-files"
PACKED = "files.tar.gz"
GRACE_SECONDS = 120
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


class K8sEngine(Engine):
    """A manifest with the small inputs inside; what is large must be on the volume or the hub."""

    name = "k8s"
    program = "kubectl"
    file = "job.yaml"
    store_help = "the name of a PersistentVolumeClaim, on which the run is kept"
    options = (
        EngineOption("image", f"Container image; {IMAGE} without it."),
        EngineOption("namespace", "Kubernetes namespace."),
        EngineOption(
            "kind",
            f"{', '.join(kubeflow.CONTAINERS)}; without it job, on several nodes pytorchjob.",
        ),
    )

    def check(self, job: LaunchJob) -> None:
        """Require a volume, a kind that can do it, and inputs that fit into a ConfigMap."""
        kind = _kind(job)
        if kind not in kubeflow.CONTAINERS:
            raise LlmtuneError(f"--kind {kind}: expected one of {', '.join(kubeflow.CONTAINERS)}")
        if (kind == "job" and job.nodes > 1) or (kind == "pytorchjob" and job.nodes == 1):
            other = "pytorchjob or trainjob" if job.nodes > 1 else "job or trainjob"
            raise LlmtuneError(f"--kind {kind}: --nodes is {job.nodes}; expected {other}")
        if job.store is None or not NAME.fullmatch(job.store):
            given = "--on k8s" if job.store is None else f"--store {job.store}"
            raise LlmtuneError(f"{given}: give --store CLAIM, {self.store_help}")
        sizes = {name: _size(path) for name, path in job.inputs.items()}
        if sum(sizes.values()) > 20 * MAX_MAP_BYTES or len(_pack(job)) > MAX_MAP_BYTES:
            largest = max(sizes, key=sizes.__getitem__)
            raise LlmtuneError(
                f"{largest}: {format_size(sizes[largest])} of files here are more than a manifest "
                f"can carry; put it on the volume {job.store} and name it by its path there "
                f"({VOLUME}/...), or use a hub id"
            )

    def run_dir(self, run_dir: Path, store: str | None) -> str:
        """Return its place on the volume."""
        return f"{VOLUME}/{run_dir.absolute().name}"

    def files(self, job: LaunchJob) -> dict[str, str]:
        """Return the manifest, a pod that shows the volume, and the script that copies from it."""
        packed = base64.b64encode(_pack(job)).decode()
        inputs: Value = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self._metadata(job, f"{job.name}-files"),
            "binaryData": {PACKED: packed},
        }
        fetch: Value = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": self._metadata(job, f"{job.name}-fetch"),
            "spec": {
                "restartPolicy": "Never",
                "containers": [
                    {
                        "name": "fetch",
                        "image": job.option("image") or IMAGE,
                        "command": ["sleep", "3600"],
                        "volumeMounts": [{"name": "run", "mountPath": VOLUME}],
                    }
                ],
                "volumes": [_claim(job)],
            },
        }
        parts = [inputs, *self._jobs(job)]
        return {
            self.file: dump_yaml(*parts),
            "fetch.yaml": dump_yaml(fetch),
            FETCH_FILE: script(self._fetch_lines(job)),
        }

    def _jobs(self, job: LaunchJob) -> list[Value]:
        metadata, kind = self._metadata(job, job.name), _kind(job)
        if kind == "pytorchjob":
            return [kubeflow.pytorch_job(job, metadata, self._template(job, None))]
        template = self._template(job, "Never")
        if kind == "trainjob":
            return kubeflow.train_job(job, metadata, template)
        spec = {
            "backoffLimit": kubeflow.RETRIES,
            "podFailurePolicy": kubeflow.pod_failure_policy(kubeflow.CONTAINERS[kind]),
            "template": template,
        }
        return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}]

    def _template(self, job: LaunchJob, restart: str | None) -> Value:
        limits: Value = {"nvidia.com/gpu": job.gpus} if job.gpus else {}
        secrets = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": _secret(job), "key": name}}}
            for name in job.env
        ]
        container: Value = {
            "name": kubeflow.CONTAINERS[_kind(job)],
            "image": job.option("image") or IMAGE,
            "command": ["bash", "-c", "\n".join(self._lines(job))],
            **({"env": secrets} if secrets else {}),
            **({"resources": {"limits": limits}} if limits else {}),
            "volumeMounts": [
                {"name": "run", "mountPath": VOLUME},
                {"name": "files", "mountPath": FILES},
                {"name": "memory", "mountPath": "/dev/shm"},
            ],
        }
        volumes: list[Value] = [
            _claim(job),
            {"name": "files", "configMap": {"name": f"{job.name}-files"}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ]
        return {
            "metadata": {"labels": {"app": "llmtune", "llmtune-job": job.name}},
            "spec": {
                **({"restartPolicy": restart} if restart else {}),
                "terminationGracePeriodSeconds": GRACE_SECONDS,
                "containers": [container],
                "volumes": volumes,
            },
        }

    def _lines(self, job: LaunchJob) -> list[str]:
        install = job.install_lines("/tmp/llmtune-venv")
        python = "/tmp/llmtune-venv/bin/python" if install else "python"
        command = job.command(
            CONFIG_FILE,
            python=python,
            node_rank='"${PET_NODE_RANK:-$RANK}"',
            address='"${PET_MASTER_ADDR:-$MASTER_ADDR}"',
            temporary_code=kubeflow.TEMPORARY if _kind(job) == "pytorchjob" else None,
        )
        return [
            "set -euo pipefail",
            "mkdir -p /tmp/llmtune",
            "cd /tmp/llmtune",
            f"tar -xzf {FILES}/{PACKED}",
            *job.require_lines(),
            *([f"trap 'exit {kubeflow.TEMPORARY}' ERR", *install] if install else []),
            f"exec {command}",
        ]

    def _fetch_lines(self, job: LaunchJob) -> list[str]:
        kubectl = shlex.join(self._kubectl(job))
        pod = f"{job.name}-fetch"
        here = shlex.quote(str(job.local_run_dir.absolute()))
        manifest = shlex.quote(str(job.folder.absolute() / "fetch.yaml"))
        return [
            f"{kubectl} apply -f {manifest}",
            f"trap '{kubectl} delete --wait=false pod {pod}' EXIT",
            f"{kubectl} wait --for=condition=Ready --timeout=600s pod/{pod}",
            f"mkdir -p {here}",
            f"{kubectl} cp {shlex.quote(f'{pod}:{job.run_dir}')} {here}",
        ]

    def _kubectl(self, job: LaunchJob) -> list[str]:
        namespace = job.option("namespace")
        return [self.program, *(["--namespace", namespace] if namespace else [])]

    def _metadata(self, job: LaunchJob, name: str) -> Value:
        namespace = job.option("namespace")
        return {
            "name": name,
            **({"namespace": namespace} if namespace else {}),
            "labels": {"app": "llmtune", "llmtune-job": job.name},
        }

    def submit_command(self, job: LaunchJob) -> list[str]:
        """Return kubectl with the manifest."""
        return [*self._kubectl(job), "apply", "-f", str(job.folder / self.file)]

    def notes(self, job: LaunchJob) -> list[str]:
        """Return what must be in the cluster, and how the run comes back."""
        lines = [f"the claim {job.store} must be there; the run is kept on it in {job.run_dir}"]
        if job.env:
            values = " ".join(f'--from-literal={name}="${name}"' for name in job.env)
            create = shlex.join(self._kubectl(job))
            lines.append(f"once: {create} create secret generic {_secret(job)} {values}")
        if operator := kubeflow.OPERATORS.get(_kind(job)):
            lines.append(f"needs {operator} in the cluster")
        if job.nodes > 1:
            lines.append(f"the claim {job.store} must be ReadWriteMany")
        return [*lines, f"the run comes back with: bash {job.folder / FETCH_FILE}"]


def _kind(job: LaunchJob) -> str:
    return job.option("kind") or ("job" if job.nodes == 1 else "pytorchjob")


def _claim(job: LaunchJob) -> Value:
    return {"name": "run", "persistentVolumeClaim": {"claimName": job.store}}


def _secret(job: LaunchJob) -> str:
    return f"{job.name}-env"


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def _pack(job: LaunchJob) -> bytes:
    """Return config and inputs as a compressed archive, the same for the same files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as archive:
        config = tarfile.TarInfo(CONFIG_FILE)
        content = job.config_text.encode()
        config.size = len(content)
        archive.addfile(config, io.BytesIO(content))
        for name, path in sorted(job.inputs.items()):
            archive.add(path, name, filter=_anonymous)
    return gzip.compress(packed.getvalue(), mtime=0)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
