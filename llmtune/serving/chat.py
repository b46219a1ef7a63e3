"""A conversation in the terminal with base or tuned model, streamed as it is written."""

import contextlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmtune.data.conversation import Conversation, Message, ask
from llmtune.data.problems import RowError, shorten
from llmtune.data.prompts import PromptEncoder
from llmtune.data.tools import read_tools
from llmtune.errors import LlmtuneError
from llmtune.evaluation.main_arms import MAIN_ARMS
from llmtune.io.run_dir import atomic_write_text
from llmtune.models.chat_template import default_system
from llmtune.models.live import LiveModel
from llmtune.models.resolve import Loadable
from llmtune.models.turns import require_chat_template
from llmtune.scoring.generate import Decoding, stream_text
from llmtune.scoring.live import as_arm, load_target

HELP = """\
/base, /tuned ...   that model answers from now on; each keeps a history of its own
/compare [TEXT]     all models answer: TEXT, or everything from now on
/system [TEXT]      set the system prompt, or take yours out
/save FILE          write the histories as rows to train on
/clear              start over
/quit               leave; Ctrl-C stops an answer, and leaves where you type"""

PROMPT = "you> "
SHOWN_CHARACTERS = 120
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x80-\x9f]")
"""Characters that move the cursor or worse; a line break and a tab are none of them."""
PICTURES = 0x2400
"""Where Unicode has a picture for each of the first 32."""


@dataclass(frozen=True)
class ChatSettings:
    """How a conversation is held; `arm` None takes the target's first."""

    arm: str | None = None
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    as_json: bool = False
    tools: Path | None = None
    """A JSON file with a list of tool schemas."""


class Chat:
    """What each model was asked and answered so far, and who answers next."""

    def __init__(self, live: LiveModel, settings: ChatSettings) -> None:
        self.live = live
        self.settings = settings
        self.answering: tuple[str, ...] = (settings.arm or live.arms[0],)
        self.system = settings.system
        self.turns: dict[str, list[Message]] = {}
        self._encoder = PromptEncoder(live.tokenizer)
        self._is_shown = sys.stdout.isatty()
        self._tools = None if settings.tools is None else _read_tools(settings.tools)
        self.clear()

    @property
    def arm(self) -> str:
        """Who answers next, or first of several."""
        return self.answering[0]

    def clear(self) -> None:
        """Start over with every model; the system prompt stays."""
        self.turns = {arm: [] for arm in self.live.arms}
        self._systems: dict[str, list[str | None]] = {arm: [] for arm in self.live.arms}
        """The system prompt under which each answer was given."""

    def describe_default(self) -> str:
        """Say which system prompt there is if the user gives none."""
        default = default_system(self.live.tokenizer)
        if default is None:
            return "no system prompt"
        return _visible(f"the template's own system prompt: {shorten(default, SHOWN_CHARACTERS)}")

    def switch(self, arm: str) -> None:
        """Let `arm` answer from now on, with its own history."""
        if arm not in self.live.arms:
            raise LlmtuneError(f"no {arm} model here; there is: {', '.join(self.live.arms)}")
        self.answering = (arm,)

    def compare(self) -> None:
        """Let all models answer from now on."""
        self.answering = self.live.arms

    def messages(self, arm: str) -> list[Message]:
        """Return a model's history behind the system prompt, if there is one."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns[arm]]

    def ask(self, question: str, arms: Sequence[str] | None = None) -> None:
        """Let each of the models that answer say its own."""
        for arm in arms or self.answering:
            if not self.answer(question, arm):
                return

    def answer(self, question: str, arm: str | None = None) -> bool:
        """Write an answer to stdout as it comes, and keep both turns; False if it was stopped.

        What was said until a Ctrl-C is kept; a question without any answer is not.
        """
        arm = arm or self.arm
        asked: Message = {"role": "user", "content": question}
        try:
            messages = [*self.messages(arm), *ask([asked]).messages]
            prompt = self._encoder.encode(Conversation("chat", messages, self._tools))
        except RowError as error:
            raise LlmtuneError(str(error)) from None
        decoding = Decoding(
            max_new_tokens=self.settings.max_new_tokens,
            stop_token_ids=self.live.stop_token_ids,
            temperature=self.settings.temperature,
        )
        pieces: list[str] = []
        if not self.settings.as_json:
            click.echo(f"{arm}> ", nl=False, err=True)
        is_stopped = False
        with as_arm(self.live, arm) as live:
            stream = stream_text(live.model, live.tokenizer, prompt, decoding)
            try:
                for piece in stream:
                    pieces.append(piece)
                    if not self.settings.as_json:
                        click.echo(_visible(piece) if self._is_shown else piece, nl=False)
                        sys.stdout.flush()
            except KeyboardInterrupt:
                is_stopped = True
            finally:
                stream.close()
        text = "".join(pieces)
        if self.settings.as_json:
            click.echo(json.dumps({"model": arm, "question": question, "answer": text}))
        else:
            click.echo()
        if is_stopped:
            click.echo("(stopped)", err=True)
        if text.strip():
            self.turns[arm] += [asked, {"role": "assistant", "content": text}]
            self._systems[arm].append(self.system)
        return not is_stopped

    def save(self, path: Path) -> int:
        """Write every history as a row that can be trained on; return how many there are.

        A row has the system prompt of its last answer; answers that were given under a different
        one are marked `train: false`.

        Raises:
            LlmtuneError: nothing was said, the file exists or its directory does not, or it cannot
                be written.
        """
        tools = {"tools": self._tools} if self._tools else {}
        rows = [{"messages": self._said(arm), **tools} for arm in self.turns if self.turns[arm]]
        if not rows:
            raise LlmtuneError("/save: nothing was answered yet")
        if path.exists():
            raise LlmtuneError(f"/save {path}: exists already; choose a different file")
        if not path.absolute().parent.is_dir():
            raise LlmtuneError(f"/save {path}: its directory does not exist; make it first")
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        try:
            atomic_write_text(path, "\n".join(lines) + "\n")
        except (OSError, UnicodeError) as error:
            raise LlmtuneError(f"/save {path}: cannot be written: {error}") from None
        return len(rows)

    def _said(self, arm: str) -> list[Message]:
        *earlier, last = self._systems[arm]
        turns = [dict(turn) for turn in self.turns[arm]]
        for answer, system in zip(turns[1::2], earlier, strict=False):
            if system != last:
                answer["train"] = False
        return [{"role": "system", "content": last}, *turns] if last else turns


def run_chat(target: Loadable, settings: ChatSettings) -> None:
    """Hold a conversation until /quit, the end of input, or Ctrl-C where the user types.

    Raises:
        LlmtuneError: the target cannot be loaded or has no chat template.
    """
    live = load_target(target, settings.arm)
    require_chat_template(live.tokenizer)
    chat = Chat(live, settings)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        click.echo(f"{chat.arm} model; /help says what you can do.", err=True)
        if chat.system is None and default_system(live.tokenizer) is not None:
            click.echo(chat.describe_default(), err=True)
    while True:
        try:
            line = _read_line(is_terminal)
        except (KeyboardInterrupt, EOFError):
            if is_terminal:
                click.echo(err=True)
            return
        except UnicodeDecodeError as error:
            click.echo(f"error: not UTF-8 text: {error}", err=True)
            continue
        if line in {"/quit", "/exit"}:
            return
        try:
            _take(chat, line)
        except LlmtuneError as error:
            click.echo(f"error: {error}", err=True)


def _read_line(is_terminal: bool) -> str:
    """Return what the user types, with the terminal's editing and history if there is one.

    Raises:
        EOFError: the input has ended.
    """
    if is_terminal and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401 (input() uses it once it is imported)
        return input(PROMPT).strip()
    if is_terminal:
        click.echo(PROMPT, nl=False, err=True)
    # as bytes, because a text stream cannot read on after one that is not UTF-8
    raw = getattr(sys.stdin, "buffer", None)
    line = sys.stdin.readline() if raw is None else raw.readline()
    if not line:
        raise EOFError
    return (line if isinstance(line, str) else line.decode("utf-8")).strip()


def _read_tools(path: Path) -> list[dict[str, Any]] | None:
    try:
        return read_tools(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LlmtuneError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlmtuneError(f"{path}: not UTF-8 text: {error}") from None
    except RowError as error:
        raise LlmtuneError(f"{path}: {error}") from None


def _visible(text: str) -> str:
    """Return text whose control characters do nothing to the terminal: pictures stand for them."""
    return CONTROL.sub(lambda found: chr(PICTURES + ord(found[0]) % 0x80), text)


def _take(chat: Chat, line: str) -> None:
    """Do what a line says: a command, or a question.

    Raises:
        LlmtuneError: it cannot be done.
    """
    if any("\ud800" <= character <= "\udfff" for character in line):
        raise LlmtuneError("what you typed is not UTF-8 text; set the terminal to UTF-8")
    if not line.startswith("/"):
        if line:
            chat.ask(line)
        return
    command, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if rest and command in ("clear", "help", "quit", "exit", *MAIN_ARMS):
        raise LlmtuneError(f"/{command}: takes nothing after it; ask on a separate line")
    said = None
    if command == "clear":
        chat.clear()
    elif command == "system":
        chat.system = rest or None
        said = "system prompt set" if rest else chat.describe_default()
    elif command == "compare":
        if rest:
            chat.ask(rest, chat.live.arms)
        else:
            chat.compare()
            said = f"{' and '.join(chat.answering)} answer from now on"
    elif command == "save":
        if not rest:
            raise LlmtuneError("/save: name the file, as in /save rows.jsonl")
        path = Path(rest)
        said = f"{chat.save(path)} rows in {path}"
    elif command in MAIN_ARMS:
        chat.switch(command)
        said = f"{chat.arm} answers from now on"
    else:
        said = HELP if command == "help" else f"/{command}: unknown; /help lists what there is"
    if said is not None:
        click.echo(said, err=True)
