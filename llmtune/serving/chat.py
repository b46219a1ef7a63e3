"""A conversation in the terminal with base or tuned model, streamed as it is written."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmtune.data.conversation import Conversation, Message, ask
from llmtune.data.problems import RowError
from llmtune.data.prompts import PromptEncoder
from llmtune.data.tools import read_tools
from llmtune.errors import LlmtuneError
from llmtune.models.live import LiveModel
from llmtune.models.resolve import Loadable
from llmtune.models.turns import require_chat_template
from llmtune.scoring.generate import Decoding, stream_text
from llmtune.scoring.live import as_arm, load_target

HELP = "/base and /tuned switch who answers, /clear starts over, /quit ends"


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
    """The messages so far, and who answers next."""

    def __init__(self, live: LiveModel, settings: ChatSettings) -> None:
        self.live = live
        self.settings = settings
        self.arm = settings.arm or live.arms[0]
        self.messages: list[Message] = []
        self._encoder = PromptEncoder(live.tokenizer)
        self._tools = None if settings.tools is None else _read_tools(settings.tools)
        self.clear()

    def clear(self) -> None:
        """Start over, with the system prompt if there is one."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def switch(self, arm: str) -> None:
        """Let `arm` answer from now on; the messages stay."""
        if arm not in self.live.arms:
            raise LlmtuneError(f"no {arm} model here; there is: {', '.join(self.live.arms)}")
        self.arm = arm

    def answer(self, question: str) -> str:
        """Write the answer to stdout as it comes, and keep both turns."""
        tokenizer = self.live.tokenizer
        try:
            asked = [*self.messages, *ask([{"role": "user", "content": question}]).messages]
            prompt = self._encoder.encode(Conversation("chat", asked, self._tools))
        except RowError as error:
            raise LlmtuneError(str(error)) from None
        decoding = Decoding(
            max_new_tokens=self.settings.max_new_tokens,
            stop_token_ids=self.live.stop_token_ids,
            temperature=self.settings.temperature,
        )
        pieces = []
        with as_arm(self.live, self.arm) as live:
            for piece in stream_text(live.model, tokenizer, prompt, decoding):
                pieces.append(piece)
                if not self.settings.as_json:
                    click.echo(piece, nl=False)
                    sys.stdout.flush()
        text = "".join(pieces)
        if self.settings.as_json:
            click.echo(json.dumps({"model": self.arm, "question": question, "answer": text}))
        else:
            click.echo()
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text


def run_chat(target: Loadable, settings: ChatSettings) -> None:
    """Hold a conversation until /quit or the end of input.

    Raises:
        LlmtuneError: the target cannot be loaded or has no chat template.
    """
    live = load_target(target, settings.arm)
    require_chat_template(live.tokenizer)
    chat = Chat(live, settings)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        click.echo(f"{chat.arm} model. {HELP}.", err=True)
    while True:
        if is_terminal:
            click.echo(f"{chat.arm}> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() in {"/quit", "/exit"}:
            return
        try:
            _take(chat, line.strip())
        except LlmtuneError as error:
            click.echo(f"error: {error}", err=True)


def _read_tools(path: Path) -> list[dict[str, Any]] | None:
    try:
        return read_tools(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LlmtuneError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LlmtuneError(f"{path}: not UTF-8 text: {error}") from None
    except RowError as error:
        raise LlmtuneError(f"{path}: {error}") from None


def _take(chat: Chat, line: str) -> None:
    if not line:
        return
    if line == "/clear":
        chat.clear()
    elif line in {"/base", "/tuned", "/merged"}:
        chat.switch(line[1:])
        click.echo(f"{chat.arm} answers from now on", err=True)
    elif line.startswith("/"):
        click.echo(HELP, err=True)
    else:
        chat.answer(line)
