"""Low-rank factors that start from the base's own weight, from training rows, or from both.

PiSSA, OLoRA and CorDA take the start out of the base: W' = (W - s B0 A0) + s B A. Here W stays, and
the adapter has twice the rank: A and B, which are trained, beside A0 and -B0, which are not. That
is the same function, and the plain LoRA that peft's own conversion makes of it; nothing is
rewritten or rounded, so it works over a quantized base, and the adapter switched off is the base.
EVA only says where A begins; B is zero.

Widths: R is the rank, O and I those of the layer, T the tokens of a row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llmtune.errors import LlmtuneError
from llmtune.models.decoder import decoder_of
from llmtune.models.quantization.describe import dense_weight

ITERATIONS = "_niter_"
DAMPING = 0.01
"""Of a covariance before it is inverted, in parts of its mean diagonal; doubled until it can be."""
INVERSE_ERROR = 0.05
TABLE_BYTES = 2 << 30
"""Covariances that are collected in one pass over the rows."""
FLOAT32 = 4


class SampleRow(NamedTuple):
    """A training row that is run before training."""

    input_ids: Sequence[int]
    is_trained: Sequence[bool]
    """Whether the loss is taken at a token."""


@dataclass(frozen=True)
class Sample:
    """Rows, and the model with a fresh adapter that they are run through."""

    model: PeftModel
    rows: Sequence[SampleRow]

    def run(
        self,
        layers: Mapping[str, BaseTunerLayer],
        take: Callable[[str, Tensor], None],
        *,
        only_trained: bool,
    ) -> None:
        """Run every row, and hand on what the layers are given for it: their name, and [T, I].

        Args:
            layers: the adapted layers by name.
            take: is called once for each row and layer.
            only_trained: leave out the tokens at which no loss is taken.
        """
        base = self.model.get_base_model()
        embedding = base.get_input_embeddings()
        device = next(embedding.parameters()).device
        kept = torch.ones(0, dtype=torch.bool, device=device)

        def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                inputs_TI = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
                num_heard = len(inputs_TI)
                if num_heard == 0 or (only_trained and num_heard != len(kept)):
                    raise LlmtuneError(
                        f"adapter.init: {name} is given {num_heard} of the {len(kept)} tokens of a "
                        "row; leave it out of target_modules, or choose adapter.init default"
                    )
                take(name, inputs_TI[kept].float() if only_trained else inputs_TI.float())

            return hear

        handles = [
            layer.get_base_layer().register_forward_pre_hook(listen(name))
            for name, layer in layers.items()
        ]
        was_training = self.model.training
        self.model.eval()
        try:
            for row in self.rows:
                kept = torch.tensor(row.is_trained, dtype=torch.bool, device=device)
                ids = torch.tensor([list(row.input_ids)], device=device)
                with torch.no_grad():
                    decoder_of(base)(input_ids=ids, use_cache=False)
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()


def start_from_weight(layer: BaseTunerLayer, init: str, *, adapter: str = "default") -> None:
    """Set the factors of a layer of twice the rank, and keep the second half as it is.

    A model without weights (on `meta`) only has shapes, and is left alone.

    Args:
        layer: peft's LoRA linear.
        init: `olora`, `pissa`, or `pissa_niter_N` (a fast decomposition of N iterations).
        adapter: its name in the layer.
    """
    weight_OI = _weight_of(layer)
    if weight_OI is not None:
        rank = layer.lora_A[adapter].weight.shape[0] // 2
        _keep_twins(layer, adapter, *factors_of_weight(weight_OI, init, rank, _scaling(layer)))


def start_from_rows(layers: Mapping[str, BaseTunerLayer], init: str, sample: Sample | None) -> None:
    """Set the factors of all layers by what they are given for training rows.

    A model without weights is left alone.

    Args:
        layers: peft's LoRA linears by name; for `corda` of twice the rank.
        init: `eva`, `corda` or `corda_kpm`.
        sample: the rows, and the model whose layers these are.

    Raises:
        LlmtuneError: there are no rows, they hold too little, or what a layer is given is not
            finite.
    """
    if all(layer.get_base_layer().weight.is_meta for layer in layers.values()):
        return
    if sample is None or not sample.rows:
        raise LlmtuneError(f"adapter.init={init} starts from training rows, and there are none")
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for group in _groups(layers):
        if init == "eva":
            components = principal_inputs(group, sample)
            found |= {name: (a_RI, None) for name, a_RI in components.items()}
            continue
        for name, covariance_II in input_covariances(group, sample).items():
            layer = layers[name]
            weight_OI = _weight_of(layer)
            assert weight_OI is not None, "rows were run"
            rank = layer.lora_A["default"].weight.shape[0] // 2
            found[name] = factors_by_inputs(
                weight_OI, covariance_II, rank, _scaling(layer), keeps=init == "corda_kpm"
            )
    for name, (a_RI, b_OR) in found.items():
        if b_OR is not None:
            _keep_twins(layers[name], "default", a_RI, b_OR)
            continue
        with torch.no_grad():
            layers[name].lora_A["default"].weight.copy_(a_RI)


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


def factors_by_inputs(
    weight_OI: Tensor, covariance_II: Tensor, rank: int, scaling: float, *, keeps: bool
) -> tuple[Tensor, Tensor]:
    """Return A0 [R, I] and B0 [O, R] of a weight in float32, as its inputs see it.

    CorDA (arXiv:2406.05223): W C = U S V, of which W = U S (V C^-1). The largest components are
    what the rows use most, so the task's; the smallest leave what the rows use as it is (`keeps`).
    """
    diagonal = covariance_II.diagonal().mean() * torch.eye(
        covariance_II.shape[0], device=covariance_II.device
    )
    damping = DAMPING
    while True:
        damped_II = covariance_II + damping * diagonal
        inverse_II = torch.linalg.inv(damped_II)
        unit_II = damped_II @ inverse_II
        unit_II.diagonal().sub_(1)
        if unit_II.norm() < INVERSE_ERROR:
            break
        damping *= 2
    u_OK, values_K, v_KI = torch.linalg.svd(weight_OI @ damped_II, full_matrices=False)
    chosen = slice(-rank, None) if keeps else slice(rank)
    root_R = (values_K[chosen] / scaling).sqrt()
    return root_R[:, None] * (v_KI[chosen] @ inverse_II), u_OK[:, chosen] * root_R


def input_covariances(layers: Mapping[str, BaseTunerLayer], sample: Sample) -> dict[str, Tensor]:
    """Return the mean of X' X of each layer over the rows, X [T, I] divided by its largest number.

    Raises:
        LlmtuneError: one is not finite.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs_TI: Tensor) -> None:
        scaled = inputs_TI / inputs_TI.max().abs()
        product = scaled.T @ scaled
        sums[name] = sums[name].add_(product) if name in sums else product

    sample.run(layers, add, only_trained=False)
    _require_numbers(sums, layers)
    return {name: total / len(sample.rows) for name, total in sums.items()}


def principal_inputs(layers: Mapping[str, BaseTunerLayer], sample: Sample) -> dict[str, Tensor]:
    """Return the first R principal components [R, I] of what each layer is given where it learns.

    EVA (arXiv:2410.07170) without its exchange of ranks between layers (rho = 1).

    Raises:
        LlmtuneError: there are fewer trained tokens than the rank, or one is not finite.
    """
    products: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    num_tokens = sum(sum(row.is_trained) for row in sample.rows)

    def add(name: str, inputs_TI: Tensor) -> None:
        product, total = inputs_TI.T @ inputs_TI, inputs_TI.sum(dim=0)
        products[name] = products[name].add_(product) if name in products else product
        sums[name] = sums[name].add_(total) if name in sums else total

    sample.run(layers, add, only_trained=True)
    _require_numbers(products, layers)
    found = {}
    for name, product_II in products.items():
        rank = layers[name].lora_A["default"].weight.shape[0]
        if num_tokens <= rank:
            raise LlmtuneError(
                f"adapter.init: the {len(sample.rows)} rows that it looks at train "
                f"{num_tokens} tokens, and rank {rank} needs more: raise adapter.init_rows"
            )
        mean_I = sums[name] / num_tokens
        centered_II = product_II / num_tokens - mean_I[:, None] * mean_I
        found[name] = torch.linalg.eigh(centered_II).eigenvectors.T.flip(0)[:rank].contiguous()
    return found


def _groups(layers: Mapping[str, BaseTunerLayer]) -> Iterator[dict[str, BaseTunerLayer]]:
    """Yield the layers in groups whose tables fit into memory together."""
    group: dict[str, BaseTunerLayer] = {}
    num_bytes = 0
    for name, layer in layers.items():
        size = FLOAT32 * layer.in_features**2
        if group and num_bytes + size > TABLE_BYTES:
            yield group
            group, num_bytes = {}, 0
        group[name] = layer
        num_bytes += size
    yield group


def _require_numbers(tables: Mapping[str, Tensor], layers: Mapping[str, BaseTunerLayer]) -> None:
    for name in layers:
        if name not in tables:
            raise LlmtuneError(
                f"adapter.init: no training row reaches {name}; leave it out of target_modules"
            )
        if not bool(tables[name].isfinite().all()):
            raise LlmtuneError(
                f"adapter.init: {name} is given numbers that are not finite; choose adapter.init "
                "default or pissa"
            )


def _weight_of(layer: BaseTunerLayer) -> Tensor | None:
    """Return a layer's weight [O, I] in float32; None of a model without weights."""
    base = layer.get_base_layer()
    read = dense_weight(base)
    stored = base.weight if read is None else read()
    if stored.is_meta:
        return None
    weight_OI = stored.detach().float()
    return weight_OI.T if read is None and layer.fan_in_fan_out else weight_OI


def _scaling(layer: BaseTunerLayer, adapter: str = "default") -> float:
    return float(layer.scaling[adapter])


def _keep_twins(layer: BaseTunerLayer, adapter: str, a_RI: Tensor, b_OR: Tensor) -> None:
    """Set factors of twice the rank to the start and its opposite, which has no gradient."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    rank = a_RI.shape[0]
    with torch.no_grad():
        a.copy_(torch.cat([a_RI, a_RI]))
        b.copy_(torch.cat([b_OR, -b_OR], dim=1))
    if a.requires_grad:
        a.register_hook(lambda gradient: _first_rows(gradient, rank))
        b.register_hook(lambda gradient: _first_rows(gradient.T, rank).T)


def _first_rows(gradient: Tensor, num_rows: int) -> Tensor:
    """Return a gradient without that of the rows after the first ones."""
    kept = torch.zeros_like(gradient)
    kept[:num_rows] = gradient[:num_rows]
    return kept
