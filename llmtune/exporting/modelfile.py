"""An Ollama Modelfile: the chat template in Ollama's language, checked against the original."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llmtune.data.problems import RowError
from llmtune.data.render import render_text
from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.vocabulary import read_vocabulary
from llmtune.models.checkpoint import Checkpoint

ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Turns:
    """A chat template as text around each turn; any template that is only that."""

    start: str
    around: Mapping[str, tuple[str, str]]  # by role
    answer: str
    """What invites the answer."""
    default_system: str | None
    """The system prompt of conversations that bring none."""

    def render(self, messages: Messages) -> str:
        """Return the prompt for an answer to `messages`."""
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        turns = (
            self.around[message["role"]][0] + message["content"] + self.around[message["role"]][1]
            for message in messages
        )
        return self.start + "".join(turns) + self.answer


def modelfile_of(source: Checkpoint, gguf_name: str) -> str:
    """Return the Modelfile for a GGUF file of a checkpoint.

    Raises:
        LlmtuneError: as `render_modelfile`, or llama.cpp does not have the tokenizer.
    """
    return render_modelfile(
        source.tokenizer,
        gguf_name,
        stop_token_ids=source.stop_token_ids,
        adds_bos=read_vocabulary(source).adds_bos,
    )


def render_modelfile(
    tokenizer: PreTrainedTokenizerFast,
    gguf_name: str,
    *,
    stop_token_ids: Sequence[int],
    adds_bos: bool,
) -> str:
    """Return the Modelfile for a GGUF file beside it.

    Ollama has a template language of its own; the chat template is taken apart, written in it, and
    compared with the original on conversations of several shapes.

    Args:
        tokenizer: with its chat template; without one the prompt is passed as it is.
        gguf_name: the GGUF file's name.
        stop_token_ids: the tokens that end an answer.
        adds_bos: Ollama puts the beginning-of-text token itself, so the template must not.

    Raises:
        LlmtuneError: the chat template is more than text around each turn.
    """
    lines = [f"FROM ./{gguf_name}"]
    if tokenizer.chat_template:
        turns = find_turns(tokenizer, adds_bos=adds_bos)
        lines.append(f'TEMPLATE """{_go_template(turns)}"""')
        if turns.default_system is not None:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    for stop in tokenizer.convert_ids_to_tokens(list(stop_token_ids)):
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


def find_turns(tokenizer: PreTrainedTokenizerFast, *, adds_bos: bool) -> Turns:
    """Take a chat template apart into the text around each turn.

    Raises:
        LlmtuneError: it is more than that.
    """
    probes = {role: f"PROBE{role.upper()}" for role in ROLES}
    messages = [{"role": role, "content": probes[role]} for role in (*ROLES, "user", "assistant")]
    bos = tokenizer.bos_token if adds_bos and tokenizer.bos_token else ""

    def render(chosen: Messages, *, invite: bool = True) -> str:
        try:
            text = render_text(tokenizer, chosen, add_generation_prompt=invite)
        except RowError as error:
            raise _too_much(tokenizer, f"it refuses a conversation ({error})") from error
        return text.removeprefix(bos)

    for start in ("", "" if adds_bos else tokenizer.bos_token or ""):
        if not render(messages).startswith(start):
            continue
        turns = _guess(start, render(messages, invite=False), render(messages[:4]), messages)
        turns = _with_default_system(turns, render(messages[1:2]), messages[1:2])
        shapes = [messages[:2], messages[1:2], messages[:4], messages[1:4]]
        if turns and all(turns.render(shape) == render(shape) for shape in shapes):
            return turns
    raise _too_much(tokenizer, "it does more than put text around each turn")


def _too_much(tokenizer: PreTrainedTokenizerFast, what: str) -> LlmtuneError:
    return LlmtuneError(
        f"{tokenizer.name_or_path}: the chat template cannot be repeated in Ollama's language: "
        f"{what}. Use --to gguf, whose file holds the template itself"
    )


def _guess(start: str, whole: str, invited: str, messages: Messages) -> Turns | None:
    """Cut a rendered conversation at its contents; between two contents lie suffix and prefix.

    A user's turn appears twice, so what its second prefix has in common with the assistant's
    suffix shows where one ends and the other begins.
    """
    pieces, rest = [], whole.removeprefix(start)
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found:
            return None
        pieces.append(before)
    first, after_system, after_user, after_answer, _ = pieces
    answer_end = rest
    if not after_answer.startswith(answer_end):
        return None
    user_start = after_answer.removeprefix(answer_end)
    if not after_system.endswith(user_start):
        return None
    system_end = after_system.removesuffix(user_start)
    user_end_and_invitation = invited.rpartition(messages[3]["content"])[2]
    answer_start, user_end = _split_invitation(after_user, user_end_and_invitation, system_end)
    around = {"system": (first, system_end), "user": (user_start, user_end)}
    around["assistant"] = (answer_start, answer_end)
    return Turns(start, around, user_end_and_invitation.removeprefix(user_end), None)


def _split_invitation(after_user: str, invited: str, system_end: str) -> tuple[str, str]:
    """Return the assistant's prefix and the user's suffix, which are adjacent."""
    user_end = system_end if after_user.startswith(system_end) else ""
    if not invited.startswith(user_end):
        user_end = ""
    return after_user.removeprefix(user_end), user_end


def _with_default_system(turns: Turns | None, text: str, messages: Messages) -> Turns | None:
    if turns is None or turns.render(messages) == text:
        return turns
    start, end = turns.around["system"]
    extra = text.removesuffix(turns.render(messages))
    if not (extra.startswith(start) and extra.endswith(end) and len(extra) > len(start + end)):
        return turns
    system = extra.removeprefix(start).removesuffix(end)
    return Turns(turns.start, turns.around, turns.answer, system)


def _go_template(turns: Turns) -> str:
    texts = [turns.start, turns.answer, *(text for pair in turns.around.values() for text in pair)]
    for text in (*texts, turns.default_system or ""):
        if "{{" in text or '"""' in text:
            raise LlmtuneError(f"the chat template holds {text!r}, which a Modelfile cannot quote")
    branches = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}{start}{{{{ .Content }}}}{end}'
        for word, (role, (start, end)) in zip(
            ("if", "else if", "else if"), turns.around.items(), strict=True
        )
    )
    return (
        f"{turns.start}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{turns.answer}"
    )
