"""The choices before the first step: precision, packing, loss, micro-batches, recomputation."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from llmtune.adapters.fused import fused_lora
from llmtune.errors import LlmtuneError
from llmtune.io.sizes import format_size
from llmtune.models.decoder import rotary_switch
from llmtune.training.batch import StepCollator, move_to
from llmtune.training.config import TrainConfig
from llmtune.training.fused.blocks import fused_blocks
from llmtune.training.fused.packing import PackingChoice, choose_packing, packed_attention
from llmtune.training.fused.sharing import draws_random_numbers, find_sharing_obstacle
from llmtune.training.grouping import computed_tokens
from llmtune.training.loss import LossPath, choose_loss_path, decoder_hidden
from llmtune.training.memory.arithmetic import UNLIMITED, MemoryPlan
from llmtune.training.memory.dry_run import Trial, find_plan, recomputable_layers, recomputing
from llmtune.training.noise import RowNoise, noisy_embeddings
from llmtune.training.objectives.base import MicroBatch, Objective
from llmtune.training.protect.penalties import Protection
from llmtune.training.request import Technique, TrainRequest
from llmtune.training.rows import EpochSampler, JoinedExamples, row_lengths
from llmtune.training.sharding import idle_micro_batch

SAMPLED_ROWS = 64
"""Rows, in the order of training, that show what a shared beginning saves."""
COUNTED_STEPS = 50
"""Steps whose padding is counted."""


@dataclass(frozen=True)
class Setup:
    """What was decided; `choices` says it in words."""

    model: PeftModel
    objective: Objective
    collator: StepCollator
    loss_path: LossPath
    device: torch.device
    autocast_dtype: torch.dtype | None
    choices: dict[str, str]
    protection: Protection | None = None
    noise: RowNoise | None = None
    idle: MicroBatch | None = None
    """What a process runs to join a forward pass of others; None if there is no such pass."""

    def autocast(self) -> torch.autocast:
        """Run forward passes inside in the base's 16-bit dtype; adapters stay float32."""
        return _autocast(self.device, self.autocast_dtype)

    def loss(self, micro_batch: MicroBatch) -> Tensor:
        """Return a micro-batch's share of the step's loss; its tensors are on `device`."""
        if self.noise is not None:
            self.noise.rows = micro_batch["row_lengths_and_keys"]
        with self.autocast():
            return self.objective.loss(self.model, micro_batch, self.loss_path)


def set_up(config: TrainConfig, request: TrainRequest, stack: ExitStack) -> Setup:
    """Make every choice that needs the loaded model, and try the largest micro-batch.

    What must be undone after training is left on `stack`.

    Raises:
        LlmtuneError: float16 on a CPU, packing demanded although it mixes rows, or out of memory.
    """
    model = request.model
    embedding = model.get_input_embeddings()
    # a module that is trained whole has a float32 copy of its own
    weight = getattr(embedding, "original_module", embedding).weight
    device, dtype = weight.device, weight.dtype
    if device.type == "cpu" and dtype == torch.float16:
        raise LlmtuneError("a CPU cannot train in float16: set model.dtype=bfloat16 or float32")
    autocast_dtype = None if dtype == torch.float32 else dtype
    rows = JoinedExamples(request.train, request.evaluation)
    with _autocast(device, autocast_dtype):
        fused = None
        if "fused_lora" not in request.without:
            fused = stack.enter_context(fused_lora(model, lambda: _run_decoder(model)))
        blocks = None
        if "fused_blocks" not in request.without:
            blocks = stack.enter_context(fused_blocks(model))
        longest = int(rows.lengths.max())
        if (unpacked := request.why_without("packing")) is None:
            packing = choose_packing(model, request.packing, request.train, longest=longest)
        else:
            packing = PackingChoice(False, unpacked)
        if (unfrozen := request.why_without("frozen_head")) is None:
            loss_path = choose_loss_path(model)
        else:
            loss_path = LossPath(False, f"left out: {unfrozen}")
    stack.enter_context(packed_attention(model) if packing.packed else nullcontext())
    noise = None
    if config.neftune_alpha is not None:
        noise = RowNoise(config.neftune_alpha, request.seed)
        stack.enter_context(noisy_embeddings(model, noise))

    collator = StepCollator(
        rows,
        UNLIMITED,
        packed=packing.packed,
        pad_token_id=request.tokenizer.pad_token_id,
        objective=config.objective,
        switch=rotary_switch(model.get_base_model().config.get_text_config()),
    )
    collator.processes = request.processes
    collator.names_rows = noise is not None
    if request.processes.are_many:
        with _autocast(device, autocast_dtype):
            _refuse_random_numbers(model, collator)
    setup = Setup(
        model=model,
        objective=config.objective,
        collator=collator,
        loss_path=loss_path,
        device=device,
        autocast_dtype=autocast_dtype,
        choices={
            "precision": f"{str(dtype).removeprefix('torch.')} base, float32 adapter",
            "LoRA layers": fused.describe() if fused else _stock(request, "fused_lora"),
            "blocks": blocks.describe() if blocks else _stock(request, "fused_blocks"),
            "rows": f"{'packed' if packing.packed else 'padded'}: {packing.reason}",
            "LM head": ("" if loss_path.is_frozen else "the library's path: ") + loss_path.reason,
            **_describe_processes(request),
        },
        noise=noise,
        idle=move_to(idle_micro_batch(collator), device) if request.is_sharded else None,
    )
    longest_first = np.argsort(-rows.lengths, kind="stable")[: config.batch_size].tolist()
    trial = Trial(
        model,
        collator,
        setup.loss,
        processes=request.processes,
        is_joint=request.is_sharded,
    )
    plan = find_plan(config, trial, longest_first)
    stack.enter_context(recomputing(model, plan.recomputed_layers))
    setup.choices["micro-batch"] = _describe_limits(plan)
    if not packing.packed:
        setup.choices["rows"] += f"; {_padding_share(config, request, collator):.0%} is padding"
    with _autocast(device, autocast_dtype):
        setup.choices["shared beginnings"] = _share_beginnings(setup, config, request, longest)
    num_layers = len(recomputable_layers(model))
    setup.choices["recomputed layers"] = f"{plan.recomputed_layers} of {num_layers}"
    return setup


def _describe_processes(request: TrainRequest) -> dict[str, str]:
    if not request.processes.are_many:
        return {}
    kept = ", and keep a part each of the base" if request.is_sharded else ""
    count = request.processes.world_size
    return {"processes": f"{count} share the rows of each step and add up its gradients{kept}"}


def _refuse_random_numbers(model: PeftModel, collator: StepCollator) -> None:
    """Refuse dropout: which numbers a row draws would depend on the number of processes."""
    row = collator.lay([collator.examples[0]])
    if draws_random_numbers(model, row, model.get_input_embeddings().weight.device):
        raise LlmtuneError(
            "dropout draws different numbers in each process, so the result would depend on how "
            "many there are: set adapter.dropout=0 (and any dropout in the base's own config), or "
            "train in one process"
        )


def _share_beginnings(
    setup: Setup, config: TrainConfig, request: TrainRequest, longest: int
) -> str:
    """Let rows of a step share what they begin with if that is exact; return what it saves.

    A micro-batch of as many tokens then has more trained ones. The frozen head holds the logits of
    a few at a time; the library's path holds all, and their memory was not tried.
    """
    collator, obstacle = setup.collator, request.why_without("shared_beginnings")
    if obstacle is not None:
        pass  # what the machine or the user leaves out
    elif not collator.packed:
        obstacle = "rows are padded"
    elif config.neftune_alpha is not None:
        obstacle = "NEFTune's noise is different in every row"
    elif not setup.loss_path.is_frozen and collator.limits.rows is None:
        obstacle = "the LM head would hold more logits at once than were tried"
    else:
        obstacle = find_sharing_obstacle(request.model, request.train, longest=longest)
    # which rows are whose must not depend on a probe that came out differently elsewhere
    if request.processes.largest([obstacle is not None])[0] and obstacle is None:
        obstacle = "one of the processes cannot"
    if obstacle is not None:
        return f"not computed once: {obstacle}"
    collator.shares_beginnings = True
    order = list(EpochSampler(len(request.train), request.seed))[:SAMPLED_ROWS]
    total = computed = 0
    for start in range(0, len(order), config.batch_size):
        rows = [request.train[index] for index in order[start : start + config.batch_size]]
        plan = collator.plan_shared(rows) or [[place] for place in range(len(rows))]
        total += sum(len(row.input_ids) for row in rows)
        computed += sum(computed_tokens([rows[place] for place in one]) for one in plan)
    saved = 1 - computed / total
    if not saved:
        return f"the first {len(order)} rows have none"
    return f"computed once, which saves {saved:.0%} of the tokens of the first {len(order)} rows"


def add_protection(setup: Setup, request: TrainRequest) -> Setup:
    """Return the setup with the penalties that are asked for, tried once on the longest rows."""
    if request.protection is None or not request.protection.config.needs_penalty:
        return setup
    build = setup.collator.lay
    protection = Protection(
        setup.model,
        request.protection,
        setup.loss_path,
        build,
        seed=request.seed,
        processes=request.processes,
    )
    protection.dry_run(setup.autocast)
    return replace(setup, protection=protection)


def _stock(request: TrainRequest, technique: Technique) -> str:
    return f"stock: {request.why_without(technique)}"


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def _run_decoder(model: PeftModel) -> None:
    input_ids = torch.arange(1, 5, device=model.get_input_embeddings().weight.device)[None]
    decoder_hidden(model, {"input_ids": input_ids})


def _padding_share(config: TrainConfig, request: TrainRequest, collator: StepCollator) -> float:
    """Return the share of the tokens computed in the first steps that is padding."""
    lengths = row_lengths(request.train)
    order = list(EpochSampler(len(lengths), request.seed))[: COUNTED_STEPS * config.batch_size]
    tokens = computed = 0
    for start in range(0, len(order), config.batch_size):
        step = [int(lengths[row]) for row in order[start : start + config.batch_size]]
        tokens += sum(step)
        computed += sum(len(one) * max(step[i] for i in one) for one in collator.plan(step))
    return 1 - tokens / computed


def _describe_limits(plan: MemoryPlan) -> str:
    if plan.limits.rows is not None:
        size = f"at most {plan.limits.rows} rows"
    else:
        size = f"at most {plan.limits.tokens} tokens"
    return f"{size}, about {format_size(plan.needed_bytes)} of activations"


@contextmanager
def float32_weights(model: PeftModel) -> Iterator[None]:
    """Keep everything that is trained in float32 inside, and give it back in its own dtype.

    Most updates of a learning rate that suits a whole module are lost between two 16-bit numbers,
    and float16 gradients cannot be unscaled. Such a module's output stays in the base's dtype.
    """
    rounded = [p for p in model.parameters() if p.requires_grad and p.dtype != torch.float32]
    dtypes = [parameter.dtype for parameter in rounded]
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    handles = [module.register_forward_hook(_round_output) for module in wrappers if rounded]
    for parameter in rounded:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, dtype in zip(rounded, dtypes, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def _round_output(module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    """Return a module's output in the dtype that the frozen original computes in."""
    original = next(module.original_module.parameters(), None)
    if original is None or not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    return output.to(original.dtype)


def check_float32(model: PeftModel) -> None:
    """Assert that everything that is trained is in float32."""
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    assert not wrong, f"trained in 16 bits: {wrong[0]}"
