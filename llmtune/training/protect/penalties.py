"""Penalties beside the training loss that hold the adapter near its base."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llmtune.adapters.live import live_method
from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.errors import LlmtuneError
from llmtune.io.processes import ALONE, Processes
from llmtune.models.probing import is_out_of_memory
from llmtune.ops.linear_cross_entropy import FrozenHead
from llmtune.ops.linear_kl import linear_kl_divergence
from llmtune.scoring.batches import adapter_disabled
from llmtune.training.batch import move_to
from llmtune.training.loss import LossPath, decoder_hidden
from llmtune.training.objectives.base import MicroBatch, OpenSums
from llmtune.training.protect.config import KEPT_BYTES, KlToBaseConfig, ProtectConfig

BASE_TOLERANCE = 5e-2
"""Largest ratio |h' - h| / |h| of the base's last hidden states (Frobenius norm) after and before
the adapter was attached. On a 16-bit base of 30 layers, fused and stock kernels differ by 0.016;
taking the first singular vector out of one late query weight makes 0.095."""


@dataclass(frozen=True)
class BaseProbe:
    """A few tokens and the base's last hidden states [1, T, D] on them, before any adapter."""

    input_ids: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class ProtectionRequest:
    """What to protect with: the knobs, the rows to hold the model on, and who the base is."""

    config: ProtectConfig
    rows: Sequence[Example] = ()
    probe: BaseProbe | None = None


@torch.no_grad()
def probe_base(model: nn.Module, example: Example) -> BaseProbe:
    """Record what the bare base computes, to be compared once its adapter is attached."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([example.input_ids[:32]], device=device)
    is_training = model.training
    model.eval()
    try:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        model.train(is_training)
    return BaseProbe(ids, hidden)


class Protection:
    """Adds the gradients of the penalties to a step's, and keeps their values for the log."""

    def __init__(
        self,
        model: PeftModel,
        request: ProtectionRequest,
        loss_path: LossPath,
        build: Callable[[Sequence[Example]], MicroBatch],
        *,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        """Check that what is asked for can be done.

        Raises:
            LlmtuneError: the LM head is trained or no plain linear layer, an update has no norm
                to hold down, or the model without its adapter is not the base.
        """
        self._model = model
        self._config = request.config
        self._loss_path = loss_path
        self._build = build
        self._device = model.get_input_embeddings().weight.device
        self._updates = _find_updates(model) if request.config.l2 else []
        self._processes = processes
        self._rows = list(request.rows)
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed))
        self._order = order.tolist()
        self._sums = torch.zeros(4, device=self._device)  # KL, L2, steps, steps with a KL
        self._references: dict[tuple[int, ...], Tensor] = {}
        if request.config.kl_to_base is not None:
            if not loss_path.is_frozen:
                raise LlmtuneError(
                    "protect.kl_to_base needs a frozen linear LM head, but "
                    f"{loss_path.reason}; leave one of the two out"
                )
            if request.probe is not None:
                self._require_same_base(request.probe)

    def add_gradients(
        self, step: int, autocast: Callable[[], AbstractContextManager[object]], scale: float = 1.0
    ) -> None:
        """Run the penalties of a step (counted from 0) forward and backward.

        Several processes share the rows of the KL; the first one alone knows the update's norm.

        Args:
            autocast: enters the precision that the forward pass runs in.
            scale: factor on the loss before backward (a gradient scaler's).
        """
        kl = torch.zeros((), device=self._device)
        penalty = self._config.kl_to_base
        # An adapter that nothing has moved yet is the base: the first of several steps has no KL.
        has_kl = penalty is not None and (step + 1) % penalty.every == 0
        if penalty is not None and has_kl:
            with autocast():
                kl = self._mean_kl(penalty, step // penalty.every)
            if kl.requires_grad:
                (kl * (penalty.weight * penalty.every * scale)).backward()
        norm = torch.zeros((), device=self._device)
        if self._updates and self._processes.is_first:
            norm = squared_update_norm(self._updates)
            (norm * (self._config.l2 * scale)).backward()
        one = torch.full_like(norm, float(self._processes.is_first))
        self._sums += torch.stack([kl.detach().float(), norm.detach(), one, one * has_kl])

    def dry_run(self, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        """Run a step of the longest rows and forget it.

        Raises:
            LlmtuneError: it does not fit the memory.
        """
        order, self._order = self._order, self._longest_first()
        try:
            penalty = self._config.kl_to_base
            self.add_gradients(0 if penalty is None else penalty.every - 1, autocast)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise LlmtuneError(
                "protect.kl_to_base does not fit the memory: set protect.kl_to_base.rows or "
                "protect.kl_to_base.max_length to a smaller number"
            ) from error
        finally:
            self._order = order
            self._references.clear()
            self._model.zero_grad(set_to_none=True)
            self._sums.zero_()

    def take(self) -> dict[str, float]:
        """Return the means since the last call, and begin again; this waits for the device.

        `kl_to_base` is in nats/token; `update_norm` is the squared norm of the update.
        """
        kl, norm, steps, kl_steps = self._sums.tolist()
        self._sums.zero_()
        taken: dict[str, float] = {}
        if kl_steps:
            taken["kl_to_base"] = kl / kl_steps
        if steps and self._updates:
            taken["update_norm"] = norm / steps
        return taken

    def open_sums(self) -> OpenSums:
        """Return the sums since `take`, for a checkpoint."""
        sums: OpenSums = self._sums.tolist()
        return sums

    def restore(self, sums: OpenSums) -> None:
        """Continue from what `open_sums` returned, in an older version with a KL in every step."""
        self._sums.copy_(self._sums.new_tensor([*sums, sums[2]][:4]))

    def _mean_kl(self, config: KlToBaseConfig, turn: int) -> Tensor:
        places = range(turn * config.rows, (turn + 1) * config.rows)
        step_rows = [self._order[place % len(self._order)] for place in places]
        numbers = tuple(step_rows[self._processes.rank :: self._processes.world_size])
        if not numbers:
            return torch.zeros((), device=self._device)
        micro_batch = move_to(self._build([self._rows[row] for row in numbers]), self._device)
        # Dropout would be divergence of its own; this way the KL of an unused adapter is 0.
        is_training = self._model.training
        self._model.eval()
        try:
            reference = self._reference(numbers, micro_batch)
            hidden = decoder_hidden(self._model, micro_batch)
        finally:
            self._model.train(is_training)
        positions = micro_batch["target_positions"]
        layer = self._model.get_base_model().get_output_embeddings()
        frozen = FrozenHead(
            layer.weight, layer.bias, self._loss_path.softcap, self._loss_path.scale
        )
        summed = linear_kl_divergence(hidden.flatten(0, 1)[positions], reference, frozen)
        compared = len(positions)
        if self._processes.are_many:
            compared = sum(self._count_targets(row) for row in step_rows)
        return summed / max(compared, 1)

    @torch.no_grad()
    def _reference(self, rows: tuple[int, ...], micro_batch: MicroBatch) -> Tensor:
        """Return the base's hidden states [N, D] at the compared positions of a step's rows.

        They never change, so they are computed when the rows first come together, in the same call
        as ever, and kept: rows take turns in an order that repeats.
        """
        if rows in self._references:
            return self._references[rows]
        with adapter_disabled(self._model):
            hidden = decoder_hidden(self._model, micro_batch).flatten(0, 1)
        reference = hidden[micro_batch["target_positions"]]
        kept = sum(each.nbytes for each in self._references.values())
        if kept + reference.nbytes <= KEPT_BYTES:
            self._references[rows] = reference
        return reference

    def _count_targets(self, row: int) -> int:
        return sum(label != IGNORE_INDEX for label in self._rows[row].labels[1:])

    def _longest_first(self) -> list[int]:
        lengths = [len(row.input_ids) for row in self._rows]
        return sorted(range(len(lengths)), key=lambda row: -lengths[row])

    @torch.no_grad()
    def _require_same_base(self, probe: BaseProbe) -> None:
        is_training = self._model.training
        self._model.eval()
        try:
            ids = probe.input_ids[0].tolist()
            micro_batch = move_to(self._build([Example(ids, ids, "trial", 1)]), self._device)
            with adapter_disabled(self._model):
                hidden = decoder_hidden(self._model, micro_batch)
        finally:
            self._model.train(is_training)
        before = probe.hidden.float()
        difference = ((hidden.float() - before).norm() / before.norm().clamp(min=1e-6)).item()
        if not difference <= BASE_TOLERANCE:
            raise LlmtuneError(
                "protect.kl_to_base: the model with its adapter switched off is not the base (its "
                f"hidden states differ by {difference:.1%}), so there is nothing to hold it to; "
                "train from an adapter that leaves the base's weights alone"
            )


def squared_update_norm(updates: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return sum |s B A|_F^2 without any product B A: s^2 tr[(B^T B)(A A^T)], float32.

    Args:
        updates: (A [R, I], B [O, R], scaling s) of every adapted layer.
    """
    parts = [s * s * ((b.T @ b) * (a @ a.T)).sum() for a, b, s in updates]
    return torch.stack(parts).sum()


def _find_updates(model: PeftModel) -> list[tuple[Tensor, Tensor, float]]:
    method = live_method(model)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        for adapter in module.active_adapters:
            factors = method.factors_of(module, adapter)
            if factors is None or not factors[1].requires_grad:
                raise LlmtuneError(
                    f"protect.l2 knows the norm of plain LoRA on linear layers, and {name} is of a "
                    "different kind; leave protect.l2 at 0"
                )
            found.append(factors)
    if not found:
        raise LlmtuneError(
            "protect.l2 knows the norm of plain LoRA, and this adapter trains whole weights; leave "
            "protect.l2 at 0"
        )
    return found
