"""A trial of 4-bit quantization: one small layer, forward and backward, on the device in use."""

import torch
from bitsandbytes.nn import Linear4bit

from llmtune.models.hardware import choose_device

TRIAL_WIDTH = 64


def try_quantization() -> str | None:
    """Quantize a layer to NF4 and pass a gradient through it; return what went wrong, or None."""
    device = choose_device("auto")
    try:
        layer = Linear4bit(TRIAL_WIDTH, TRIAL_WIDTH, bias=False, quant_type="nf4").to(device)
        x = torch.ones(2, TRIAL_WIDTH, device=device, requires_grad=True)
        layer(x).sum().backward()
    except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
        return f"bitsandbytes fails on {device}: {error}"
    if x.grad is None or not torch.isfinite(x.grad).all():
        return f"bitsandbytes on {device} passes no gradient through a 4-bit layer"
    return None
