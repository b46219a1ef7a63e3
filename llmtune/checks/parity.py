"""A GGUF file run in llama.cpp against the same model in transformers."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.checks.merged import load_merged
from llmtune.checks.reference import comparison_dtype
from llmtune.checks.runtime import (
    RuntimeAnswer,
    RuntimeAnswers,
    RuntimeRequest,
    ask_runtime,
)
from llmtune.checks.tricky_strings import TRICKY_STRINGS
from llmtune.checks.verification import allowed_kl
from llmtune.data.open_prompts import OPEN_PROMPTS
from llmtune.data.render import encode_plain, render_messages
from llmtune.errors import CheckFailed
from llmtune.io.fingerprint import JsonObject
from llmtune.models.checkpoint import Checkpoint
from llmtune.scoring.batches import (
    choose_token_budget,
    inference,
    model_device,
    pad_rows,
    run_forward,
)
from llmtune.scoring.generate import Decoding, Generation, generate_texts

log = logging.getLogger("llmtune")

NUM_SHOWN = 5
LIKELY = 1e-3
SPARE_TOKENS = 8
"""Room in the context beside the prompt and its answer."""


@dataclass(frozen=True)
class ParityRequest:
    """Which file is compared, and how far its answers go."""

    path: Path
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int = 32
    num_threads: int = 2
    lora: Path | None = None


@dataclass(frozen=True)
class AnswerDifference:
    """Where two greedy answers part, and how sure each side was there."""

    prompt: str
    position: int  # tokens both begin with
    token: str | None  # of transformers; None: the answer ended
    file_token: str | None
    margin: float  # log-probability of the likeliest token less the second's
    file_margin: float | None
    text: str
    file_text: str


@dataclass(frozen=True)
class ParityResult:
    """How far the file's answers are from those of the model it was made from."""

    num_prompts: int
    num_same_prompts: int
    """Prompts whose template and tokenizer gave the same token ids on both sides."""
    num_same_answers: int
    num_same_stops: int
    """Answers that ended by themselves on both sides, or on neither."""
    kl: float
    """KL(model || file) after each prompt, whole vocabulary, mean in nats."""
    max_logprob_difference: float
    """Among the tokens that transformers gives at least one in a thousand."""
    top1_agreement: float
    num_strings: int
    num_same_strings: int
    odd_strings: tuple[str, ...]
    differences: tuple[AnswerDifference, ...]

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of it, although the file is kept."""
        different = self.num_strings - self.num_same_strings
        if not different:
            return ()
        return (
            f"llama.cpp tokenizes {different} of {self.num_strings} tricky strings differently, "
            f"such as {self.odd_strings[0]!r}",
        )

    def to_dict(self) -> JsonObject:
        """Return the result as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ParityQuestions:
    """What a file and a model are both asked."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids of `OPEN_PROMPTS` as the tokenizer's chat template renders them."""
    runtime: RuntimeRequest


def compare_file(
    source: Checkpoint, path: Path, *, trust_remote_code: bool = False
) -> ParityResult:
    """Compare a GGUF file in llama.cpp with the checkpoint it was made from, both on the CPU.

    Raises:
        LlmtuneError: llama.cpp is not installed or cannot load the file.
    """
    dtype = getattr(torch, comparison_dtype(source, num_models=1))
    model = load_merged(
        source.directory, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code
    )
    stops = source.stop_token_ids
    request = ParityRequest(path, stops, num_threads=torch.get_num_threads())
    parity = compare_with_runtime(model, source.tokenizer, request)
    log.info("export: %s", describe_parity(parity))
    return parity


def describe_parity(parity: ParityResult) -> str:
    """Say in one line how close file and model are."""
    return (
        f"llama.cpp against transformers: {parity.num_same_prompts} of {parity.num_prompts} "
        f"prompts with the same token ids, {parity.num_same_answers} greedy answers the same, KL "
        f"{parity.kl:.2e} nats, {parity.num_same_strings} of {parity.num_strings} tricky strings "
        "tokenized the same"
    )


def require_parity(parity: ParityResult, type: str, path: Path, *, max_kl: float | None) -> None:
    """Check that a file of this type answers as its model does.

    Raises:
        CheckFailed: it does not.
    """
    limit = allowed_kl(type) if max_kl is None else max_kl
    different = parity.num_prompts - parity.num_same_prompts
    if different:
        raise CheckFailed(
            f"{path}: llama.cpp tokenizes {different} of {parity.num_prompts} chat prompts "
            "differently; the file was removed"
        )
    if not parity.kl <= limit:
        raise CheckFailed(
            f"{path}: llama.cpp's answers differ from the model's by {parity.kl:.4f} nats (KL), "
            f"more than {limit:g}; the file was removed. Choose a finer --type than {type}, or "
            "allow more with --max-kl"
        )


def compare_with_runtime(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, request: ParityRequest
) -> ParityResult:
    """Tokenize, answer and score the same questions with transformers and with llama.cpp.

    Args:
        model: what the file was made from, best in float32, so that only the file rounds.
        tokenizer: its tokenizer; without a chat template the prompts are plain text.
        request: the file.

    Raises:
        LlmtuneError: llama.cpp is not installed, or cannot load the file.
    """
    questions = build_questions(tokenizer, request)
    file = ask_runtime(request.path, questions.runtime)
    return compare_answers(model, tokenizer, request, (questions, file))


def build_questions(tokenizer: PreTrainedTokenizerFast, request: ParityRequest) -> ParityQuestions:
    """Return the questions for one file, to be asked of it once and of one model or more."""
    has_chat = bool(tokenizer.chat_template)
    conversations = [[{"role": "user", "content": question}] for question in OPEN_PROMPTS]
    prompts = tuple(
        tuple(
            render_messages(tokenizer, messages, add_generation_prompt=True)
            if has_chat
            else encode_plain(tokenizer, messages[0]["content"])
        )
        for messages in conversations
    )
    runtime = RuntimeRequest(
        texts=TRICKY_STRINGS,
        conversations=conversations if has_chat else (),
        continued=() if has_chat else prompts,
        prompts=prompts,
        max_new_tokens=request.max_new_tokens,
        context_length=max(map(len, prompts)) + request.max_new_tokens + SPARE_TOKENS,
        num_threads=request.num_threads,
        lora=str(request.lora) if request.lora else None,
    )
    return ParityQuestions(prompts, runtime)


def compare_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    request: ParityRequest,
    asked: tuple[ParityQuestions, RuntimeAnswers],
) -> ParityResult:
    """Ask a model in transformers what llama.cpp was asked, and compare."""
    questions, file = asked
    prompts = questions.prompts
    decoding = Decoding(request.max_new_tokens, request.stop_token_ids)
    answers = generate_texts(
        model, tokenizer, prompts, decoding, token_budget=choose_token_budget(model)
    )
    odd = [
        text
        for text, ids in zip(TRICKY_STRINGS, file.text_ids, strict=True)
        if list(ids) != tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    differences = [
        difference
        for question, prompt, answer, found in zip(
            OPEN_PROMPTS, prompts, answers, file.answers, strict=True
        )
        if (difference := _difference(model, tokenizer, (question, prompt, answer, found)))
    ]
    kl, largest, agreements = _compare_distributions(model, prompts, file)
    pairs = list(zip(prompts, answers, file.answers, strict=True))
    return ParityResult(
        num_prompts=len(prompts),
        num_same_prompts=sum(list(prompt) == list(found.prompt_ids) for prompt, _, found in pairs),
        num_same_answers=len(prompts) - len(differences),
        num_same_stops=sum(answer.stopped == found.stopped for _, answer, found in pairs),
        kl=kl / len(prompts),
        max_logprob_difference=largest,
        top1_agreement=agreements / len(prompts),
        num_strings=len(TRICKY_STRINGS),
        num_same_strings=len(TRICKY_STRINGS) - len(odd),
        odd_strings=tuple(odd[:NUM_SHOWN]),
        differences=tuple(differences),
    )


def _difference(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    sides: tuple[str, Sequence[int], Generation, RuntimeAnswer],
) -> AnswerDifference | None:
    question, prompt, answer, found = sides
    if (answer.token_ids, answer.stopped) == (found.token_ids, found.stopped):
        return None
    shared = list(zip(answer.token_ids, found.token_ids, strict=False))
    position = next((place for place, (a, b) in enumerate(shared) if a != b), len(shared))
    likeliest = _log_probabilities(model, [*prompt, *answer.token_ids[:position]]).topk(2).values
    return AnswerDifference(
        prompt=question,
        position=position,
        token=_token_at(tokenizer, answer.token_ids, position),
        file_token=_token_at(tokenizer, found.token_ids, position),
        margin=(likeliest[0] - likeliest[1]).item(),
        file_margin=found.margins[position] if position < len(found.margins) else None,
        text=answer.text,
        file_text=tokenizer.decode(found.token_ids, skip_special_tokens=True),
    )


def _token_at(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], position: int) -> str | None:
    return tokenizer.convert_ids_to_tokens(ids[position]) if position < len(ids) else None


def _compare_distributions(
    model: nn.Module, prompts: Sequence[Sequence[int]], file: RuntimeAnswers
) -> tuple[float, float, int]:
    """Return summed KL, the largest difference of a likely token, and how often both agree."""
    kl, largest, agreements = 0.0, 0.0, 0
    for prompt, distribution in zip(prompts, file.distributions, strict=True):
        expected = _log_probabilities(model, prompt)
        found = torch.full_like(expected, -torch.inf)
        ids = torch.tensor(list(distribution))
        found[ids] = torch.tensor(list(distribution.values()))
        found = found.log_softmax(-1)  # the server's numbers are rounded
        kl += (expected.exp() * (expected - found)).sum().item()
        likely = expected.exp() >= LIKELY
        if likely.any():  # of a flat distribution none is
            largest = max(largest, (expected - found)[likely].abs().max().item())
        agreements += int(expected.argmax() == found.argmax())
    return kl, largest, agreements


def _log_probabilities(model: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of the next token, [V], float32 on the CPU."""
    with inference(model):
        batch = pad_rows([ids], model_device(model), left=False)
        logits = run_forward(model, batch, logits_to_keep=1).logits
    return logits[0, -1].float().cpu().log_softmax(-1)
