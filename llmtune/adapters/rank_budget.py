"""AdaLoRA's course: what each direction is worth after every step, and which are cut.

Scores and cuts are those of peft's own allocator. Its tensors are not saved with an adapter, so
they go into checkpoints here; and peft would leave cut directions out of every file it writes from
then on, which no running optimizer could be continued from, so they stay in it, as zeros.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from llmtune.errors import LlmtuneError

logger = logging.getLogger(__name__)

ADAPTER = "default"
SCORES = ("exp_avg_ipt", "exp_avg_unc")
KEPT = "kept"


class RankBudget(RankAllocator):
    """peft's allocator for a live model, with a state that can be saved."""

    def __init__(self, tuner: AdaLoraModel, config: AdaLoraConfig) -> None:
        """Take peft's model of the adapter, and its config."""
        super().__init__(tuner.model, config, ADAPTER)
        self._model: nn.Module = tuner.model
        self._config = config
        self._kept: dict[str, list[bool]] | None = None
        """Which directions are left, by the name of a layer's E, once that is settled."""

    def spread_over(self, total_steps: int) -> None:
        """Set the course in steps of a run.

        Raises:
            LlmtuneError: the run is too short for one.
        """
        config = self._config
        if total_steps < 2:
            raise LlmtuneError(
                f"adapter.method=adalora weighs directions in one step and cuts them in a later "
                f"one, and this run has {total_steps}: train.max_steps must be 2 or more"
            )
        known = config.total_step
        assert known is not None, "peft refuses a config without it"
        settled = total_steps - round(total_steps * config.tfinal / known)
        settled = min(max(settled, 2), total_steps)
        config.tinit = min(round(total_steps * config.tinit / known), settled - 1)
        config.tfinal, config.total_step = total_steps - settled, total_steps

    def after_step(self, step: int) -> None:
        """Weigh and cut after an optimizer step (counted from 1), while its gradients are there."""
        if self._kept is not None:
            self.mask_using_rank_pattern(self._model, self._kept)
            return
        own = [p for name, p in self._model.named_parameters() if _is_own(name)]
        for parameter in own:
            if parameter.grad is None:  # no row reached the layer
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in own if parameter.grad is not None]
        if not bool(torch.stack([each.isfinite().all() for each in gradients]).all()):
            return  # float16's scaler left the step out
        settled = cast(int, self._config.total_step) - self._config.tfinal
        if step < settled:
            self.update_and_allocate(self._model, step)
        else:
            if not self.exp_avg_ipt:
                logger.warning(
                    "adalora: float16 left every step before %d out, so directions are cut by what "
                    "they are worth in this one alone; bfloat16 leaves none out",
                    step,
                )
                self.update_ipt(self._model)
            _, self._kept = self.update_and_allocate(self._model, step, force_mask=True)
            self.reset_ipt()

    def state(self) -> dict[str, Tensor]:
        """Return scores and settled cuts by name."""
        found = {
            f"{kind}/{name}": value.contiguous()
            for kind in SCORES
            for name, value in getattr(self, kind).items()
        }
        for name, kept in (self._kept or {}).items():
            found[f"{KEPT}/{name}"] = torch.tensor(kept)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self.reset_ipt()
        kept: dict[str, list[bool]] = {}
        devices = {name: parameter.device for name, parameter in self._model.named_parameters()}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == KEPT:
                kept[name] = value.tolist()
            else:
                getattr(self, kind)[name] = value.to(devices[name])
                self.ipt[name] = torch.zeros_like(value)  # made anew in each step
        self._kept = kept or None


def rank_budget(model: PeftModel) -> RankBudget:
    """Return the budget of a live model, in the place of peft's allocator."""
    tuner = cast(AdaLoraModel, model.base_model)
    if not isinstance(tuner.rankallocator, RankBudget):
        tuner.rankallocator = RankBudget(tuner, cast(AdaLoraConfig, model.peft_config[ADAPTER]))
    budget: RankBudget = tuner.rankallocator
    return budget


def resize_layers(model: PeftModel) -> None:
    """Leave each layer the directions its config's rank pattern names, in float32."""
    config = cast(AdaLoraConfig, model.peft_config[ADAPTER])
    cast(AdaLoraModel, model.base_model).resize_modules_by_rank_pattern(
        config.rank_pattern, ADAPTER
    )
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer):
            for part in (layer.lora_A, layer.lora_B, layer.lora_E, layer.ranknum):
                part[ADAPTER].data = part[ADAPTER].data.float()  # peft took the base's precision
            # the update is still divided by the rank it began with, which is no trained number
            layer.ranknum[ADAPTER].requires_grad_(False).fill_(float(config.init_r))


def orthogonality_penalty(model: PeftModel) -> Tensor | None:
    """Return the weighted mean of |P P' - 1| over A and B, as peft adds it to a loss; None if 0."""
    weight = cast(AdaLoraConfig, model.peft_config[ADAPTER]).orth_reg_weight
    if not weight:
        return None
    norms = [_distance(name, parameter) for name, parameter in _directions(model)]
    return weight * torch.stack(norms).mean()


def _directions(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if _is_own(name) and ".lora_E." not in name:
            yield name, parameter


def _distance(name: str, parameter: Tensor) -> Tensor:
    product_RR = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
    return (product_RR - torch.eye(len(product_RR), device=parameter.device)).norm()


def _is_own(name: str) -> bool:
    return ".lora_" in name and f".{ADAPTER}" in name
