"""Conversations become token ids and exact loss masks, many at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmtune.data.align import NOTE_APART, LabelledSequence, PendingSamples, SpanAligner
from llmtune.data.answers import Turn
from llmtune.data.context import ContextGuard
from llmtune.data.conversation import Conversation, trained_turns
from llmtune.data.problems import RowError, shorten
from llmtune.data.render import encode_plain, render_texts
from llmtune.data.skeleton import Skeleton, SkeletonBook
from llmtune.data.spans import RowSamples, TextSample, plan_samples
from llmtune.data.template_proof import prints_contents_only
from llmtune.errors import LlmtuneError
from llmtune.models.turns import (
    TurnEnding,
    find_turn_ending,
    special_pattern,
    stop_token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NOTE_CONTROL = "text that holds control tokens, which are tokenized as such"
PRINTED_KEYS = ("content", "reasoning_content", "tool_calls", "name", "tool_call_id")
"""What a template may print of a message."""


@dataclass(frozen=True)
class LabelledRow:
    """What one row became."""

    sequences: tuple[LabelledSequence, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PendingRows:
    """Conversations that are rendered and are being tokenized."""

    conversations: Sequence[Conversation]
    plans: list[RowSamples | RowError]
    samples: PendingSamples


class Labeller:
    """Turns conversations into labelled sequences with one tokenizer and one choice of loss.

    A sequence's ids are those of `render_messages`; a mask is taken only where the ids of the
    prompt alone are a prefix of the ids of the whole, and where the trained text ends with a
    token that stops generation. Anything else is a `RowError`. `use_shortcuts=False` renders
    every prompt of every row and asks the tokenizer for offsets, which is slower and gives the
    same.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, loss_on: str, *, use_shortcuts: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self._specials = special_pattern(tokenizer)
        self._guard = ContextGuard(tokenizer)
        self._aligner = SpanAligner(tokenizer, use_marks=use_shortcuts)
        self._ending: TurnEnding | None = None
        self._skeletons: SkeletonBook | None = None
        self._is_proven_known = not use_shortcuts

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

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends generation whatever the generation config says."""
        return frozenset(stop_token_ids(self.tokenizer))

    def label(self, conversations: Sequence[Conversation]) -> list[LabelledRow | RowError]:
        """Return each conversation's sequences, or why it is refused.

        Raises:
            LlmtuneError: the tokenizer as a whole cannot serve (no template, no end of text).
        """
        return self.finish(self.start(conversations))

    def start(self, conversations: Sequence[Conversation]) -> PendingRows:
        """Render the conversations and begin to tokenize them on another thread."""
        plans = self._plan([row for row in conversations if row.kind == "chat"])
        samples = [s for plan in plans if isinstance(plan, RowSamples) for s in plan.samples]
        return PendingRows(conversations, plans, self._aligner.start(samples))

    def finish(self, pending: PendingRows) -> list[LabelledRow | RowError]:
        """Return what `label` returns, for what `start` began."""
        aligned = iter(self._aligner.finish(pending.samples))
        chats = iter(
            [
                self._collect(plan, [next(aligned) for _ in plan.samples])
                if isinstance(plan, RowSamples)
                else plan
                for plan in pending.plans
            ]
        )
        return [
            next(chats) if row.kind == "chat" else self._label_plain(row)
            for row in pending.conversations
        ]

    def _collect(
        self, plan: RowSamples, aligned: list[list[LabelledSequence] | RowError]
    ) -> LabelledRow | RowError:
        sequences: list[LabelledSequence] = []
        notes = plan.notes
        bos = self.tokenizer.bos_token_id
        for sample, result in zip(plan.samples, aligned, strict=True):
            if isinstance(result, RowError):
                return result
            if bos is not None and result[0].input_ids[:2] == [bos, bos]:
                return RowError("the template writes the beginning-of-text token twice", "template")
            if sample.is_all_trained:
                if not self.stop_ids & set(result[0].input_ids):
                    return RowError("no token that ends generation would be trained", "stop-token")
            else:
                ends = {s.input_ids[end - 1] for s in result for _, end in s.spans}
                if not ends <= self.stop_ids:
                    (other, *_) = self.tokenizer.convert_ids_to_tokens(sorted(ends - self.stop_ids))
                    return RowError(
                        f"the template ends a turn with {other}, which does not end generation",
                        "stop-token",
                    )
                if any(sequence.is_joined for sequence in result):
                    notes = (*notes, NOTE_APART)
            sequences += result
        return LabelledRow(tuple(sequences), notes)

    def _plan(self, chats: list[Conversation]) -> list[RowSamples | RowError]:
        """Find the spans of all chats: by a skeleton where their roles allow it."""
        chosen = [self._choose_turns(row) for row in chats]
        if not any(isinstance(turns, list) for turns in chosen):
            return [turns for turns in chosen if isinstance(turns, RowError)]
        plans: list[RowSamples | RowError | None] = [None] * len(chats)
        quick: list[tuple[int, Skeleton]] = []
        for index, (row, turns) in enumerate(zip(chats, chosen, strict=True)):
            if isinstance(turns, RowError):
                plans[index] = turns
            elif self.skeletons is not None:
                skeleton = self.skeletons.find(row, turns)
                if skeleton is not None:
                    quick.append((index, skeleton))
        asked = [(chats[index].messages, chats[index].tools) for index, _ in quick]
        texts = render_texts(self.tokenizer, asked, add_generation_prompt=False)
        for (index, skeleton), text in zip(quick, texts, strict=True):
            if isinstance(text, str):
                contents = [message["content"] for message in chats[index].messages]
                plans[index] = skeleton.fill(contents, text)
        slow = [
            (index, turns)
            for index, turns in enumerate(chosen)
            if plans[index] is None and not isinstance(turns, RowError)
        ]
        careful = self._plan_carefully([(chats[index], turns) for index, turns in slow])
        for (index, _), plan in zip(slow, careful, strict=True):
            plans[index] = plan
        return [plan for plan in plans if plan is not None]

    @property
    def skeletons(self) -> SkeletonBook | None:
        """Skeletons, where the template is proven to print contents without looking at them."""
        if not self._is_proven_known:
            self._is_proven_known = True
            template = self.tokenizer.chat_template
            if (
                self.loss_on != "all"
                and self.ending.kind == "closed"
                and isinstance(template, str)
                and prints_contents_only(template)
            ):
                self._skeletons = SkeletonBook(self._plan_one)
        return self._skeletons

    def _plan_one(self, row: Conversation) -> RowSamples | RowError:
        (plan,) = self._plan_carefully([(row, trained_turns(row, self.loss_on))])
        return plan

    def _plan_carefully(
        self, rows: list[tuple[Conversation, list[tuple[int, float]]]]
    ) -> list[RowSamples | RowError]:
        """Render every prompt and turn of the chats in two batches and find the spans."""
        prompts, uptos = [], []
        for row, turns in rows:
            uptos.append((row.messages, row.tools))
            if self.loss_on != "all":
                last = len(row.messages) - 1
                prompts += [(row.messages[:turn], row.tools) for turn, _ in turns]
                uptos += [(row.messages[: t + 1], row.tools) for t, _ in turns if t != last]
        prompt_texts = iter(render_texts(self.tokenizer, prompts, add_generation_prompt=True))
        upto_texts = iter(render_texts(self.tokenizer, uptos, add_generation_prompt=False))
        plans: list[RowSamples | RowError] = []
        for row, turns in rows:
            full = next(upto_texts)
            last = len(row.messages) - 1
            rendered = [
                (t, weight, next(prompt_texts), full if t == last else next(upto_texts))
                for t, weight in (turns if self.loss_on != "all" else [])
            ]
            plans.append(self._plan_row(row, full, rendered, self.ending))
        return plans

    def _choose_turns(self, row: Conversation) -> list[tuple[int, float]] | RowError:
        try:
            refuse_control_text(row, self.ending.controls)
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
                self._guard.check_all(full, row)
                return _train_everything(row, full, ending)
            return plan_samples(row, full, turns, ending, self._specials, self._guard)
        except RowError as error:
            return error

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
            ids.append(eos)
        # Text that was rendered before holds them on purpose; the user is shown how often.
        notes = (NOTE_CONTROL,) if self._specials.search(row.prompt + row.text) else ()
        sequence = LabelledSequence(ids, [(len(prompt), len(ids))], row.weight)
        return LabelledRow((sequence,), notes)


def refuse_control_text(row: Conversation, controls: re.Pattern[str]) -> None:
    """Refuse a chat in which a text holds what would end or open a turn.

    Raises:
        RowError: naming the message and the control token.
    """
    for index, message in enumerate(row.messages, 1):
        for key in PRINTED_KEYS if len(message) > 2 else ("content",):
            found = _find_control(message.get(key), controls)
            if found:
                raise _holds_control(f"message {index} ({message['role']}): {key}", found)
    found = _find_control(row.tools, controls)
    if found:
        raise _holds_control("tools", found)


def _find_control(value: Any, controls: re.Pattern[str]) -> str | None:
    """Return the first control token in a text, or in any text of a JSON value."""
    if not value:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    found = controls.search(text)
    return found.group() if found else None


def _holds_control(where: str, token: str) -> RowError:
    return RowError(
        f"{where} holds the control token {shorten(token)}, which would end or open a turn; take "
        "it out",
        "control-token",
    )


def _train_everything(row: Conversation, full: str, ending: TurnEnding) -> RowSamples:
    if any("train" in message for message in row.messages):
        raise RowError("train marks single turns; loss_on: all trains everything", "train")
    if ending.kind != "closed" and row.messages[-1]["role"] == "assistant":
        full = full + ending.terminator
    return RowSamples((TextSample(full, (), row.weight, is_all_trained=True),))
