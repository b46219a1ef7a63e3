"""Whether packed rows may share what they begin with, and the probe that shows it."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from llmtune.data.example import Example
from llmtune.models.decoder import decoder_of
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.ops.varlen_attention import SHARING_BACKENDS
from llmtune.training.batch import move_to, pack_rows, pack_sharing
from llmtune.training.fused.packing import (
    PROBE_TOKENS,
    TOLERANCES,
    backend_of,
    find_reaches,
    make_probe_row,
    make_probe_rows,
    relative_difference,
    run_probe,
)
from llmtune.training.loss import MODEL_INPUTS
from llmtune.training.objectives.base import MicroBatch


@torch.no_grad()
def find_sharing_obstacle(
    model: PeftModel, examples: Sequence[Example], *, longest: int
) -> str | None:
    """Return why packed rows cannot share what they begin with, or None if they can.

    Asked inside `packed_attention`. The probe runs rows of one beginning in both ways, and every
    layer must reach the tokens before it through attention alone: a recurrent state or a
    convolution runs from token to token, whatever row they belong to.

    Args:
        model: as it is trained.
        examples: rows to make probes of.
        longest: tokens of the longest row that is trained or evaluated.
    """
    backend = backend_of(model)
    if backend not in SHARING_BACKENDS:
        return f"{backend} attention has no shared beginnings"
    if any(chunk < longest for chunk in find_reaches(model, ("chunk",))):
        return "its attention is cut into chunks"
    is_training = model.training
    model.eval()
    try:
        with probing():
            return _probe_sharing(model, examples)
    except ProbeFailedError as error:
        return str(error)
    finally:
        model.train(is_training)


def _probe_sharing(model: PeftModel, examples: Sequence[Example]) -> str | None:
    device = model.get_input_embeddings().weight.device
    base = model.get_base_model()
    left, right, other = (row.input_ids for row in make_probe_rows(examples, PROBE_TOKENS))
    rows = [make_probe_row(left + end) for end in (right, other)]
    if draws_random_numbers(model, pack_rows(rows), device):
        return "random numbers in training, such as dropout, are different in every row"
    calls: list[nn.Module] = []
    shared = move_to(pack_sharing(rows), device)
    inputs = {name: shared[name] for name in MODEL_INPUTS if name in shared}
    together = decoder_of(base)(**inputs, attention_calls=calls, use_cache=False).last_hidden_state
    num_layers = base.config.get_text_config().num_hidden_layers
    if len(calls) < num_layers:
        return f"{num_layers - len(calls)} of {num_layers} layers pass a state from token to token"
    beside = pack_sharing([make_probe_row(left + right[::-1]), rows[1]])
    rest = min(shared["row_lengths"][-1], beside["row_lengths"][-1])
    changed = run_probe(model, beside, device)[0, -rest:]
    together, alone = together[0, -rest:], run_probe(model, pack_rows(rows), device)[0, -rest:]
    tolerated = TOLERANCES.get(alone.dtype, 1e-4)
    influence = (together - changed).abs().max().item()
    if not influence <= tolerated * alone.abs().max().item():
        return f"a row that shares its beginning changes by {influence:.2g} with its neighbor"
    difference = relative_difference(together, alone)
    if not difference <= tolerated:
        return f"a row that shares its beginning differs by {difference:.1%} from the whole row"
    return None


def draws_random_numbers(model: PeftModel, micro_batch: MicroBatch, device: torch.device) -> bool:
    """Whether a pass in training takes random numbers; the run's own ones stay as they are."""
    is_cuda = device.type == "cuda"

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if is_cuda else torch.get_rng_state()

    model.train()
    with torch.random.fork_rng([device] if is_cuda else []):
        before = state()
        run_probe(model, micro_batch, device)
        is_drawn = not torch.equal(before, state())
    model.eval()
    return is_drawn
