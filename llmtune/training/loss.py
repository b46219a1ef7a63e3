"""From hidden states to the loss: the frozen head on trained positions, or the library's way."""

import inspect
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmtune.models.decoder import decoder_of
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.ops.linear_cross_entropy import linear_cross_entropy, select_labelled
from llmtune.training.objectives.base import MicroBatch

MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "row_lengths",
    "shares_beginning",
)
# Largest accepted difference between the library's logits and ours, relative to the largest.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class LossPath(NamedTuple):
    """How the loss is computed: `frozen` (our path) with its constants, or the library's path."""

    is_frozen: bool
    reason: str
    scale: float = 1.0
    softcap: float | None = None


def decoder_hidden(model: PeftModel, micro_batch: MicroBatch) -> Tensor:
    """Return the last hidden states [rows, T, width]: the decoder alone, without the LM head."""
    decoder = decoder_of(model.get_base_model())
    return decoder(**_model_inputs(micro_batch), use_cache=False).last_hidden_state


def summed_loss(model: PeftModel, micro_batch: MicroBatch, choice: LossPath) -> Tensor:
    """Return the weighted sum of the cross-entropies of a micro-batch's trained tokens (nats).

    If the micro-batch holds `token_losses` [N], each token's own is written there, unweighted.
    """
    if not choice.is_frozen:
        return _library_loss(model, micro_batch)
    head = model.get_base_model().get_output_embeddings()
    hidden = decoder_hidden(model, micro_batch)
    return linear_cross_entropy(
        select_labelled(hidden, micro_batch["target_positions"]),
        head.weight,
        micro_batch["targets"],
        weights_T=micro_batch["target_weights"],
        bias_V=head.bias,
        logit_softcap=choice.softcap,
        logit_scale=choice.scale,
        losses_out_T=micro_batch.get("token_losses"),
    )


def choose_loss_path(model: PeftModel) -> LossPath:
    """Decide how the loss is computed, by comparing our logits with the library's.

    The frozen path needs a plain linear head that is not trained. What the architecture does to
    the logits (soft cap, scale) is read from the config, and a short forward pass shows that
    nothing else happens to them; otherwise the library computes the logits.
    """
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        return LossPath(False, f"the LM head is a {type(head).__name__}")
    if any(parameter.requires_grad for parameter in head.parameters()):
        return LossPath(False, "the LM head is trained")
    if not head.weight.is_floating_point():
        return LossPath(False, f"the LM head holds {head.weight.dtype}")
    config = base.config.get_text_config()
    choice = LossPath(
        True,
        "frozen, on trained positions only",
        _logit_scale(config),
        getattr(config, "final_logit_softcapping", None),
    )
    try:
        with probing():
            difference = _difference_to_library(model, choice)
    except ProbeFailedError as error:
        return LossPath(False, f"its logits could not be compared: {error}")
    if not difference <= TOLERANCES.get(head.weight.dtype, 1e-3):
        return LossPath(
            False, f"the model's logits differ from a linear head's by {difference:.2g}"
        )
    return choice


def _logit_scale(config: PreTrainedConfig) -> float:
    """Return what the architecture multiplies its logits by (names as in transformers' configs)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite divides, HyperCLOVA X does not.
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


@torch.no_grad()
def _difference_to_library(model: PeftModel, choice: LossPath) -> float:
    """Return the largest difference between both ways' logits, relative to the largest logit."""
    base: PreTrainedModel = model.get_base_model()
    head = base.get_output_embeddings()
    was_training = model.training
    model.eval()
    try:
        input_ids = torch.arange(1, 9, device=head.weight.device)[None] % head.out_features
        theirs = base(input_ids=input_ids, use_cache=False).logits.float()
        hidden = decoder_of(base)(input_ids=input_ids, use_cache=False).last_hidden_state
        ours = head(hidden.to(head.weight.dtype)).float() * choice.scale
    finally:
        model.train(was_training)
    if choice.softcap is not None:
        ours = torch.tanh(ours / choice.softcap) * choice.softcap
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


def target_logits(model: PeftModel, micro_batch: MicroBatch) -> Tensor:
    """Return the logits [N, vocabulary] that predict the targets, by the model's own forward pass.

    In float32; every objective can use them, but they need more memory than the frozen head.
    """
    positions = micro_batch["target_positions"]
    inputs = _model_inputs(micro_batch)
    is_one_row = inputs["input_ids"].shape[0] == 1
    accepted = inspect.signature(type(model.get_base_model()).forward).parameters
    if is_one_row and "logits_to_keep" in accepted:
        logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, positions)
    return logits.float()


def _library_loss(model: PeftModel, micro_batch: MicroBatch) -> Tensor:
    logits = target_logits(model, micro_batch)
    losses = nn.functional.cross_entropy(logits, micro_batch["targets"], reduction="none")
    if "token_losses" in micro_batch:
        micro_batch["token_losses"].copy_(losses.detach())
    return (losses * micro_batch["target_weights"]).sum()


def _model_inputs(micro_batch: MicroBatch) -> MicroBatch:
    return {name: micro_batch[name] for name in MODEL_INPUTS if name in micro_batch}
