"""What a launcher (torchrun, accelerate launch, srun) says of a process by its environment."""

import os
import socket

from llmtune.errors import LlmtuneError

LAUNCHER_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MASTER_KEYS = ("MASTER_ADDR", "MASTER_PORT")
OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def read_place_here(world_size: int) -> tuple[int, int]:
    """Return which process of how many on this machine this one is, of `world_size` in all.

    Raises:
        LlmtuneError: the launcher's variables are not complete.
    """
    missing = [key for key in (*LAUNCHER_KEYS, *MASTER_KEYS) if not os.environ.get(key)]
    if missing:
        raise LlmtuneError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} "
            f"{'are' if missing[1:] else 'is'} not set: start the command by torchrun or "
            "accelerate launch, or unset WORLD_SIZE to run in one process"
        )
    place = _read_place("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    _read_place("RANK", "WORLD_SIZE")
    read_number("MASTER_PORT", 0)
    return place


def take_out_accelerate() -> None:
    """Take out what `accelerate launch` has set, also for one process: trl would obey it.

    Precision and compilation are the config's.

    Raises:
        LlmtuneError: it asks for an engine that divides the work in its own way.
    """
    for key, engine in OTHER_ENGINES.items():
        if os.environ.get(key, "false").lower() in ("1", "true"):
            raise LlmtuneError(
                f"accelerate is set to use {engine}, and this run sums the gradients itself: start "
                "it by `accelerate launch --multi_gpu`, or by torchrun; to divide the base among "
                "the processes, set train.shard=full"
            )
    for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[key]


def read_number(key: str, default: int) -> int:
    """Return a variable's whole number, or the default if it is not set.

    Raises:
        LlmtuneError: it is not a number.
    """
    text = os.environ.get(key) or str(default)
    try:
        return int(text)
    except ValueError:
        raise LlmtuneError(f"the environment variable {key} is {text!r}, not a number") from None


def _read_place(key: str, size_key: str) -> tuple[int, int]:
    """Return which one of how many this process is."""
    place, size = read_number(key, 0), read_number(size_key, 1)
    if not 0 <= place < size:
        raise LlmtuneError(f"{key} is {place} and {size_key} is {size}; expected 0 to {size - 1}")
    return place, size


def take_card(local_rank: int, num_here: int) -> None:
    """Hide all GPUs but the one of this process, before any of them is used.

    Raises:
        LlmtuneError: there are fewer GPUs than processes.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    slices = visible.split(",") if visible and visible.startswith("MIG-") else []
    count = len(slices) or torch.cuda.device_count()  # CUDA shows a process one slice at most
    if count <= 1:  # none, or the launcher has given each process its own
        return
    if count < num_here:
        raise LlmtuneError(
            f"{num_here} processes were started on {socket.gethostname()}, which has {count} GPUs: "
            f"start {count}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank]
