"""Conversations become token ids and exact loss masks, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.align import NOTE_APART, LabelledSequence, SpanAligner
from llmtune.data.conversation import Conversation
from llmtune.data.problems import RowError, shorten
from llmtune.data.render import encode_plain, render_texts
from llmtune.data.spans import RowSamples, TextSample, Turn, plan_samples, trained_turns
from llmtune.data.template import TurnEnding, find_turn_ending, special_pattern
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LabelledRow:
    """What one row became."""

    sequences: tuple[LabelledSequence, ...]
    notes: tuple[str, ...] = ()


class Labeller:
    """Turns conversations into labelled sequences with one tokenizer and one choice of loss.

    A sequence's ids are those of `render_messages`; a mask is taken only where the ids of the
    prompt alone are a prefix of the ids of the whole, and where the trained text ends with a
    token that stops generation. Anything else is a `RowError`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, loss_on: str) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self._specials = special_pattern(tokenizer)
        self._aligner = SpanAligner(tokenizer)
        self._ending: TurnEnding | None = None
        self._tool_stop_ids: set[int] = set()

    @property
    def ending(self) -> TurnEnding:
        """How the template ends a turn; found at the first chat."""
        if self._ending is None:
            self._ending = find_turn_ending(self.tokenizer)
        return self._ending

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of all control tokens."""
        return self._aligner.added_ids

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends generation, those that were found to end tool calls too."""
        if self.tokenizer.chat_template:
            return frozenset(self.ending.stop_ids) | self._tool_stop_ids
        eos = self.tokenizer.eos_token_id
        return frozenset(() if eos is None else (eos,))

    def label(self, conversations: Sequence[Conversation]) -> list[LabelledRow | RowError]:
        """Return each conversation's sequences, or why it is refused.

        Raises:
            LlmtuneError: the tokenizer as a whole cannot serve (no template, no end of text).
        """
        chats = [row for row in conversations if row.kind == "chat"]
        labelled = iter(self._label_chats(chats))
        return [
            next(labelled) if row.kind == "chat" else self._label_plain(row)
            for row in conversations
        ]

    def _label_chats(self, chats: list[Conversation]) -> list[LabelledRow | RowError]:
        plans = self._plan(chats)
        samples = [s for plan in plans if isinstance(plan, RowSamples) for s in plan.samples]
        aligned = iter(self._aligner.align(samples))
        return [
            self._collect(plan, [next(aligned) for _ in plan.samples])
            if isinstance(plan, RowSamples)
            else plan
            for plan in plans
        ]

    def _collect(
        self, plan: RowSamples, aligned: list[list[LabelledSequence] | RowError]
    ) -> LabelledRow | RowError:
        sequences: list[LabelledSequence] = []
        notes = plan.notes
        for sample, result in zip(plan.samples, aligned, strict=True):
            if isinstance(result, RowError):
                return result
            if sample.is_all_trained:
                if not self.stop_ids & set(result[0].input_ids):
                    return RowError("no token that ends generation would be trained", "stop-token")
            else:
                ends = {s.input_ids[end - 1] for s in result for _, end in s.spans}
                self._tool_stop_ids |= ends - self.stop_ids
                if any(sequence.is_joined for sequence in result):
                    notes = (*notes, NOTE_APART)
            sequences += result
        return LabelledRow(tuple(sequences), notes)

    def _plan(self, chats: list[Conversation]) -> list[RowSamples | RowError]:
        """Render every prompt and turn of the chats in two batches and find the spans."""
        chosen = [self._choose_turns(row) for row in chats]
        if not any(isinstance(turns, list) for turns in chosen):
            return [turns for turns in chosen if isinstance(turns, RowError)]
        ending = self.ending
        prompts, uptos = [], []
        for row, turns in zip(chats, chosen, strict=True):
            if isinstance(turns, RowError):
                continue
            uptos.append((row.messages, row.tools))
            if self.loss_on != "all":
                last = len(row.messages) - 1
                prompts += [(row.messages[:turn], row.tools) for turn, _ in turns]
                uptos += [(row.messages[: t + 1], row.tools) for t, _ in turns if t != last]
        prompt_texts = iter(render_texts(self.tokenizer, prompts, add_generation_prompt=True))
        upto_texts = iter(render_texts(self.tokenizer, uptos, add_generation_prompt=False))
        plans: list[RowSamples | RowError] = []
        for row, turns in zip(chats, chosen, strict=True):
            if isinstance(turns, RowError):
                plans.append(turns)
                continue
            full = next(upto_texts)
            last = len(row.messages) - 1
            rendered = (
                []
                if self.loss_on == "all"
                else [
                    (t, weight, next(prompt_texts), full if t == last else next(upto_texts))
                    for t, weight in turns
                ]
            )
            plans.append(self._plan_row(row, full, rendered, ending))
        return plans

    def _choose_turns(self, row: Conversation) -> list[tuple[int, float]] | RowError:
        try:
            self._refuse_control_text(row)
            return trained_turns(row, self.loss_on)
        except RowError as error:
            return error

    def _plan_row(
        self,
        row: Conversation,
        full: str | RowError,
        rendered: list[tuple[int, float, str | RowError, str | RowError]],
        ending: TurnEnding,
    ) -> RowSamples | RowError:
        if isinstance(full, RowError):
            return full
        turns = []
        for index, weight, prompt, upto in rendered:
            if isinstance(prompt, RowError):
                return prompt
            if isinstance(upto, RowError):
                return upto
            turns.append(Turn(index, weight, prompt, upto))
        try:
            if self.loss_on == "all":
                return _train_everything(row, full, ending)
            return plan_samples(row, full, turns, ending, self._specials)
        except RowError as error:
            return error

    def _refuse_control_text(self, row: Conversation) -> None:
        for index, message in enumerate(row.messages, 1):
            for key in ("content", "reasoning_content"):
                found = self._specials.search(message.get(key) or "")
                if found:
                    raise RowError(
                        f"message {index} ({message['role']}): {key} holds the control token "
                        f"{shorten(found.group())}, which would end or open a turn; take it out",
                        "control-token",
                    )

    def _label_plain(self, row: Conversation) -> LabelledRow | RowError:
        """Label a row that goes through no template; the tokenizer's end of text closes it."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise LlmtuneError(
                "the tokenizer has no end-of-text token, so a tuned model could never stop; set "
                "eos_token in tokenizer_config.json"
            )
        prompt = encode_plain(self.tokenizer, row.prompt) if row.kind == "plain" else []
        ids = encode_plain(self.tokenizer, row.prompt + row.text)
        if ids[: len(prompt)] != prompt:
            ids = prompt + self.tokenizer(row.text, add_special_tokens=False)["input_ids"]
            whole = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if not whole.endswith(row.prompt + row.text):
                return RowError(
                    "the prompt's last tokens change when the completion follows; end the prompt "
                    "before the space or line break and start the completion with it",
                    "template",
                )
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        return LabelledRow((LabelledSequence(ids, [(len(prompt), len(ids))], row.weight),))


def _train_everything(row: Conversation, full: str, ending: TurnEnding) -> RowSamples:
    if any("train" in message for message in row.messages):
        raise RowError("train marks single turns; loss_on: all trains everything", "train")
    if ending.kind != "closed" and row.messages[-1]["role"] == "assistant":
        full = full + ending.terminator
    return RowSamples((TextSample(full, (), row.weight, is_all_trained=True),))
