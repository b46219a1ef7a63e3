"""From character spans to token spans: the prompt's own ids, then the answer's, or a refusal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.answers import TextSpan
from llmtune.data.marks import Anchor, ControlMarks
from llmtune.data.problems import RowError, shorten
from llmtune.data.spans import TextSample

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
    is_joined: bool = False
    """Prompt and answer were tokenized apart, because together they would merge."""

    @property
    def num_trained(self) -> int:
        """Return how many of the tokens are trained."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True)
class PendingSamples:
    """Samples whose texts are being tokenized."""

    samples: Sequence[TextSample]
    ids: Future[list[list[int]]]


class SpanAligner:
    """Tokenizes text samples and maps their character spans to token spans, strictly.

    Without `use_marks` every sample is mapped by the tokenizer's offsets, which is slower and
    gives the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, use_marks: bool = True) -> None:
        self.tokenizer = tokenizer
        self._marks = ControlMarks(tokenizer)
        self._use_marks = use_marks and self._marks.is_exact
        self._added_texts = self._marks.texts
        self.added_ids = frozenset(self._added_texts)
        self._tails: dict[str, list[int]] = {}
        # Tokenizing releases the interpreter lock: rendering the next rows continues beside it. Two
        # threads, so that one tokenizes while the other waits for the lock to hand over its ids.
        self._background = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()

    def start(self, samples: Sequence[TextSample]) -> PendingSamples:
        """Begin to tokenize the samples on another thread, while the caller continues."""
        texts = [sample.text for sample in samples]
        return PendingSamples(samples, self._background.submit(self._encode_ids, texts))

    def finish(self, pending: PendingSamples) -> list[list[LabelledSequence] | RowError]:
        """Return the sequences of each sample: one, or one a span where a prompt would change."""
        samples, ids = pending.samples, pending.ids.result()
        anchors = self._find_anchors(samples, ids)
        self._encode_tails({anchor.tail for row in anchors for anchor in row})
        results: list[list[LabelledSequence] | RowError] = []
        for sample, sample_ids, row in zip(samples, ids, anchors, strict=True):
            try:
                results.append(self._align_one(sample, sample_ids, row))
            except RowError as error:
                results.append(error)
        return results

    def _encode(self, texts: list[str]) -> list[Encoding]:
        backend = self.tokenizer.backend_tokenizer
        encodings: list[Encoding] = backend.encode_batch(texts, add_special_tokens=False)
        return encodings

    def _encode_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the ids alone; the fast call gives the same ids and no offsets."""
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(
            texts, add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def _find_anchors(
        self, samples: Sequence[TextSample], ids: list[list[int]]
    ) -> list[list[Anchor]]:
        """Return the anchors of every sample's spans: by its control tokens, else by offsets."""
        found: list[list[Anchor] | None] = [None] * len(samples)
        if self._use_marks:
            places = self._marks.places(ids)
            for index, sample in enumerate(samples):
                found[index] = self._marks.anchors(sample, ids[index], places[index])
        left = [index for index, row in enumerate(found) if row is None]
        encodings = dict(zip(left, self._encode([samples[i].text for i in left]), strict=True))
        return [
            [self._find_anchor(samples[i], span, encodings[i], ids[i]) for span in samples[i].spans]
            if row is None
            else row
            for i, row in enumerate(found)
        ]

    def _find_anchor(
        self, sample: TextSample, span: TextSpan, encoding: Encoding, ids: list[int]
    ) -> Anchor:
        last = encoding.char_to_token(span.terminator)
        terminator = sample.text[span.terminator : span.end]
        if last is None or self._added_texts.get(ids[last]) != terminator:
            last = None
        char = span.start - 1
        token = None
        while char >= 0 and token is None:  # trimmed spaces belong to no token
            token = encoding.char_to_token(char)
            char -= 1
        place = -1 if token is None else token
        while place >= 0 and ids[place] not in self._added_texts:
            place -= 1
        if place < 0:
            return Anchor(0, sample.text[: span.start], last)
        begin = sample.text.rfind(self._added_texts[ids[place]], 0, span.start)
        return Anchor(place, sample.text[begin : span.start], last)

    def _encode_tails(self, tails: Collection[str]) -> None:
        if len(self._tails) > MAX_CACHED_TAILS:
            self._tails.clear()
        missing = sorted(tail for tail in tails if tail not in self._tails)
        for tail, encoding in zip(missing, self._encode(missing), strict=True):
            self._tails[tail] = encoding.ids

    def _align_one(
        self, sample: TextSample, ids: list[int], anchors: list[Anchor]
    ) -> list[LabelledSequence]:
        if sample.is_all_trained:
            return [LabelledSequence(ids, [(0, len(ids))], sample.weight)]
        spans = []
        for anchor in anchors:
            if anchor.terminator is None:
                raise RowError("the answer's end is not one token of its own", "stop-token")
            prompt_ids = self._tails[anchor.tail]
            start = anchor.token + len(prompt_ids)
            if ids[anchor.token : start] != prompt_ids or start > anchor.terminator:
                return [self._join(sample, span) for span in sample.spans]
            spans.append((start, anchor.terminator + 1))
        return [LabelledSequence(ids, spans, sample.weight)]

    def _join(self, sample: TextSample, span: TextSpan) -> LabelledSequence:
        """Tokenize prompt and answer apart: the prompt's ids are then those of inference."""
        texts = [sample.text[: span.start], sample.text[span.start : span.end]]
        terminator = sample.text[span.terminator : span.end]
        prompt, answer, end = (encoding.ids for encoding in self._encode([*texts, terminator]))
        ids = prompt + answer
        decoded = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if answer[-1:] != end or decoded != "".join(texts):
            raise RowError(
                f"the prompt's last tokens ({shorten(texts[0][-20:])}) merge with the answer's "
                "first; the model would be asked with other tokens than it was trained on",
                "template",
            )
        return LabelledSequence(ids, [(len(prompt), len(ids))], sample.weight, is_joined=True)
