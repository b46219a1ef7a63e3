"""What this machine can do: the device, the precision and the attention a base is loaded with."""

import ctypes
import gc
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import LlmtuneError
from llmtune.io.native_libraries import threads_sleep
from llmtune.io.stopping import catch_interruption
from llmtune.models.config import ModelConfig

# Trained in bfloat16 with activations beyond float16's 65504: float16 gives inf, then NaN.
SLOW_RATIO = 4.0
"""How many times slower than float32 a 16-bit product is where the CPU only emulates it; where it
is native it is faster, so a busy machine does not change the answer."""
PRODUCT_SIZE = 256
PRODUCT_TRIALS = 5
PRODUCT_PAUSES = (0, 0.01, 0.05, 0.2)
"""Seconds before each comparison; the first that finds no large difference ends them."""
UNSAFE_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "gemma3n", "t5gemma")


def choose_device(wanted: str) -> torch.device:
    """Return the one device to use; `auto` is the current GPU, or the CPU where there is none.

    Raises:
        LlmtuneError: a GPU was asked for and there is none, or not that many.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = (
            f"PyTorch {torch.__version__} was built without CUDA"
            if torch.version.cuda is None and torch.version.hip is None
            else "PyTorch finds no usable GPU or driver"
        )
        raise LlmtuneError(
            f"model.device={wanted}: {why}. Use model.device=auto or cpu; "
            "`llmtune doctor` says more."
        )
    device = torch.device(wanted)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise LlmtuneError(
            f"model.device={wanted}: this machine has {torch.cuda.device_count()} GPU(s), "
            "numbered from 0."
        )
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """Return what a device is called: the GPU's model, or cpu."""
    return str(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def choose_dtype(wanted: str, device: torch.device, model_type: str) -> torch.dtype:
    """Return the base's precision.

    `auto` is bfloat16; on a GPU without it float16, on a CPU that only emulates it float32.

    Raises:
        LlmtuneError: bfloat16 was asked for and the GPU has none, or the precision is float16 and
            the model is known to overflow in it.
    """
    has_bfloat16 = device.type != "cuda" or _gpu_has_bfloat16(device)
    if wanted == "auto" and device.type == "cpu":
        wanted = "float32" if cpu_emulates_bfloat16() else "bfloat16"
    elif wanted == "auto":
        wanted = "bfloat16" if has_bfloat16 else "float16"
    if wanted == "bfloat16" and not has_bfloat16:
        raise LlmtuneError(
            f"model.dtype=bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16. "
            "Use model.dtype=auto (float16 there) or float32."
        )
    if wanted == "float16" and model_type in UNSAFE_IN_FLOAT16:
        raise LlmtuneError(
            f"model.dtype=float16: {model_type} models overflow in float16 and give NaN. "
            "Use model.dtype=bfloat16 where the hardware has it, else float32."
        )
    return getattr(torch, wanted)


@cache
def cpu_emulates_bfloat16() -> bool:
    """Whether a matrix product takes this CPU far longer in bfloat16 than in float32 (timed).

    A product that was held up once must not decide in which precision a model is computed: it
    must be slow each time, over some time.
    """
    for pause in PRODUCT_PAUSES:
        time.sleep(pause)
        if _product_seconds(torch.bfloat16) <= SLOW_RATIO * _product_seconds(torch.float32):
            return False
    return True


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest of a few timings of one product."""
    factor = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
    factor @ factor  # the first call also prepares the kernel
    seconds = []
    for _ in range(PRODUCT_TRIALS):
        started = time.perf_counter()
        factor @ factor
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def why_threads_wait(device: torch.device) -> str | None:
    """Say what to export if this process has more threads than processors to run them on.

    Threads that spin while they wait for each other: with one of them off its processor, all the
    others burn theirs. Threads that sleep only get less done, as any process beside other work.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or threads_sleep():
        return None
    allowed = _usable_processors()
    others = min(max(os.getloadavg()[0] - 1, 0.0), allowed)  # one is this process
    free = max(round(allowed - others), 1)
    if threads <= free:
        return None
    what = (
        f"this process may use {allowed:g} processors"
        if threads > allowed
        else f"other work keeps about {others:.0f} of {allowed:g} processors busy"
    )
    return (
        f"{what}, and PyTorch runs {threads} threads, which wait for each other. Training may be "
        f"many times faster after: export OMP_NUM_THREADS={free} OMP_WAIT_POLICY=passive"
    )


def _usable_processors() -> float:
    """Return the processors that this process may use, a container's limit included."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else min(count, max(int(quota) / int(period), 1.0))
    except (OSError, ValueError):
        return count


def choose_attention(
    config: ModelConfig, device: torch.device, model_config: Mapping[str, Any]
) -> str | None:
    """Return the attention to ask transformers for; None leaves the choice to it.

    Raises:
        LlmtuneError: flash_attention_2 was asked for and cannot run here.
    """
    text_config = model_config.get("text_config", model_config)
    if config.attention == "auto":
        # sdpa leaves the soft cap out, silently in some versions
        return "eager" if text_config.get("attn_logit_softcapping") else None
    if config.attention == "flash_attention_2":
        if device.type != "cuda":
            raise LlmtuneError("model.attention=flash_attention_2 needs a GPU. Use auto or sdpa.")
        if importlib.util.find_spec("flash_attn") is None:
            raise LlmtuneError(
                "model.attention=flash_attention_2: the package flash_attn is not installed. "
                "Install it, or use model.attention=auto."
            )
    return config.attention


def _gpu_has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def release_memory() -> None:
    """Return what earlier work freed: a trained model in cycles, the allocator's empty pages.

    glibc keeps the pages of many small freed blocks; after a short training of a 135M model that
    was half of the process. Other C libraries have no such call and are left alone.

    A Ctrl-C meanwhile is raised at the end: Python would raise it in the first finalizer that the
    collection calls, where exceptions are lost.
    """
    with catch_interruption() as interruption:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)
    if interruption.signal_name:
        raise KeyboardInterrupt
