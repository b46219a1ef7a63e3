"""The driver of a Ray job: one task a node, each running the command that a user types there."""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

RETRIES = 5
"""How often the job continues after Ray lost a node; training resumes from its checkpoint."""
WAIT_SECONDS = 600
ENDING_SECONDS = 60
WRONG_INPUT = 2
INTERRUPTED = 3
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Run a config on the nodes of a cluster; return the exit code of the first that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--env", action="append", default=[])
    given = parser.parse_args(arguments)
    ray.init(log_to_driver=True)
    for attempt in range(RETRIES + 1):
        try:
            return run_once(given.config, given.nodes, given.gpus, given.env)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
            _say(f"lost a node ({type(error).__name__}); attempt {attempt + 2} continues")
    _say(f"lost a node {RETRIES + 1} times; giving up; the same job continues from what is saved")
    return INTERRUPTED


def run_once(config: str, nodes: int, gpus: int, env: Sequence[str]) -> int:
    """Reserve the nodes, start all of them together, and wait for the first that fails."""
    bundle = {"CPU": float(max(gpus, 1)), **({"GPU": float(gpus)} if gpus else {})}
    group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD" if nodes > 1 else "PACK")
    try:
        if not group.wait(WAIT_SECONDS):
            _say(f"no {nodes} nodes with {bundle} were free within {WAIT_SECONDS} s")
            return INTERRUPTED

        def on_node(place: int, function: Any) -> Any:
            return ray.remote(
                num_cpus=bundle["CPU"],
                num_gpus=float(gpus),
                max_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=place
                ),
            )(function)

        address, port = ray.get(on_node(0, find_address).remote())
        tasks = [
            on_node(place, run_node).remote(
                config, (nodes, place, max(gpus, 1)), (address, port), list(env)
            )
            for place in range(nodes)
        ]
        return wait_for(tasks)
    finally:
        ray.util.remove_placement_group(group)


def wait_for(tasks: Sequence[Any]) -> int:
    """Return the first exit code that is not 0, else 0; the others have ended, too, by then."""
    left = list(tasks)
    try:
        while left:
            done, left = ray.wait(left)
            if code := ray.get(done[0]):
                if left:
                    done, left = ray.wait(left, num_returns=len(left), timeout=ENDING_SECONDS)
                    ray.get(done)  # raises if one was lost: that is why this one failed
                return int(code)
        return 0
    finally:
        for task in left:
            ray.cancel(task)
        if left:
            ray.wait(left, num_returns=len(left), timeout=ENDING_SECONDS)


def find_address() -> tuple[str, int]:
    """Return this node's address and a port that is free on it."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        return ray.util.get_node_ip_address(), taken.getsockname()[1]


def run_node(
    config: str, shape: tuple[int, int, int], first: tuple[str, int], env: Sequence[str]
) -> int:
    """Run one node's command; it ends with the task.

    Args:
        config: the file in the job's folder, which Ray has brought to this node.
        shape: nodes, the number of this one, and processes on each.
        first: address and port of the first node.
        env: variables that must be set here.
    """
    if missing := [name for name in env if not os.environ.get(name)]:
        _say(f"{', '.join(missing)}: not set on this node; set it before `ray start`")
        return WRONG_INPUT
    nodes, place, processes = shape
    command = [sys.executable]
    if nodes * processes > 1:
        command += ["-m", "llmtune.launching.torchrun", "--nnodes", str(nodes)]
        command += ["--nproc-per-node", str(processes), "--node-rank", str(place)]
        command += ["--master-addr", first[0], "--master-port", str(first[1])]
    process = subprocess.Popen(
        [*command, "-m", "llmtune", "run", config], preexec_fn=_end_with_parent
    )
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM when Ray's worker dies: else it runs on, and holds the run."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
