"""Norms and gated MLPs that keep less for the backward pass, in place of the library's forwards.

Only the forward methods of single modules are replaced, inside a context, and only where a probe
on the module itself gives what the library's forward gives.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from llmtune.adapters.base import Adapter
from llmtune.adapters.fused import compute_dtype, describe_linear, is_fused
from llmtune.adapters.live import live_method
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.ops.lora_linear import AdapterCopies, LoraLinear
from llmtune.ops.rms_norm import rms_norm
from llmtune.ops.swiglu import swiglu_lora_linear

PROBE_TOKENS = 8
# Largest accepted difference to the library's output, relative to the largest value.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Forward = Callable[[Tensor], Tensor]


class FusedBlocks(NamedTuple):
    """How many norms and MLPs run our forward, and why others do not."""

    num_norms: int
    num_mlps: int
    stock: dict[str, int]
    """Reason -> number of norms and MLPs that keep the library's forward."""

    def describe(self) -> str:
        """Return it in words, for the terminal and the manifest."""
        parts = [f"{self.num_norms} norms and {self.num_mlps} MLPs fused"]
        parts += [f"{count} stock ({reason})" for reason, count in sorted(self.stock.items())]
        return ", ".join(parts)


@contextmanager
def fused_blocks(model: PeftModel) -> Iterator[FusedBlocks]:
    """Replace what can be replaced inside; outside it is the library's again.

    Enter it inside `fused_lora`: an MLP is replaced only if its down projection is fused.
    """
    norms: list[nn.Module] = []
    mlps: list[_GatedMlp] = []
    stock: Counter[str] = Counter()
    for module in model.modules():
        try:
            with probing():
                if _is_norm(module):
                    _require_equal(module, _norm_forward(module), module.weight.shape[0])
                    norms.append(module)
                elif _is_gated_mlp(module):
                    mlp = _GatedMlp(module, live_method(model))
                    _require_equal(module, mlp.forward, module.gate_proj.in_features)
                    mlps.append(mlp)
        except ProbeFailedError as error:
            stock[f"{type(module).__name__}: {error}"] += 1
    for norm in norms:
        norm.forward = _norm_forward(norm)
    for mlp in mlps:
        mlp.module.forward = mlp.forward

    # Fused optimizers write without advancing the tensors' version, so the copies are marked stale.
    def forget(*_: object) -> None:
        for mlp in mlps:
            mlp.copies.forget()

    hook = register_optimizer_step_post_hook(forget)
    try:
        yield FusedBlocks(len(norms), len(mlps), dict(stock))
    finally:
        hook.remove()
        for module in (*norms, *(mlp.module for mlp in mlps)):
            del module.forward


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "RMSNorm" in type(module).__name__
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not weight.requires_grad
        and _eps(module) is not None
        and _is_untouched(module)
    )


def _eps(norm: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


def _norm_forward(norm: nn.Module) -> Forward:
    eps = _eps(norm)
    assert eps is not None, "asked of norms only"

    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, norm.weight, eps)

    return forward


def _is_gated_mlp(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    down = parts[-1]
    return (
        all(isinstance(part, nn.Module) for part in parts)
        and _is_silu(getattr(module, "act_fn", None))
        and is_fused(down)
        and hasattr(module.gate_proj, "in_features")
        and _is_untouched(module)
    )


def _is_silu(activation: object) -> bool:
    """Try it: libraries have several classes of the same function."""
    points = torch.linspace(-4, 4, 33)
    return isinstance(activation, nn.Module) and torch.equal(
        activation(points), nn.functional.silu(points)
    )


def _is_untouched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return "forward" not in module.__dict__ and not any(hooks)


class _GatedMlp:
    """One MLP's forward with its down projection's adapter."""

    def __init__(self, module: nn.Module, method: type[Adapter]) -> None:
        self.module = module
        self.copies = AdapterCopies()
        self._linears: tuple[LoraLinear] = (describe_linear(module.down_proj, method),)

    def forward(self, x: Tensor) -> Tensor:
        module = self.module
        down = module.down_proj
        gate, up = module.gate_proj(x), module.up_proj(x)
        if down.disable_adapters or down.merged:
            return down(module.act_fn(gate) * up)
        adapter = self.copies.read(self._linears, compute_dtype(gate))
        return swiglu_lora_linear(gate, up, self._linears[0], adapter)


@torch.no_grad()
def _require_equal(module: nn.Module, forward: Forward, width: int) -> None:
    """Compare our forward with the library's on noise.

    Its tokens are of very different sizes, which shows what is added before the root, and so are
    its features, which shows norms over groups of them.

    Raises:
        ProbeFailedError: they differ, or the library's takes more than one input.
    """
    parameters = inspect.signature(type(module).forward).parameters
    if len(parameters) != len(("self", "hidden_states")):
        *_, last = parameters
        raise ProbeFailedError(f"it is also given {last}")
    weight = next(module.parameters())
    dtype = weight.dtype if weight.dtype in TOLERANCES else torch.float32
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    noise = torch.randn(1, PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))
    noise *= torch.logspace(-2, 1, PROBE_TOKENS)[:, None] * torch.linspace(0.2, 2, width)
    inputs = noise.to(weight.device, dtype)
    theirs, ours = type(module).forward(module, inputs), forward(inputs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ProbeFailedError("its outputs are of a different shape or precision")
    difference = (ours.float() - theirs.float()).abs().amax(-1)
    size = theirs.float().abs().amax(-1)
    if not bool((difference <= TOLERANCES.get(dtype, 1e-5) * size).all()):
        raise ProbeFailedError("it computes something different")
