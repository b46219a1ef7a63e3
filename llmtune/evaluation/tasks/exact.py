"""A generated answer compared with the reference."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtune.evaluation.answers import find_choice, find_last_number
from llmtune.evaluation.results import ItemScore, KeptAnswer, commonest_share
from llmtune.evaluation.tasks.base import (
    BadItem,
    Fields,
    Metric,
    PromptedSuite,
    Scoring,
    Suite,
    SuiteItem,
    read_field,
)
from llmtune.evaluation.text_metrics import (
    MATCHING_SECONDS,
    OWN_METRIC,
    TEXT_METRICS,
    TextMetric,
    corpus_bleu,
    fingerprint_own_metric,
    load_own_metric,
    load_schema_metric,
)
from llmtune.io.fingerprint import JsonObject
from llmtune.io.stopping import limited_work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.init_suite import SuiteDraft
    from llmtune.models.live import LiveModel

Normalization = Literal["strip", "lowercase", "punctuation", "articles", "whitespace"]
MetricName = Literal[
    "exact_match",
    "contains",
    "token_f1",
    "number_match",
    "rouge_l",
    "bleu",
    "chrf",
    "json_valid",
    "json_match",
    "json_fields",
    "json_schema",
]
OwnMetric = Annotated[str, Field(pattern=f"^{OWN_METRIC.pattern}$")]
JSON_METRICS = ("json_valid", "json_match", "json_fields")
"""Each of them is kept beside the others: is it JSON, the right JSON, how many fields are right."""
STRICT_METRICS = ("exact_match", "contains", "number_match")
"""Those that have a strict and a lenient form."""
ANY_THAT_FITS = "(whatever the schema allows)"
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SHORT_ANSWER = 60
"""Characters; a drafted suite asks whether a reference this short is in the answer."""
LONGEST_ANSWER_TOKENS = 256
TOKENS_AROUND = 24
"""What the untuned model may write around a short answer."""
END_TOKENS = 8
ITEMS_A_LABEL = 2
"""Answers are labels if there are at least so many items for each of them."""
JSON_LONGER = 1.5
"""Tokens of JSON, which is full of signs, for those guessed from its characters."""
PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactSuite(PromptedSuite):
    """A generated answer compared with the reference."""

    METRICS: ClassVar[tuple[Metric, ...]] = (
        Metric("exact_match", True, "share of items"),
        Metric("contains", True, "share of items"),
        Metric("token_f1", True, "F1 of words"),
        Metric("number_match", True, "share of items"),
        Metric("rouge_l", True, "F1 of the longest common words"),
        Metric("bleu", True, "sentence BLEU"),
        Metric("chrf", True, "chrF"),
        Metric("json_valid", True, "share of items"),
        Metric("json_match", True, "share of items"),
        Metric("json_fields", True, "F1 of fields"),
        Metric("json_schema", True, "share of items"),
    )

    WRITES_ANSWERS: ClassVar[bool] = True
    task: Literal["exact"]
    max_new_tokens: int = Field(default=16, ge=1)
    """Length of an answer in tokens."""
    normalize: tuple[Normalization, ...] = ("strip", "lowercase", "whitespace")
    """Applied to prediction and reference before they are compared."""
    extract: str | None = None
    """Regex with one group that finds the answer; no match is unparseable."""
    stop: tuple[str, ...] | None = None
    """Texts that end an answer; null: the line's end where chat is false, else none."""
    metric: MetricName | OwnMetric = "exact_match"
    """What an item scores; `my_module:function` is your own."""

    answer_schema: dict[str, Any] | None = None
    """A JSON Schema that answers must satisfy, for the metric `json_schema`."""

    @model_validator(mode="after")
    def _schema_has_its_metric(self) -> Self:
        if (self.metric == "json_schema") != (self.answer_schema is not None):
            raise ValueError("metric: json_schema and answer_schema belong together: give both")
        return self

    @classmethod
    def draft(cls, rows: "SuiteDraft") -> list[str] | None:
        """Compare what is written with each row's answer: short ones as a whole, long ones not."""
        if not rows.asks:
            return None
        if rows.is_json:
            tokens = math.ceil(JSON_LONGER * rows.longest_answer_tokens) + END_TOKENS
            return [
                *cls.draft_prompt(rows),
                f"max_new_tokens: {tokens}",
                "metric: json_fields   # F1 of the fields; valid and equal JSON are shown beside",
            ]
        is_short = rows.longest_answer <= SHORT_ANSWER
        around = TOKENS_AROUND if is_short else END_TOKENS
        tokens = rows.longest_answer_tokens + around
        lines = [f"max_new_tokens: {min(tokens, LONGEST_ANSWER_TOKENS)}"]
        if is_short and all(NUMBER.fullmatch(row["answer"].strip()) for row in rows.items):
            lines.append("metric: number_match   # the last number in the text")
        elif is_short:
            lines.append("metric: contains   # anywhere in the text: a new format is not a gain")
        else:
            lines += [
                "metric: token_f1   # words shared with the reference; long answers never match",
                "limit: 100   # every answer is written out, which takes time",
            ]
        return cls.draft_prompt(rows) + lines

    @field_validator("extract")
    @classmethod
    def _require_one_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"the pattern needs exactly one group, it has {groups}")
        return pattern

    @property
    def is_own_metric(self) -> bool:
        """Whether the metric is a function of the user's."""
        return OWN_METRIC.fullmatch(self.metric) is not None

    @property
    def chosen_metric(self) -> Metric:
        """The metric that items are scored by."""
        if self.is_own_metric:
            return Metric(self.metric, True, "as your function returns")
        return super().chosen_metric

    def recipe_facts(self) -> JsonObject:
        """Return a hash of the user's own metric."""
        return {"source": fingerprint_own_metric(self.metric)} if self.is_own_metric else {}

    def check_templates(self, items_path: Path) -> None:
        """Compile the prompt, and find the user's own metric."""
        super().check_templates(items_path)
        if self.is_own_metric:
            load_own_metric(self.metric)
        self._schema_metric  # noqa: B018 (raises if it is not a schema)

    @cached_property
    def _schema_metric(self) -> TextMetric | None:
        return None if self.answer_schema is None else load_schema_metric(self.answer_schema)

    def read_answer(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with the accepted texts; a schema needs none."""
        if self.answer_schema is not None and self.answer not in fields:
            return replace(item, references=(ANY_THAT_FITS,))
        answer = read_field(fields, self.answer)
        if self.metric.startswith("json_") and isinstance(answer, dict | list):
            return replace(item, references=(json.dumps(answer, ensure_ascii=False),))
        references = answer if isinstance(answer, list) else [answer]
        plain = all(isinstance(ref, str | int | float) for ref in references)
        if not references or not plain or not all(str(ref).strip() for ref in references):
            raise BadItem(f"field {self.answer!r} must be a text, a number or a list of those")
        if self.metric == "number_match":
            for reference in map(str, references):
                if find_last_number(reference) is None:
                    raise BadItem(f"the answer {reference!r} holds no number that can be read")
        return replace(item, references=tuple(str(reference) for reference in references))

    def settle_items(self, items: Sequence[SuiteItem]) -> tuple[SuiteItem, ...]:
        """Return the items, each with the labels that all of them have, if their answers are such.

        An answer that names two labels ("positive or negative") holds none of them.
        """
        labels = {
            normalize_text(each, self.normalize): each for one in items for each in one.references
        }
        are_single = all(len(item.references) == 1 for item in items)
        are_few = 1 < len(labels) <= len(items) / ITEMS_A_LABEL
        if self.metric != "exact_match" or not are_single or not are_few:
            return tuple(items)
        return tuple(replace(item, labels=tuple(labels.values())) for item in items)

    def score(self, scored: "LiveModel", suite: Suite, scoring: Scoring) -> list[ItemScore]:
        """Write an answer to every item and score it."""
        from llmtune.evaluation.requests import encode_prompts
        from llmtune.scoring.generate import Decoding, generate_texts

        written = generate_texts(
            scored.model,
            scored.tokenizer,
            encode_prompts(scored.tokenizer, suite, scoring.demonstrations),
            Decoding(self.max_new_tokens, scored.stop_token_ids),
            token_budget=scoring.token_budget,
            on_progress=scoring.on_items,
        )
        scores = []
        for item, answer in zip(suite.items, written, strict=True):
            text = self.cut(answer.text)
            details = {
                "stopped": answer.stopped,
                "num_tokens": len(answer.token_ids),
                "cut_off": not answer.stopped and text.lstrip() == answer.text.lstrip(),
            }
            scores.append(self._score_written(item, text, details))
        return scores

    def kept_answer(self, score: ItemScore) -> KeptAnswer | None:
        """Return the whole answer, if a model of ours wrote it."""
        if not self.chat or score.prediction is None or "num_tokens" not in score.details:
            return None
        return KeptAnswer(score.prediction, self.max_new_tokens, self.stop or ())

    def cut(self, text: str) -> str:
        """Return a written text up to the first of the texts that end an answer."""
        from llmtune.evaluation.requests import cut_at

        stops = self.stop if self.stop is not None else () if self.chat else ("\n",)
        return cut_at(text, stops) if stops else text

    def describe(self, scores: Sequence[ItemScore]) -> JsonObject:
        """Return what is shown beside the score, and how often the length ended an answer."""
        found = self._describe_answers(scores)
        if not all("cut_off" in each.details for each in scores):
            return found
        return {**found, "cut_off": sum(one.details["cut_off"] for one in scores) / len(scores)}

    def _describe_answers(self, scores: Sequence[ItemScore]) -> JsonObject:
        """Return the strict and the lenient score: the whole answer is right, or a part of it."""
        if self.metric == "bleu":
            texts = [(each.prediction or "", each.answer or "") for each in scores]
            return {"corpus_bleu": corpus_bleu(*zip(*texts, strict=True))}
        if all("json" in each.details for each in scores):
            return {
                name: sum(each.details["json"][name] for each in scores) / len(scores)
                for name in JSON_METRICS
            }
        kept = [each.details for each in scores if "lenient" in each.details]
        if not kept or len(kept) < len(scores):
            return {}
        return {
            name: sum(details[name] for details in kept) / len(kept)
            for name in ("strict", "lenient")
        }

    def count_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return the tokens of the prompts, a shared beginning once, and of the answers."""
        from llmtune.evaluation.requests import encode_prompts
        from llmtune.scoring.prefix import count_prompt_tokens

        prompts = encode_prompts(tokenizer, suite)
        return count_prompt_tokens(prompts) + self.max_new_tokens * len(prompts)

    def item_lengths(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> list[int]:
        """Return the tokens of each prompt and one to answer with."""
        from llmtune.evaluation.requests import encode_prompts

        return [len(prompt) + 1 for prompt in encode_prompts(tokenizer, suite)]

    def majority(self, items: Sequence[SuiteItem]) -> float | None:
        """Return the share of the commonest reference; None if any answer of a form is right."""
        if self.answer_schema is not None:
            return None
        return commonest_share([normalize_text(i.references[0], self.normalize) for i in items])

    def answer_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: Suite) -> int:
        """Return `max_new_tokens`."""
        return self.max_new_tokens

    def score_text(self, item: SuiteItem, text: str) -> ItemScore:
        """Score an answer by the suite's metric."""
        return self._score_written(item, text)

    def _score_written(
        self, item: SuiteItem, text: str, details: dict[str, Any] | None = None
    ) -> ItemScore:
        found: str | None = text
        if self.extract is not None:
            with limited_work(MATCHING_SECONDS, f"extract: matching {self.extract!r} in an answer"):
                match = re.search(self.extract, text)
            found = match.group(1) if match else None
        score = 0.0
        details = {**(details or {}), **self._strict_and_lenient(item, text)}
        if self.metric in JSON_METRICS and item.references[0] != ANY_THAT_FITS:
            details["json"] = {
                name: max(TEXT_METRICS[name](found or "", each) for each in item.references)
                for name in JSON_METRICS
            }
        if found is not None:
            score = max(self._score_pair(found, reference) for reference in item.references)
        return item.scored(
            score,
            prediction=text,
            answer=item.references[0],
            parsed=bool(found and found.strip()) and self._is_readable(found),
            details=details,
        )

    def _score_pair(self, found: str, reference: str) -> float:
        """Score an answer against one reference; overlap and JSON metrics read them as written."""
        if self.metric in METRIC_FUNCTIONS:
            texts = [normalize_text(text, self.normalize) for text in (found, reference)]
            return METRIC_FUNCTIONS[self.metric](*texts)
        score = self._schema_metric or TEXT_METRICS.get(self.metric) or load_own_metric(self.metric)
        return score(found.strip(), reference.strip())

    def _strict_and_lenient(self, item: SuiteItem, text: str) -> dict[str, float]:
        """Score the whole written text, and whether a right answer is anywhere in it."""
        if self.metric not in STRICT_METRICS:
            return {}
        written = normalize_text(text, self.normalize)
        references = [normalize_text(each, self.normalize) for each in item.references]
        strict = max(exact_match(written, each) for each in references)
        if item.labels:
            named = find_choice(text, item.labels)
            answer = None if named is None else normalize_text(item.labels[named], self.normalize)
            lenient = float(answer in references)
        else:
            lenient = max(contains(written, each) for each in references)
        if self.metric == "number_match":
            lenient = max(lenient, *(number_match(written, each) for each in references))
        return {"strict": strict, "lenient": max(strict, lenient)}

    def _is_readable(self, found: str | None) -> bool:
        return found is not None and (
            self.metric != "number_match" or find_last_number(found) is not None
        )


def exact_match(prediction: str, reference: str) -> float:
    """1 if the two normalized texts are the same."""
    return float(prediction == reference)


def contains(prediction: str, reference: str) -> float:
    """1 if the normalized reference is anywhere in the prediction as whole words."""
    pattern = rf"(?<!\w){re.escape(reference)}(?!\w)"
    return float(re.search(pattern, prediction) is not None)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of words (SQuAD); 0 where none is shared."""
    written, expected = prediction.split(), reference.split()
    if not written or not expected:
        return float(written == expected)
    shared = sum((Counter(written) & Counter(expected)).values())
    return 2 * shared / (len(written) + len(expected))


def number_match(prediction: str, reference: str) -> float:
    """1 if the last number in the prediction equals the last number in the reference."""
    written, expected = find_last_number(prediction), find_last_number(reference)
    return float(written is not None and written == expected)


METRIC_FUNCTIONS = {
    "exact_match": exact_match,
    "contains": contains,
    "token_f1": token_f1,
    "number_match": number_match,
}
"""What an item scores, by metric: the normalized prediction against one normalized reference."""


def normalize_text(text: str, steps: Sequence[Normalization]) -> str:
    """Apply the steps in a fixed order: lowercase, punctuation, articles, whitespace, strip."""
    if "lowercase" in steps:
        text = text.lower()
    if "punctuation" in steps:
        text = text.translate(PUNCTUATION)
    if "articles" in steps:
        text = ARTICLES.sub(" ", text)
    if "whitespace" in steps:
        text = " ".join(text.split())
    if "strip" in steps:
        text = text.strip()
    return text
