"""One family through every stage: load, train packed and padded, resume, merge, load elsewhere."""

import itertools
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from merge_cells.architectures import (
    SMALL,
    SPECIAL,
    VISION,
    make_architecture,
)
from merge_cells.cell import FEW_PROMPTS, load, logits_of
from peft import PeftModel
from safetensors.torch import load_file

from llmtune.checks import prompts as compared_prompts
from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.runs import pipeline
from llmtune.training.step import TrainingStep
from tests.tiny import make_tokenizer

WORKS, REFUSED, FAULT, NO_MODEL = "works", "refused", "FAULT", "no model"
YES = "yes"

SIZES = {
    **SMALL,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    "moe_shared_expert_intermediate_size": 64,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    **dict.fromkeys(("v_head_dim", "head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 32),
    "attention_chunk_size": 64,
    "sliding_window": 48,
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "dropout"), 0.0),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob", "activation_dropout"), 0.0),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "ffn_dropout"), 0.0),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.0),
    **dict.fromkeys(
        ("resid_dropout", "residual_dropout", "emb_dropout", "embed_dropout", "layerdrop"), 0.0
    ),
}
"""What fits bitsandbytes' blocks of 64; windows and chunks are shorter than the longest rows."""
WIDER = {
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "kimi_linear": SPECIAL["kimi_linear"] | {"linear_head_dim": 64},
    "granitemoehybrid": SPECIAL["granitemoehybrid"] | {"shared_intermediate_size": 64},
    "gemma4_text": SPECIAL["gemma4_text"]
    | {"hidden_size_per_layer_input": 64, "global_head_dim": 32},
}
WIDER_VISION = dict.fromkeys(("hidden_size", "out_hidden_size", "intermediate_size"), 64)
STEPS, KILLED_AT = 3, 2
ROW_LENGTHS = (9, 150, 33, 14, 70, 21, 90, 40)
"""Tokens: rows shorter and longer than the tiny models' windows and chunks, side by side."""
BEGINNING = "Is the opinion in this sentence positive or negative? "
"""Of every row: packed rows that share it have it computed once, rows alone each by themselves."""
MAX_LOSS_DIFFERENCE = 1e-5
MAX_DIVERGENCE = 1e-6
"""Of the merged model's answers from the live adapter's: a share of what the adapter itself does,
or nats, whichever allows more."""


@dataclass
class Trial:
    """What became of one family."""

    family: str
    outcome: str = WORKS
    line: str = ""
    """What does not work, or the message with which it was refused."""
    stages: dict[str, str] = field(default_factory=dict)
    """{stage: yes, or what became of it}."""
    rows: str = ""
    """Whether rows are packed, and why not."""
    shared: str = ""
    """Whether what rows begin with is computed once, and why not."""
    notes: list[str] = field(default_factory=list)
    """What was left out of the adapter, as training says it."""
    seconds: float = 0.0


class Killed(BaseException):
    """Stands for a kill between two steps."""


class Fault(Exception):
    """Something finished and is wrong."""


def try_family(name: str, scratch: Path, stages: Sequence[str] = ()) -> Trial:
    """Take one family through all stages, or those named; the first that fails ends it."""
    started = time.monotonic()
    trial = Trial(name)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with patch.dict(SPECIAL, WIDER), patch.dict(VISION, WIDER_VISION):
            model = make_architecture(name, scratch / "base", SIZES)
        if not torch.isfinite(logits_of(model)).all():
            raise ValueError("logits that are not finite")
        del model
    except Exception as error:  # noqa: BLE001 (of transformers, not ours: reported as such)
        trial.outcome, trial.line = NO_MODEL, _one_line(error)
        return trial
    make_tokenizer(scratch / "base")
    _write_rows(scratch / "rows.jsonl")
    for stage, run in STAGES.items():
        if stages and stage not in stages:
            continue
        try:
            with patch.object(compared_prompts, "OPEN_PROMPTS", FEW_PROMPTS):
                trial.stages[stage] = run(trial, scratch) or YES
        except LlmtuneError as error:
            trial.outcome, trial.stages[stage] = REFUSED, REFUSED
            trial.line = f"{stage}: {_one_line(error).replace(f'{scratch}/', '')}"
            if _has_trained(scratch / _RUN_OF.get(stage, "straight")):
                trial.outcome = FAULT
        except Exception as error:  # noqa: BLE001 (what is looked for)
            trial.outcome, trial.stages[stage] = FAULT, FAULT
            trial.line = f"{stage}: {_one_line(error)}"
            if not isinstance(error, Fault):
                place = traceback.extract_tb(error.__traceback__)[-1]
                trial.line += f" ({Path(place.filename).name}:{place.lineno})"
        if trial.outcome != WORKS:
            break
    trial.seconds = time.monotonic() - started
    return trial


def _train_straight(trial: Trial, scratch: Path) -> None:
    """Train as `run` does, which asks first whether the adapter could be merged."""
    config = _config(scratch, "straight")
    pipeline.plan_merge(config)
    record = pipeline.train(config)
    trial.rows = record["choices"]["rows"]
    trial.shared = record["choices"]["shared beginnings"]
    trial.notes = list(record["injection"]["notices"])


def _train_padded(trial: Trial, scratch: Path) -> None:
    """Train the rows one by one, without a neighbor: the same losses."""
    data = {"packing": "off"}
    pipeline.train(_config(scratch, "alone", data=data, train={"micro_batch_size": 1}))
    losses, alone = _losses(scratch / "straight"), _losses(scratch / "alone")
    difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
    if not difference <= MAX_LOSS_DIFFERENCE * max(map(abs, alone)):
        how = trial.rows.partition(":")[0]
        raise Fault(f"{how} rows have other losses than rows alone: {losses} and {alone}")


def _resume(trial: Trial, scratch: Path) -> None:
    """Kill a run between two steps, give the same command again, and compare every byte."""
    config = _config(scratch, "resumed")
    with _killed_after(KILLED_AT):
        try:
            pipeline.train(config)
        except Killed:
            pass
        else:
            raise Fault("the run was not killed")
    pipeline.train(config)
    straight, resumed = (_adapter(scratch / one) for one in ("straight", "resumed"))
    if not all(torch.equal(straight[name], resumed[name]) for name in straight):
        raise Fault("a killed and resumed run has other weights than a straight one")


def _merge(trial: Trial, scratch: Path) -> None:
    """Merge, load with stock transformers, and compare with the adapter in stock peft."""
    config = _config(scratch, "straight")
    pipeline.merge(config)
    base = load(scratch / "base")
    plain = logits_of(base)
    live = logits_of(PeftModel.from_pretrained(base, config.run.adapter_dir).eval())
    merged = logits_of(load(config.run.merged_dir))
    divergence, effect = _divergence(live, merged), _divergence(live, plain)
    if not divergence <= MAX_DIVERGENCE * max(1.0, effect):
        raise Fault(f"merged and live differ by {divergence:.1e} nats (the adapter: {effect:.1e})")


def _train_half(trial: Trial, scratch: Path) -> None:
    pipeline.train(_config(scratch, "half", model={"dtype": "bfloat16"}))
    _check_finite(scratch / "half")


def _train_nf4(trial: Trial, scratch: Path) -> None:
    model = {"quantization": {"method": "nf4"}}
    config = _config(scratch, "nf4", model=model)
    pipeline.train(config)
    _check_finite(scratch / "nf4")
    pipeline.merge(config)
    merged = logits_of(load(config.run.merged_dir))
    if not torch.isfinite(merged).all():
        raise Fault("the model merged from NF4 computes NaN")


STAGES: dict[str, Callable[[Trial, Path], str | None]] = {
    "train": _train_straight,
    "rows alone": _train_padded,
    "resume": _resume,
    "merge": _merge,
    "bf16": _train_half,
    "nf4": _train_nf4,
}
_RUN_OF = {"rows alone": "alone", "resume": "resumed", "bf16": "half", "nf4": "nf4"}


def _config(scratch: Path, run: str, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "model": {"base": str(scratch / "base"), "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "data": {
            "train": [{"path": str(scratch / "rows.jsonl")}],
            "max_length": 256,
            "cache": False,
        },
        "train": {
            **{"learning_rate": 1e-3, "max_steps": STEPS, "batch_size": len(ROW_LENGTHS) // 2},
            **{"save_every": 1, "log_every": 1, "schedule": "constant", "warmup_ratio": 0},
        },
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return RunConfig.model_validate({"run_dir": str(scratch / run), **values})


def _write_rows(path: Path) -> None:
    words = ["warm", "funny", "bright", "dull", "flat", "tired", "clever", "lovely", "plot", "film"]
    turn = itertools.cycle(words)
    with path.open("w", encoding="utf-8") as file:
        for length in ROW_LENGTHS:
            text = BEGINNING + " ".join(next(turn) for _ in range(length // 2))
            answer = "positive" if length % 2 else "negative it is"
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


@contextmanager
def _killed_after(steps: int) -> Iterator[None]:
    whole = TrainingStep.run

    def run(self: TrainingStep, inputs: Any, steps_done: int, *rest: Any, **knobs: Any) -> Any:
        if steps_done == steps:
            raise Killed
        return whole(self, inputs, steps_done, *rest, **knobs)

    with patch.object(TrainingStep, "run", run):
        yield


def _has_trained(run_dir: Path) -> bool:
    return (run_dir / "metrics.jsonl").is_file() and bool(_losses(run_dir))


def _losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def _check_finite(run_dir: Path) -> None:
    losses = _losses(run_dir)
    if not all(map(float, losses)) or any(loss != loss for loss in losses):
        raise Fault(f"losses {losses}")


def _adapter(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def _divergence(logits: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean KL divergence of a position's next token, in nats."""
    one, two = (each.double().log_softmax(-1) for each in (logits, other))
    return float((one.exp() * (one - two)).sum(-1).mean())


def _one_line(error: BaseException) -> str:
    kind = "" if isinstance(error, LlmtuneError | Fault) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split())}"[:400]
