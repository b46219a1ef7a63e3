"""Every fast path of training and scoring against the plain one, on small random models.

A path is tried as training uses it, added to those that were found good before it. Its gradients
must be as near to those of plain float32 as those without it, and it must not be slower.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmtune.adapters.config import DEFAULT_ADAPTER
from llmtune.adapters.fused import is_fused
from llmtune.adapters.inject import inject_adapter
from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.io.run_dir import RunDir
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import DtypeName, ModelConfig
from llmtune.models.fast_paths import FastPath, SwitchedOff, instead_of_kept
from llmtune.models.load import load_model
from llmtune.models.quantization.config import SMALLEST
from llmtune.models.quantization.describe import compute_densely
from llmtune.models.quiet import quiet_loading
from llmtune.scoring.likelihood import score_continuations
from llmtune.scoring.requests import ContinuationRequest
from llmtune.training.config import TrainConfig
from llmtune.training.protect.config import KlToBaseConfig, ProtectConfig
from llmtune.training.protect.penalties import Protection, ProtectionRequest
from llmtune.training.request import Technique, TrainRequest
from llmtune.training.setup import Setup, set_up
from llmtune.training.step import TrainingStep

SHAPES: Mapping[str, Mapping[str, object]] = {
    "llama": {"hidden_act": "silu"},
    # A window shorter than the rows, and soft caps on scores and logits.
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
}
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NUM_ROWS = 8
BEGINNING = 40
FLOORS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Relative error of a gradient that any path may have: rounding falls differently."""
ERROR_RATIO = 2.0
"""How many times the error without a path that with it may be."""
SLOW_RATIO = 1.5
"""How many times as long a step may take with a path; less is noise on a machine in use."""
SLOW_SECONDS = 0.02
TIMED_STEPS = 5
CHOICES: Mapping[Technique, str] = {
    "frozen_head": "LM head",
    "fused_lora": "LoRA layers",
    "fused_blocks": "blocks",
    "packing": "rows",
    "shared_beginnings": "shared beginnings",
}
"""What a step is made of, in the order it is tried -> where `Setup.choices` speaks of it."""

State = Literal["used", "wrong", "slow", "not used", "broken"]
"""`broken`: wrong, and there is nothing to switch off."""


@dataclass(frozen=True)
class PathResult:
    """What became of one path in one precision on one model."""

    path: FastPath
    family: str
    dtype: str
    is_quantized: bool
    state: State
    reason: str

    @property
    def setting(self) -> str:
        """The model and its precision, in words."""
        return f"{self.family}, {self.dtype}{', 4-bit base' if self.is_quantized else ''}"


def try_fast_paths(
    directory: Path,
    dtypes: Sequence[DtypeName],
    *,
    device: str = "auto",
    with_quantized: bool = True,
) -> Iterator[PathResult]:
    """Yield what is found about every path, precision by precision.

    Args:
        directory: an empty one, for the models.
        dtypes: precisions that this machine has.
        device: as in `model.device`.
        with_quantized: whether 4-bit bases are tried, too.
    """
    for family in SHAPES:
        base = directory / family
        _write_base(family, base)
        for dtype in dtypes:
            for is_quantized in (False, True) if with_quantized else (False,):
                config = ModelConfig(
                    base=str(base),
                    quantization=SMALLEST if is_quantized else None,
                    cache_quantized=False,
                    dtype=dtype,
                    device=device,
                )
                with instead_of_kept({}):
                    for path, state, reason in _Trial(config).run():
                        yield PathResult(path, family, dtype, is_quantized, state, reason)


def list_switched_off(results: Sequence[PathResult]) -> list[SwitchedOff]:
    """Return what later runs leave out: what is wrong or slow on any of the models."""
    found: dict[tuple[FastPath, str, bool], SwitchedOff] = {}
    for one in results:
        if one.state in ("wrong", "slow"):
            off = SwitchedOff(
                path=one.path, dtype=one.dtype, is_quantized=one.is_quantized, reason=one.reason
            )
            found.setdefault((one.path, one.dtype, one.is_quantized), off)
    return list(found.values())


class _Arm:
    """A model set up for training with some paths, until `close`."""

    def __init__(self, model: PeftModel, rows: Sequence[Example], paths: set[Technique]) -> None:
        self.model, self.rows = model, rows
        self._stack = ExitStack()
        before = _own_forwards(model)
        request = TrainRequest(
            model=model,
            tokenizer=_make_tokenizer(),
            train=rows,
            evaluation=[],
            run=RunDir(Path()),
            seed=0,
            identity={},
            quiet=True,
            without=frozenset(CHOICES.keys() - paths),
        )
        config = TrainConfig(batch_size=len(rows), micro_batch_size=len(rows), max_steps=1)
        self.setup = set_up(config, request, self._stack)
        self._step = TrainingStep(self.setup, {0: "rows"})
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.uses: Mapping[Technique, bool] = {
            "frozen_head": self.setup.loss_path.is_frozen,
            "fused_lora": any(map(is_fused, layers)),
            "fused_blocks": bool(_own_forwards(model) - before - set(layers)),
            "packing": self.setup.collator.packed,
            "shared_beginnings": self.setup.collator.shares_beginnings,
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return the adapter's gradients of a step, float32 on the CPU."""
        self._run()
        return _take_gradients(self.model)

    def seconds(self) -> float:
        """Return how long a step takes."""
        seconds = _seconds(self._run, self.setup.device)
        self.model.zero_grad(set_to_none=True)
        return seconds

    def close(self) -> None:
        """Give the model back as it was."""
        self._stack.close()
        self.model.zero_grad(set_to_none=True)

    def _run(self) -> None:
        inputs = self.setup.collator.collate(range(len(self.rows)))
        self.model.train()
        self._step.run(inputs, 0, lambda loss: loss.backward(), loss_scale=1.0)


class _Trial:
    """One model in one precision, and the paths that were found good on it so far."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.rows = _make_rows()
        self.exact = self._load(is_exact=True)
        self.model, self.spare = self._load(), self._load()
        self.floor = FLOORS[config.dtype]

    def run(self) -> Iterator[tuple[FastPath, State, str]]:
        """Yield path, state and reason; those of a step first."""
        exact = _gradients_of(self.exact, _plain_loss(self.exact, self.rows))
        good: set[Technique] = set()
        arm = _Arm(self.model, self.rows, good)
        plain = _error(arm.gradients(), exact)
        for path in CHOICES:
            tried = _Arm(self.spare, self.rows, good | {path})
            state, reason = self._judge(path, tried, arm, plain, exact)
            yield path, state, reason
            if state == "used":
                good.add(path)
                self.model, self.spare = self.spare, self.model
                tried, arm = arm, tried
            tried.close()
        yield ("kl_to_base", *self._try_kl(arm.setup))
        arm.close()
        yield ("fused_scoring", *self._try_scoring())

    def _judge(
        self, path: Technique, tried: _Arm, arm: _Arm, plain: float, exact: Mapping[str, Tensor]
    ) -> tuple[State, str]:
        choice = tried.setup.choices[CHOICES[path]]
        if not tried.uses[path]:
            return "not used", choice
        state, reason = self._compare(_error(tried.gradients(), exact), plain, "gradient")
        if state != "used":
            return state, reason
        slower = _slower(tried.seconds, arm.seconds)
        return slower or ("used", f"{reason}; {choice}")

    def _compare(self, error: float, plain: float, what: str) -> tuple[State, str]:
        said = f"the largest error of a {what} is {error:.2g}, and {plain:.2g} without it"
        return ("used" if error <= ERROR_RATIO * plain + self.floor else "wrong"), said

    def _try_kl(self, setup: Setup) -> tuple[State, str]:
        """Compare the penalty's gradients with those of plain logits."""
        if not setup.loss_path.is_frozen:
            return "not used", "it needs the frozen head"
        exact = _gradients_of(self.exact, _plain_kl(self.exact, self.rows))
        with setup.autocast():
            loss = _plain_kl(self.spare, self.rows)
        plain = _error(_gradients_of(self.spare, loss), exact)
        config = ProtectConfig(kl_to_base=KlToBaseConfig(rows=len(self.rows)))
        whole = [Example(row.input_ids, row.input_ids, row.source, row.line) for row in self.rows]
        request = ProtectionRequest(config, whole)
        protection = Protection(setup.model, request, setup.loss_path, setup.collator.lay, seed=0)
        protection.add_gradients(0, setup.autocast)
        return self._compare(_error(_take_gradients(setup.model), exact), plain, "gradient")

    def _try_scoring(self) -> tuple[State, str]:
        """Compare the scores of continuations, prompts sharing their beginning as in evaluation."""
        requests = [
            ContinuationRequest(
                tuple(row.input_ids[:-4]), (tuple(row.input_ids[-4:]), (5, 6, 7, 8))
            )
            for row in self.rows
        ]

        def ours() -> Tensor:
            scores = score_continuations(self.model, requests, token_budget=4096)
            return _centered([each.log_likelihood for one in scores for each in one])

        def unfused() -> Tensor:
            with instead_of_kept({"fused_scoring": "being tried"}):
                return ours()

        exact = _plain_scores(self.exact, requests)
        plain = _distance(_plain_scores(self.model, requests), exact)
        state, reason = self._compare(_distance(ours(), exact), plain, "score")
        if state == "used":
            device = next(self.model.parameters()).device
            slower = _slower(lambda: _seconds(ours, device), lambda: _seconds(unfused, device))
            return slower or (state, reason)
        if self._compare(_distance(unfused(), exact), plain, "score")[0] == "used":
            return state, reason
        return "broken", f"{reason}; plain layers do not help"

    def _load(self, *, is_exact: bool = False) -> PeftModel:
        """Return the model with an adapter that has an effect; `is_exact` computes in float32."""
        loaded = load_model(self.config, Checkpoint.open(Path(self.config.base)))
        base = loaded.model
        if is_exact:
            compute_densely(base, torch.float32, of=base)
        model = inject_adapter(base, DEFAULT_ADAPTER).model
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model


def _own_forwards(model: nn.Module) -> set[nn.Module]:
    return {module for module in model.modules() if "forward" in module.__dict__}


def _take_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def _gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return _take_gradients(model)


def _error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Return the largest relative error of a tensor; infinite if one is missing or not finite."""
    if found.keys() != exact.keys():
        return float("inf")
    errors = [_distance(found[name], wanted) for name, wanted in exact.items()]
    return max(errors) if all(error == error for error in errors) else float("inf")


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-12))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return how long it takes; on a CPU in processor time, which other work does not lengthen."""
    if device.type == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _slower(
    timed: Callable[[], float], timed_without: Callable[[], float]
) -> tuple[State, str] | None:
    """Return that a path is slow, or None; both take turns, and the shortest of each counts."""
    pairs = [(timed(), timed_without()) for _ in range(TIMED_STEPS)]
    seconds, without = (min(side) for side in zip(*pairs, strict=True))
    if seconds <= max(SLOW_RATIO * without, without + SLOW_SECONDS):
        return None
    return "slow", f"it takes {seconds / without:.1f} times as long as without it"


def _plain_loss(model: nn.Module, rows: Sequence[Example]) -> Tensor:
    """Return the mean cross-entropy of the trained tokens, row by row, by the library's forward."""
    device = next(model.parameters()).device
    summed, count = torch.zeros((), device=device), 0
    for row in rows:
        ids, labels = (torch.tensor(each, device=device) for each in (row.input_ids, row.labels))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        summed = summed + nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
        count += int((labels[1:] != IGNORE_INDEX).sum())
    return summed / count


def _plain_kl(model: PeftModel, rows: Sequence[Example]) -> Tensor:
    """Return the mean KL(base || tuned) over the rows' tokens, by the library's forward."""
    device = next(model.parameters()).device
    summed, count = torch.zeros((), device=device), 0
    for row in rows:
        ids = torch.tensor([row.input_ids], device=device)
        tuned = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        summed = summed + (base.exp() * (base - tuned)).sum()
        count += len(row.input_ids) - 1
    return summed / count


@torch.no_grad()
def _plain_scores(model: nn.Module, requests: Sequence[ContinuationRequest]) -> Tensor:
    device = next(model.parameters()).device
    found = []
    for request in requests:
        for choice in request.choice_ids:
            ids = torch.tensor([[*request.prompt_ids, *choice]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(choice) - 1 : -1]
            chosen = logits.float().log_softmax(-1).gather(1, ids[0, -len(choice) :, None])
            found.append(chosen.sum().item())
    return _centered(found)


def _centered(scores: Sequence[float]) -> Tensor:
    """Return what is judged of scores: how they differ from each other."""
    found = torch.tensor(scores)
    return found - found.mean()


def _make_rows() -> list[Example]:
    """Return rows of unequal lengths that begin alike; the second half of each is trained."""
    rng = random.Random(0)
    beginning = [rng.randrange(3, 1000) for _ in range(BEGINNING)]
    rows = []
    for line in range(1, NUM_ROWS + 1):
        rest = [10 + line, *(rng.randrange(3, 1000) for _ in range(8 * line))]
        ids = [*beginning, *rest]
        untrained = BEGINNING + len(rest) // 2
        labels = [*[IGNORE_INDEX] * untrained, *ids[untrained:]]
        rows.append(Example(ids, labels, "rows", line))
    return rows


def _write_base(family: str, directory: Path) -> None:
    config = CONFIG_MAPPING[family](**SIZES, **SHAPES[family])
    with quiet_loading(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(directory)
    _make_tokenizer().save_pretrained(directory)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows little: the rows are token ids already."""
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<s>",
    )
