"""Kubeflow's kinds of job: PyTorchJob of its Training Operator, TrainJob of Trainer 2 (light)."""

from collections.abc import Mapping
from types import MappingProxyType

from llmtune.errors import LlmtuneError
from llmtune.launching.base import LaunchJob

Value = dict[str, object]

RETRIES = 6
TEMPORARY = 143
"""The exit code of what is to be tried again, for those that take any up to 127 for permanent."""
GROUP = "trainer.kubeflow.org"
CONTAINERS = MappingProxyType({"job": "llmtune", "pytorchjob": "pytorch", "trainjob": "node"})
"""By kind: what the container must be called, so that its operator finds it."""
OPERATORS = MappingProxyType(
    {
        "pytorchjob": "Kubeflow's Training Operator 1 (pytorchjobs.kubeflow.org)",
        "trainjob": f"Kubeflow Trainer 2 (trainjobs.{GROUP})",
    }
)


def pod_failure_policy(container: str) -> Value:
    """Return which ends of a pod end the job, and which do not count."""
    wrong_input = {"containerName": container, "operator": "In"}
    lost = {"type": "DisruptionTarget", "status": "True"}
    return {
        "rules": [
            # wrong input stays wrong
            {
                "action": "FailJob",
                "onExitCodes": {**wrong_input, "values": [LlmtuneError.exit_code]},
            },
            # a pod that was taken away has not failed
            {"action": "Ignore", "onPodConditions": [lost]},
        ]
    }


def pytorch_job(job: LaunchJob, metadata: Value, template: Value) -> Value:
    """Return a PyTorchJob: a pod whose exit code is below 128 is not started again."""
    part = {"restartPolicy": "ExitCode", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": {
            "runPolicy": {"backoffLimit": RETRIES, "cleanPodPolicy": "Running"},
            "nprocPerNode": str(max(job.gpus, 1)),
            "pytorchReplicaSpecs": {
                "Master": {"replicas": 1, **part},
                "Worker": {"replicas": job.nodes - 1, **part},
            },
        },
    }


def train_job(job: LaunchJob, metadata: Value, template: Mapping[str, object]) -> list[Value]:
    """Return a TrainJob, and before it the runtime it refers to, which holds the pods.

    All pods are started again if one of them fails, but not if its input is wrong.
    """
    pods: Value = {
        "name": CONTAINERS["trainjob"],
        "template": {
            "metadata": {"labels": {f"{GROUP}/trainjob-ancestor-step": "trainer"}},
            "spec": {
                "backoffLimit": 0,
                "podFailurePolicy": pod_failure_policy(CONTAINERS["trainjob"]),
                "template": template,
            },
        },
    }
    wrong_input = {
        "name": "wrong-input",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    runtime: Value = {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": metadata,
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": {"maxRestarts": RETRIES, "rules": [wrong_input]},
                    "replicatedJobs": [pods],
                }
            },
        },
    }
    reference = {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": job.name}
    train: Value = {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {"runtimeRef": reference, "trainer": {"numNodes": job.nodes}},
    }
    return [runtime, train]
