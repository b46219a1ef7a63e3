"""One cell of the matrix: a merge by llmtune beside the same adapter, live, in stock peft."""

import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmtune.checks import prompts as compared_prompts
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.runs.merge_apart import merge_into
from llmtune.runs.targets import resolve_target
from merge_cells.adapters import ADAPTERS, make_adapter
from merge_cells.architectures import VOCAB_SIZE, make_architecture
from tests.tiny import make_tokenizer

RIGHT, REFUSED, ABSENT = "right", "refused", "none"
BLOCKED = "refused by the check"
WRONG, TRACEBACK, NO_MODEL = "WRONG", "TRACEBACK", "no model"
FAULTS = (WRONG, TRACEBACK)

PROMPTS = ([2, 17, 33, 120, 7, 90], [2, 5, 400, 301, 88, 11, 64, 3, 2, 19])
FEW_PROMPTS = compared_prompts.OPEN_PROMPTS[:3]  # type: ignore[attr-defined]
"""The merge's own check, which is not what is judged here, needs fewer on a tiny model."""

MAX_SHARE = 1e-3
"""Of what the adapter does to the logits, how far a right merge in float32 may be off."""
ROUNDING = 5e-7
"""Of the logits, how far float32's rounding may be off: more than a thousandth of a tiny effect."""


@dataclass(frozen=True)
class Cell:
    """What became of one adapter on one architecture."""

    architecture: str
    adapter: str
    outcome: str
    detail: str = ""
    """The error's share of the adapter's effect, or the message."""


def try_architecture(name: str, adapters: tuple[str, ...], scratch: Path) -> Iterator[Cell]:
    """Yield every cell of one row; `scratch` is emptied between them."""
    base_dir = scratch / "base"
    shutil.rmtree(base_dir, ignore_errors=True)
    try:
        model = make_architecture(name, base_dir)
        base = logits_of(model)
    except Exception as error:  # noqa: BLE001 (of transformers, not ours: reported as such)
        yield from (Cell(name, one, NO_MODEL, _one_line(error)) for one in adapters)
        return
    make_tokenizer(base_dir)
    if not torch.isfinite(base).all():
        yield from (Cell(name, one, NO_MODEL, "logits that are not finite") for one in adapters)
        return
    for adapter in adapters:
        with patch.object(compared_prompts, "OPEN_PROMPTS", FEW_PROMPTS):
            cell = _try_cell(name, adapter, scratch, base)
        yield cell


def _try_cell(name: str, adapter: str, scratch: Path, base: torch.Tensor) -> Cell:
    base_dir, adapter_dir, out_dir = (scratch / one for one in ("base", "adapter", "merged"))
    for directory in (adapter_dir, out_dir):
        shutil.rmtree(directory, ignore_errors=True)
    try:
        model = load(base_dir)
        config = ADAPTERS[adapter](model)
        if config is None:
            return Cell(name, adapter, ABSENT)
        make_adapter(model, config, adapter_dir)
        live = logits_of(PeftModel.from_pretrained(load(base_dir), adapter_dir).eval())
    except Exception as error:  # noqa: BLE001 (peft cannot make or load such an adapter)
        return Cell(name, adapter, ABSENT, f"peft: {_one_line(error)}")
    try:
        merge_into(resolve_target(str(adapter_dir)), out_dir)
    except CheckFailed as error:
        return Cell(name, adapter, BLOCKED, _one_line(error))
    except LlmtuneError as error:
        return Cell(name, adapter, REFUSED, _one_line(error).replace(f"{scratch}/", ""))
    except Exception as error:  # noqa: BLE001 (what is looked for)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Cell(
            name, adapter, TRACEBACK, f"{_one_line(error)} ({place.filename}:{place.lineno})"
        )
    return _judge(name, adapter, live, base, out_dir)


def _judge(name: str, adapter: str, live: torch.Tensor, base: torch.Tensor, out: Path) -> Cell:
    try:
        merged = logits_of(load(out))
    except Exception as error:  # noqa: BLE001 (a merged model that does not load is wrong)
        return Cell(name, adapter, WRONG, f"does not load: {_one_line(error)}")
    effect = float((live - base).norm())
    difference = float((merged - live).norm())
    if effect < 1e-5 * float(base.norm()):
        return Cell(name, adapter, ABSENT, "no effect on the logits")
    share = difference / effect
    is_right = share <= MAX_SHARE or difference <= ROUNDING * float(base.norm())
    return Cell(name, adapter, RIGHT if is_right else WRONG, f"{share:.1e}")


def load(directory: Path) -> PreTrainedModel:
    """Return a saved model as stock transformers loads it, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of every position of every prompt, in float32."""
    outputs = [model(torch.tensor([ids])).logits[0, :, :VOCAB_SIZE] for ids in PROMPTS]
    return torch.cat(outputs).float()


def _one_line(error: BaseException) -> str:
    kind = "" if isinstance(error, LlmtuneError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:300]
