"""The end of the run tried before its beginning: the largest micro-batch, and every save.

Layers whose activations do not fit are recomputed in the backward pass (gradient checkpointing).
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from llmtune.data.example import Example
from llmtune.errors import LlmtuneError
from llmtune.io.processes import ALONE, Processes
from llmtune.io.run_dir import RunDir
from llmtune.io.sizes import format_in
from llmtune.io.unfinished import require_space
from llmtune.models.probing import is_out_of_memory
from llmtune.models.quantization.config import SMALLEST
from llmtune.training.batch import StepCollator, move_to
from llmtune.training.checkpoint import save_weights
from llmtune.training.config import TrainConfig
from llmtune.training.grouping import largest_micro_batches
from llmtune.training.memory.arithmetic import (
    USEFUL_TOKENS,
    ActivationCost,
    MemoryPlan,
    RowSizes,
    plan_memory,
    shrink_plan,
)
from llmtune.training.memory.measure import available_bytes, measure_activations
from llmtune.training.objectives.base import MicroBatch

# Tried in this order, whole rows and then a piece of one: the fewer, the less exact.
MEASURED_TOKENS = (256, 32)
# Two checkpoints (weights and two moments each) beside one being written, and the adapter itself.
SAVED_COPIES = 10


class DoesNotFitError(LlmtuneError):
    """The largest micro-batch runs out of memory."""


def find_plan(config: TrainConfig, trial: "Trial", longest_first: Sequence[int]) -> MemoryPlan:
    """Plan by the measured cost, try the largest micro-batch, and shrink until it fits.

    `longest_first` are the rows of the largest possible step. The collator keeps the limits.

    Raises:
        DoesNotFitError: nothing fits.
        LlmtuneError: recomputation is asked for, and the architecture does not offer it.
    """
    if config.gradient_checkpointing is True:
        require_recomputable(trial.model)
    lengths = [len(trial.collator.examples[index].input_ids) for index in longest_first]
    cost = trial.measure()
    device_type = trial.device.type
    plan = plan_memory(
        cost,
        trial.available_bytes(),
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
                dry_run_step(
                    lambda: trial.run_largest(longest_first), longest=lengths[0], plan=plan
                )
            return plan
        except DoesNotFitError:
            if smaller is None or trial.is_joint:
                raise
        plan = smaller


class Trial:
    """Runs the training call on chosen rows outside of the run."""

    def __init__(
        self,
        model: PeftModel,
        collator: StepCollator,
        loss: Callable[[MicroBatch], Tensor],
        *,
        processes: Processes = ALONE,
        is_joint: bool = False,
    ) -> None:
        """Take the model, what batches its rows, and a micro-batch's loss as training has it.

        Those of the `processes` that are here share this computer's memory. `is_joint` says that
        a forward pass is one of all processes: they try the same, and one that fails ends all.
        """
        self.processes = processes
        self.is_joint = is_joint
        self.model = model
        self.collator = collator
        self.loss = loss
        self.device = model.get_input_embeddings().weight.device

    def available_bytes(self) -> float:
        """Return the bytes that activations may take; in a joint trial the least of any process."""
        own = available_bytes(self.device, self.processes.num_here)
        return float(-self.processes.largest([-int(own)])[0]) if self.is_joint else own

    def measure(self) -> ActivationCost:
        """Measure what a token's activations cost, on the first rows, or on a piece of the first.

        Raises:
            DoesNotFitError: not even a short forward pass fits.
        """
        first = self._first_rows(MEASURED_TOKENS[0])
        for rows in (first, [self._piece(MEASURED_TOKENS[-1])]):
            try:
                return self._measure(rows)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.is_joint:  # the others are in the middle of this forward pass
                    tokens = sum(len(row.input_ids) for row in first)
                    raise DoesNotFitError(
                        f"this process has its part of the base, but a pass of {tokens} tokens "
                        "does not fit beside it. Start more processes, so that each part is "
                        "smaller, or shorten the rows (data.max_length)."
                    ) from error
        raise DoesNotFitError(
            f"the model is loaded, but not even {MEASURED_TOKENS[-1]} tokens fit beside it. "
            f"Quantize it (model.quantization.method={SMALLEST.method}), or choose a smaller base."
        )

    def _first_rows(self, wanted_tokens: int) -> list[Example]:
        chosen: list[Example] = []
        tokens = 0
        for index in range(len(self.collator.examples)):
            chosen.append(self.collator.examples[index])
            tokens += len(chosen[-1].input_ids)
            if tokens >= wanted_tokens:
                break
        return chosen

    def _piece(self, num_tokens: int) -> Example:
        """Return the beginning of the first row, all of it trained: any memory holds that."""
        row = self.collator.examples[0]
        ids = row.input_ids[:num_tokens]
        return Example(ids, ids, row.source, row.line)

    def _measure(self, rows: Sequence[Example]) -> ActivationCost:
        micro_batch = self.collator.build(rows)
        self.model.train()
        return measure_activations(
            self.model,
            recomputable_layers(self.model),
            lambda: self.loss(move_to(micro_batch, self.device)),
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
            self.loss(move_to(self.collator.build(largest), self.device)).backward()
        self.model.zero_grad(set_to_none=True)


def dry_run_step(run_step: Callable[[], None], *, longest: int, plan: MemoryPlan) -> None:
    """Run the worst micro-batch forward and backward once.

    Raises:
        DoesNotFitError: names the length, the size and two settings.
    """
    try:
        run_step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows = plan.limits.rows
        size = f"{rows} such rows" if rows else f"{max(plan.limits.tokens, longest)} tokens"
        raise DoesNotFitError(
            f"the longest row has {longest} tokens, and a micro-batch of {size} with "
            f"{plan.recomputed_layers} layers recomputed does not fit the memory (about "
            f"{format_in(plan.needed_bytes, 'GiB')} for activations). Set data.max_length="
            f"{max(longest // 2, 1)}, or train.gradient_checkpointing=true with "
            "train.micro_batch_size=1 (batch_size, and so the result, stays)."
        ) from error


def dry_run_save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: RunDir) -> None:
    """Write once what the run will write, where it will write it, and delete it again.

    Raises:
        LlmtuneError: the directory is not writable, the disk too full, or the base's generation
            config is one that transformers refuses to save.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = SAVED_COPIES * trained
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        require_space(run.path, needed, what=f"{run.path}: the adapter with its checkpoints")
        with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=run.path) as directory:
            _write_everything(model, tokenizer, Path(directory))
    except OSError as error:
        raise LlmtuneError(
            f"cannot write into {run.path}: {error}. Choose another run_dir."
        ) from error


def _write_everything(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    save_weights(model, directory)
    tokenizer.save_pretrained(directory)
    base = model.get_base_model()
    try:
        base.config.save_pretrained(directory)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(directory)
    except ValueError as error:
        raise LlmtuneError(
            "the base model's config files cannot be saved again, so neither could the tuned "
            f"model's: {error} Correct generation_config.json of the base."
        ) from error


def recomputable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose activations can be recomputed, in the order of the forward pass."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def require_recomputable(model: PeftModel) -> None:
    """Refuse an architecture without layers that can be recomputed.

    Raises:
        LlmtuneError: it has none, so that asking for it would change nothing.
    """
    base: PreTrainedModel = model.get_base_model()
    if not base.supports_gradient_checkpointing or not recomputable_layers(model):
        raise LlmtuneError(
            f"{type(base).__name__} offers no gradient checkpointing: set "
            "train.gradient_checkpointing=false and a smaller train.micro_batch_size"
        )


@contextmanager
def recomputing(model: PeftModel, num_layers: int) -> Iterator[None]:
    """Recompute the activations of the first `num_layers` layers inside.

    transformers 5.23 calls the switch `activation_checkpointing_enable`; before it was
    `gradient_checkpointing_enable`. This is the one place that knows.

    Raises:
        LlmtuneError: the architecture does not offer it.
    """
    if num_layers == 0:
        yield
        return
    require_recomputable(model)
    base: PreTrainedModel = model.get_base_model()
    layers = recomputable_layers(model)
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Not needed without reentrant checkpointing, and it would make the embeddings' output a leaf.
    base.disable_input_require_grads()
    for layer in layers[num_layers:]:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if hasattr(base, "activation_checkpointing_disable"):
            base.activation_checkpointing_disable()
        else:
            base.gradient_checkpointing_disable()
