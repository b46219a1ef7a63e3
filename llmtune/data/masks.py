"""Conversations become token ids and exact loss masks, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.conversation import Conversation
from llmtune.data.problems import RowError, shorten
from llmtune.data.render import encode_plain, render_texts
from llmtune.data.spans import RowSamples, TextSample, TextSpan, Turn, plan_samples, trained_turns
from llmtune.data.template import TurnEnding, find_turn_ending, special_pattern
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

MAX_CACHED_TAILS = 100_000
NOTE_APART = (
    "answers whose first characters would merge with the prompt's last token; tokenized apart from "
    "it, one example a turn, as at inference"
)


@dataclass(frozen=True)
class LabelledSequence:
    """Token ids and the half-open token ranges that are trained."""

    input_ids: list[int]
    spans: list[tuple[int, int]]
    weight: float = 1.0

    @property
    def num_trained(self) -> int:
        return sum(end - start for start, end in self.spans)


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
        self.added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._tails: dict[str, list[int]] = {}
        self.extra_stop_ids: set[int] = set()
        self._ending: TurnEnding | None = None

    @property
    def all_stop_ids(self) -> frozenset[int]:
        """`stop_ids` and the tokens that were found to end a tool call's turn."""
        return frozenset(self.stop_ids) | self.extra_stop_ids

    @property
    def ending(self) -> TurnEnding:
        """How the template ends a turn; found at the first chat."""
        if self._ending is None:
            self._ending = find_turn_ending(self.tokenizer)
        return self._ending

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends generation."""
        if self.tokenizer.chat_template:
            return self.ending.stop_ids
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    def label(self, conversations: Sequence[Conversation]) -> list[LabelledRow | RowError]:
        """Return each conversation's sequences, or why it is refused.

        Raises:
            LlmtuneError: the tokenizer as a whole cannot serve (no template, no end of text).
        """
        results: list[LabelledRow | RowError | None] = [None] * len(conversations)
        chats = [i for i, row in enumerate(conversations) if row.kind == "chat"]
        planned = self._plan([conversations[i] for i in chats])
        for index, rows in zip(chats, self._label_chats(planned), strict=True):
            results[index] = rows
        for index, row in enumerate(conversations):
            if row.kind != "chat":
                try:
                    results[index] = self._label_plain(row)
                except RowError as error:
                    results[index] = error
        return results

    def _plan(self, conversations: list[Conversation]) -> list[RowSamples | RowError]:
        """Render every prompt and turn of the chats in three batches and find the spans."""
        plans: list[RowSamples | RowError | None] = [None] * len(conversations)
        chosen: dict[int, list[tuple[int, float]]] = {}
        for index, row in enumerate(conversations):
            try:
                self._refuse_control_text(row)
                chosen[index] = trained_turns(row, self.loss_on)
            except RowError as error:
                plans[index] = error
        prompts, uptos = [], []
        for index, turns in chosen.items():
            messages, tools = conversations[index].messages, conversations[index].tools
            uptos.append((messages, tools))
            if self.loss_on == "all":
                continue
            prompts += [(messages[:turn], tools) for turn, _ in turns]
            last = len(messages) - 1
            uptos += [(messages[: turn + 1], tools) for turn, _ in turns if turn != last]
        if not chosen:
            return plans
        ending = self.ending
        prompt_texts = iter(render_texts(self.tokenizer, prompts, add_generation_prompt=True))
        upto_texts = iter(render_texts(self.tokenizer, uptos, add_generation_prompt=False))
        for index, turns in chosen.items():
            row = conversations[index]
            full = next(upto_texts)
            if self.loss_on == "all":
                plans[index] = self._all_trained(row, full, ending)
                continue
            last = len(row.messages) - 1
            rendered = [
                (turn, weight, next(prompt_texts), full if turn == last else next(upto_texts))
                for turn, weight in turns
            ]
            errors = [
                t for t in (full, *(t for r in rendered for t in r[2:])) if isinstance(t, RowError)
            ]
            try:
                if errors:
                    raise errors[0]
                plans[index] = plan_samples(
                    row, full, [Turn(*parts) for parts in rendered], ending, self._specials
                )
            except RowError as error:
                plans[index] = error
        return plans

    def _all_trained(
        self, row: Conversation, full: str | RowError, ending: TurnEnding
    ) -> RowSamples | RowError:
        if isinstance(full, RowError):
            return full
        if any("train" in message for message in row.messages):
            return RowError("train marks single turns; loss_on: all trains everything", "train")
        if ending.kind != "closed" and row.messages[-1]["role"] == "assistant":
            full = full + ending.terminator
        sample = TextSample(full, (), row.weight, is_all_trained=True)
        return RowSamples((sample,))

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

    def _label_chats(self, planned: list[RowSamples | RowError]) -> list[LabelledRow | RowError]:
        samples = [s for plan in planned if isinstance(plan, RowSamples) for s in plan.samples]
        encodings = iter(self._encode([sample.text for sample in samples]))
        rows: list[tuple[RowSamples, list[Encoding]] | RowError] = [
            (plan, [next(encodings) for _ in plan.samples])
            if isinstance(plan, RowSamples)
            else plan
            for plan in planned
        ]
        anchored = [self._anchor_rows(row) for row in rows]
        self._encode_tails(anchored)
        return [self._finish(row, anchors) for row, anchors in zip(rows, anchored, strict=True)]

    def _encode(self, texts: list[str]) -> list[Encoding]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend.encode_batch(texts, add_special_tokens=False)

    def _anchor_rows(self, row) -> list[list[tuple[int, str]]]:
        """Return, for every span, the token of the last control token before it and the text
        from there to the span: the only part of the prompt whose ids the answer could change."""
        if isinstance(row, RowError):
            return []
        plan, encodings = row
        return [
            [self._anchor(sample, span, encoding) for span in sample.spans]
            for sample, encoding in zip(plan.samples, encodings, strict=True)
        ]

    def _anchor(self, sample: TextSample, span: TextSpan, encoding: Encoding) -> tuple[int, str]:
        ids = encoding.ids
        char = span.start - 1
        token = None
        while char >= 0 and token is None:  # trimmed spaces belong to no token
            token = encoding.char_to_token(char)
            char -= 1
        token = -1 if token is None else token
        while token >= 0 and ids[token] not in self.added_ids:
            token -= 1
        if token < 0:
            return 0, sample.text[: span.start]
        return token, sample.text[encoding.token_to_chars(token)[0] : span.start]

    def _encode_tails(self, anchored: list[list[list[tuple[int, str]]]]) -> None:
        if len(self._tails) > MAX_CACHED_TAILS:
            self._tails.clear()
        tails = {
            tail for row in anchored for sample in row for _, tail in sample
        } - self._tails.keys()
        ordered = sorted(tails)
        for tail, encoding in zip(ordered, self._encode(ordered), strict=True):
            self._tails[tail] = encoding.ids

    def _finish(self, row, anchors: list[list[tuple[int, str]]]) -> LabelledRow | RowError:
        if isinstance(row, RowError):
            return row
        plan, encodings = row
        sequences: list[LabelledSequence] = []
        notes = plan.notes
        try:
            for sample, encoding, places in zip(plan.samples, encodings, anchors, strict=True):
                ids = encoding.ids
                if sample.is_all_trained:
                    spans = [(0, len(ids))]
                else:
                    spans = [
                        self._token_span(span, encoding, ids, anchor)
                        for span, anchor in zip(sample.spans, places, strict=True)
                    ]
                if None in spans:
                    sequences += [self._join(sample, span) for span in sample.spans]
                    notes = (*notes, NOTE_APART)
                else:
                    sequences.append(LabelledSequence(ids, spans, sample.weight))
                if sample.is_all_trained and not set(self.stop_ids) & set(ids):
                    raise RowError("no token that ends generation would be trained", "stop-token")
        except RowError as error:
            return error
        return LabelledRow(tuple(sequences), notes)

    def _token_span(
        self, span: TextSpan, encoding: Encoding, ids: list[int], anchor: tuple[int, str]
    ) -> tuple[int, int] | None:
        """Return the trained token range, or None where the answer merges into the prompt."""
        position, tail = anchor
        prompt_ids = self._tails[tail]
        start = position + len(prompt_ids)
        last = encoding.char_to_token(span.terminator)
        is_one_token = last is not None and encoding.token_to_chars(last)[1] >= span.end
        if not is_one_token or ids[last] not in self.added_ids:
            raise RowError("the answer's end is not one token of its own", "stop-token")
        if ids[last] not in self.stop_ids:
            self.extra_stop_ids.add(ids[last])
        return (start, last + 1) if ids[position:start] == prompt_ids and start <= last else None

    def _join(self, sample: TextSample, span: TextSpan) -> LabelledSequence:
        """Tokenize prompt and answer apart: the prompt's ids are then those of inference."""
        texts = [sample.text[: span.start], sample.text[span.start : span.end]]
        prompt, answer = (encoding.ids for encoding in self._encode(texts))
        ids = prompt + answer
        decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if answer[-1:] != self._encode([sample.text[span.terminator : span.end]])[0].ids or (
            decoded != "".join(texts)
        ):
            raise RowError(
                f"the prompt's last tokens ({shorten(texts[0][-20:])}) merge with the answer's "
                "first; the model would be asked with other tokens than it was trained on",
                "template",
            )
        return LabelledSequence(ids, [(len(prompt), len(ids))], sample.weight)

    def _label_plain(self, row: Conversation) -> LabelledRow:
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
                raise RowError(
                    "the prompt's last tokens change when the completion follows; end the prompt "
                    "before the space or line break and start the completion with it",
                    "template",
                )
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        return LabelledRow((LabelledSequence(ids, [(len(prompt), len(ids))], row.weight),))
