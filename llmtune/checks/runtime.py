"""Ask llama.cpp itself (xllamacpp) what it makes of a file, in a process of its own."""

import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import read_json_object
from llmtune.io.stopping import last_lines

log = logging.getLogger("llmtune")

PACKAGE = "xllamacpp"
TIMEOUT_SECONDS = 3600
LAST_LINES = 5


@dataclass(frozen=True)
class RuntimeRequest:
    """What llama.cpp is asked; any part may be empty."""

    texts: Sequence[str] = ()
    """Tokenized as text, special tokens recognized, none added."""
    conversations: Sequence[Sequence[Mapping[str, str]]] = ()
    """Rendered with the file's chat template for an answer, tokenized, and answered greedily."""
    continued: Sequence[Sequence[int]] = ()
    """Token ids that are continued greedily; their answers follow those of `conversations`."""
    prompts: Sequence[Sequence[int]] = ()
    """Token ids; the distribution of the next token is returned whole."""
    candidates: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    """(prompt ids, candidate ids): the log-probability of every candidate as the next token."""
    max_new_tokens: int = 32
    context_length: int = 1024
    num_threads: int = 2
    lora: str | None = None
    """A LoRA GGUF applied on the file."""


@dataclass(frozen=True)
class RuntimeAnswer:
    """What one conversation became, and the greedy answer."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Without the token that ended the answer."""
    stopped: bool
    margins: tuple[float | None, ...]
    """Of each token: its log-probability less the second best's; None for half a character."""


@dataclass(frozen=True)
class RuntimeAnswers:
    """What llama.cpp answered, in the order of the questions."""

    text_ids: tuple[tuple[int, ...], ...] = ()
    answers: tuple[RuntimeAnswer, ...] = ()
    distributions: tuple[dict[int, float], ...] = field(default=())
    """Log-probabilities by token id."""
    candidates: tuple[tuple[float, ...], ...] = ()


def is_runtime_installed() -> bool:
    """Whether llama.cpp can be asked on this machine; imports nothing."""
    return importlib.util.find_spec(PACKAGE) is not None


def require_runtime(what: str = "checking") -> None:
    """Check that llama.cpp is installed.

    Args:
        what: is done with a GGUF file, for the message.

    Raises:
        LlmtuneError: it is not; the message says how to install it.
    """
    if not is_runtime_installed():
        raise LlmtuneError(
            f"{what} a GGUF file needs llama.cpp ({PACKAGE}), which is not installed: "
            "pip install xllamacpp"
        )


def wants_runtime(asked: bool | None) -> bool:
    """Whether a file is run in llama.cpp: as asked, or if it is installed.

    Raises:
        LlmtuneError: it was asked for and is not installed.
    """
    if asked:
        require_runtime()
    if asked is not None:
        return asked
    if not is_runtime_installed():
        log.warning(
            "export: llama.cpp is not installed, so the file was not run in it: "
            "pip install xllamacpp"
        )
    return is_runtime_installed()


def ask_runtime(path: Path, request: RuntimeRequest) -> RuntimeAnswers:
    """Load a GGUF file in llama.cpp, on the CPU, and ask everything in `request`.

    It runs in a process of its own and listens on the loopback interface only: a file that
    llama.cpp aborts on is an error here and no crash.

    Raises:
        LlmtuneError: llama.cpp is not installed, cannot load the file, or gives up on a question.
    """
    require_runtime()
    log.info("%s: asked in llama.cpp, on the CPU", path.name)
    with tempfile.TemporaryDirectory() as directory:
        question, answer = Path(directory, "question.json"), Path(directory, "answer.json")
        question.write_text(json.dumps({"path": str(path), **asdict(request)}), encoding="utf-8")
        command = [sys.executable, "-m", "llmtune.checks.runtime_worker"]
        try:
            done = subprocess.run(
                [*command, str(question), str(answer)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LlmtuneError(
                f"{path}: llama.cpp did not answer within {TIMEOUT_SECONDS} s"
            ) from error
        if done.returncode or not answer.is_file():
            last = last_lines(done.stderr or done.stdout, LAST_LINES)
            raise LlmtuneError(f"{path}: llama.cpp failed (exit {done.returncode}): {last}")
        return _read_answers(read_json_object(answer))


def _read_answers(content: Mapping[str, Any]) -> RuntimeAnswers:
    return RuntimeAnswers(
        text_ids=tuple(tuple(ids) for ids in content["text_ids"]),
        answers=tuple(
            RuntimeAnswer(
                prompt_ids=tuple(one["prompt_ids"]),
                token_ids=tuple(one["token_ids"]),
                stopped=one["stopped"],
                margins=tuple(one["margins"]),
            )
            for one in content["answers"]
        ),
        distributions=tuple(
            {int(id): value for id, value in one.items()} for one in content["distributions"]
        ),
        candidates=tuple(tuple(one) for one in content["candidates"]),
    )
