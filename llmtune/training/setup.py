"""The choices before the first step: precision, packing, loss, micro-batches, recomputation."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel

from llmtune.errors import LlmtuneError
from llmtune.training.batch import StepCollator, largest_micro_batches
from llmtune.training.config import TrainConfig
from llmtune.training.fused.blocks import fused_blocks
from llmtune.training.fused.lora import fused_lora
from llmtune.training.fused.packing import choose_packing, move_to, packed_attention
from llmtune.training.loss import HeadChoice, choose_head, decoder_hidden, summed_loss
from llmtune.training.memory.arithmetic import (
    UNLIMITED,
    USEFUL_TOKENS,
    ActivationCost,
    MemoryPlan,
    RowSizes,
    plan_memory,
    shrink_plan,
)
from llmtune.training.memory.dry_run import DoesNotFitError, is_out_of_memory, rehearse_step
from llmtune.training.memory.gradient_checkpointing import recomputable_layers, recomputing
from llmtune.training.memory.measure import available_bytes, measure_activations
from llmtune.training.neftune import noisy_embeddings
from llmtune.training.request import JoinedExamples, TrainRequest

# Tried in this order: the fewer, the less exact.
MEASURED_TOKENS = (256, 32)


@dataclass(frozen=True)
class Setup:
    """What was decided; `choices` says it in words."""

    collator: StepCollator
    head: HeadChoice
    autocast_dtype: torch.dtype | None
    choices: dict[str, str]


def set_up(config: TrainConfig, request: TrainRequest, stack: ExitStack) -> Setup:
    """Make every choice that needs the loaded model, and rehearse the largest micro-batch.

    What must be undone after training is left on `stack`.

    Raises:
        LlmtuneError: float16 on a CPU, packing demanded where it mixes rows, or out of memory.
    """
    model = request.model
    embedding = model.get_input_embeddings().weight
    device, dtype = embedding.device, embedding.dtype
    if device.type == "cpu" and dtype == torch.float16:
        raise LlmtuneError("a CPU cannot train in float16: set model.dtype=bfloat16 or float32")
    autocast_dtype = None if dtype == torch.float32 else dtype
    autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=dtype != torch.float32)
    with autocast:
        fused = None
        if "fused_lora" not in request.without:
            fused = stack.enter_context(fused_lora(model, lambda: _run_decoder(model)))
        blocks = None
        if "fused_blocks" not in request.without:
            blocks = stack.enter_context(fused_blocks(model))
        packing = choose_packing(model, request.packing, request.train)
        head = HeadChoice(False, "left out as asked")
        if "frozen_head" not in request.without:
            head = choose_head(model)
    stack.enter_context(packed_attention(model) if packing.packed else nullcontext())
    stack.enter_context(noisy_embeddings(model, config.neftune_alpha))

    rows = JoinedExamples(request.train, request.evaluation)
    collator = StepCollator(
        rows, UNLIMITED, packed=packing.packed, pad_token_id=request.tokenizer.pad_token_id
    )
    trial = _Trial(model, head, collator, autocast)
    longest_first = np.argsort(-rows.lengths, kind="stable")[: config.batch_size].tolist()
    plan = _find_plan(config, trial, longest_first)
    stack.enter_context(recomputing(model, plan.recomputed_layers))
    return Setup(
        collator,
        head,
        autocast_dtype,
        {
            "precision": f"{_name(dtype)} base, float32 adapter",
            "LoRA layers": fused.describe() if fused else "stock, as asked",
            "blocks": blocks.describe() if blocks else "stock, as asked",
            "rows": f"{'packed' if packing.packed else 'padded'}: {packing.reason}",
            "LM head": ("" if head.is_frozen else "the library's path: ") + head.reason,
            "micro-batch": _describe_limits(plan),
            "recomputed layers": f"{plan.recomputed_layers} of {len(recomputable_layers(model))}",
        },
    )


def _run_decoder(model: PeftModel) -> None:
    input_ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    decoder_hidden(model, {"input_ids": input_ids})


def _find_plan(config: TrainConfig, trial: "_Trial", longest_first: Sequence[int]) -> MemoryPlan:
    """Plan by the measured cost, try the largest micro-batch, and shrink until it fits.

    `longest_first` are the rows of the largest possible step. The collator keeps the limits.
    """
    lengths = [len(trial.collator.examples[index].input_ids) for index in longest_first]
    cost = trial.measure()
    device_type = trial.device.type
    plan = plan_memory(
        cost,
        available_bytes(trial.device),
        RowSizes(lengths[0], sum(lengths) if trial.collator.packed else lengths[0] * len(lengths)),
        useful_tokens=USEFUL_TOKENS.get(device_type, USEFUL_TOKENS["cuda"]),
        micro_batch_size=config.micro_batch_size,
        checkpointing=config.gradient_checkpointing,
    )
    while True:
        trial.collator.limits = plan.limits
        smaller = shrink_plan(plan, cost, lengths[0], config.gradient_checkpointing)
        try:
            with recomputing(trial.model, plan.recomputed_layers):
                rehearse_step(
                    lambda: trial.run_largest(longest_first), longest=lengths[0], plan=plan
                )
            return plan
        except DoesNotFitError:
            if smaller is None:
                raise
        plan = smaller


def _describe_limits(plan: MemoryPlan) -> str:
    if plan.limits.rows is not None:
        size = f"at most {plan.limits.rows} rows"
    else:
        size = f"at most {plan.limits.tokens} tokens"
    return f"{size}, about {plan.needed_bytes / 1e9:.2f} GB of activations"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Trial:
    """Runs the training call on chosen rows outside of the run."""

    def __init__(
        self,
        model: PeftModel,
        head: HeadChoice,
        collator: StepCollator,
        autocast: torch.autocast,
    ) -> None:
        self.model = model
        self.head = head
        self.collator = collator
        self.autocast = autocast
        self.device = model.get_input_embeddings().weight.device

    def measure(self) -> ActivationCost:
        """Measure what a token's activations cost, on the first rows.

        Raises:
            DoesNotFitError: not even a short forward pass fits.
        """
        for tokens in MEASURED_TOKENS:
            try:
                return self._measure(tokens)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        raise DoesNotFitError(
            f"the model is loaded, but not even {MEASURED_TOKENS[-1]} tokens fit beside it. "
            "Quantize it (model.quantization.method=nf4), or choose a smaller base."
        )

    def _measure(self, wanted_tokens: int) -> ActivationCost:
        chosen: list[int] = []
        tokens = 0
        for index in range(len(self.collator.examples)):
            chosen.append(index)
            tokens += len(self.collator.examples[index].input_ids)
            if tokens >= wanted_tokens:
                break
        (micro_batch,) = self.collator.collate(chosen)["micro_batches"]
        self.model.train()
        return measure_activations(
            self.model,
            recomputable_layers(self.model),
            lambda: self._loss(micro_batch),
            micro_batch["input_ids"].numel(),
        )

    def run_largest(self, rows: Sequence[int]) -> None:
        """Run the largest micro-batches that the limits allow forward and backward.

        `rows` are those of the largest possible step, longest first.
        """
        examples = [self.collator.examples[row] for row in rows]
        self.model.train()
        for largest in largest_micro_batches(
            examples, self.collator.limits, packed=self.collator.packed
        ):
            self._loss(self.collator.build(largest)).backward()
        self.model.zero_grad(set_to_none=True)

    def _loss(self, micro_batch: dict) -> torch.Tensor:
        with self.autocast:
            return summed_loss(self.model, move_to(micro_batch, self.device), self.head)
