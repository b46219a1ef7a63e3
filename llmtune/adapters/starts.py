"""Low-rank factors that start from the base's own weight (PiSSA, OLoRA), the base left as it is.

Both methods take the start out of the base: W' = (W - s B0 A0) + s B A. Here W stays, and the
adapter has twice the rank: A and B, which are trained, beside A0 and -B0, which are not. That is
the same function, and the plain LoRA that peft's own conversion makes of it; nothing is rewritten
or rounded, so it works over a quantized base, and the adapter switched off is the base.

Widths: R is the rank, O and I those of the layer.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from llmtune.models.quantization.describe import dense_weight

ITERATIONS = "_niter_"


def start_from_weight(layer: BaseTunerLayer, init: str, *, adapter: str = "default") -> None:
    """Set the factors of a layer of twice the rank, and keep the second half as it is.

    A model without weights (on `meta`) only has shapes, and is left alone.

    Args:
        layer: peft's LoRA linear.
        init: `olora`, `pissa`, or `pissa_niter_N` (a fast decomposition of N iterations).
        adapter: its name in the layer.
    """
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    rank = a.shape[0] // 2
    base = layer.get_base_layer()
    read = dense_weight(base)
    stored = base.weight if read is None else read()
    if stored.is_meta:
        return
    weight_OI = stored.detach().float()
    weight_OI = weight_OI.T if read is None and layer.fan_in_fan_out else weight_OI
    a_RI, b_OR = factors_of_weight(weight_OI, init, rank, float(layer.scaling[adapter]))
    with torch.no_grad():
        a.copy_(torch.cat([a_RI, a_RI]))
        b.copy_(torch.cat([b_OR, -b_OR], dim=1))
    if a.requires_grad:
        a.register_hook(lambda gradient: _first_rows(gradient, rank))
        b.register_hook(lambda gradient: _first_rows(gradient.T, rank).T)


def factors_of_weight(
    weight_OI: Tensor, init: str, rank: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return A0 [R, I] and B0 [O, R] of a weight in float32.

    PiSSA (arXiv:2404.02948): scaling * B0 A0 is the weight's best approximation of that rank.
    OLoRA (arXiv:2406.01775): the first columns and rows of its QR decomposition.
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight_OI)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if ITERATIONS in init:
        u, values, v = torch.svd_lowrank(weight_OI, rank, niter=int(init.split(ITERATIONS)[1]))
        v_KI = v.T
    else:
        u, values, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = (values[:rank] / scaling).sqrt()
    return root_R[:, None] * v_KI[:rank], u[:, :rank] * root_R


def _first_rows(gradient: Tensor, num_rows: int) -> Tensor:
    """Return a gradient without that of the rows after the first ones."""
    kept = torch.zeros_like(gradient)
    kept[:num_rows] = gradient[:num_rows]
    return kept
