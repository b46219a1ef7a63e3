"""What every task of a suite says itself: its items, how they are asked, scored and counted."""

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmtune.data.problems import RowError
from llmtune.evaluation.question import read_question, refuse_context
from llmtune.evaluation.results import NAME_RULE, ItemScore, KeptAnswer, is_suite_name
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.schema import Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.conversation import Conversation
    from llmtune.data.init_suite import SuiteDraft
    from llmtune.models.live import LiveModel
    from llmtune.scoring.requests import ContinuationRequest

Role = Literal["target", "transfer", "general"]
Ability = Literal["knowledge", "text", "chat"]  # what it knows, how it reads, how it answers
ABILITIES: tuple[Ability, ...] = ("knowledge", "text", "chat")
ERROR = "error"  # the loss of a learning curve if a task has no likelihood of the right answer

Fields = Mapping[str, Any]


class BadItem(ValueError):
    """What is wrong with one line of a suite's items; the reader adds the place."""


@dataclass(frozen=True)
class SuiteItem:
    """One question, rendered. What a task does not use is empty.

    `answer` is the index of the right choice (-1: none); `references` are the accepted texts,
    `labels` those of all items if they are few; `line` is a line of the file `source`.
    """

    id: str
    line: int
    source: str = ""
    prompt: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1
    references: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    text: str = ""
    cluster: str | None = None
    slices: tuple[tuple[str, str], ...] = ()
    number: int | None = None
    """The right choice as a whole number, until all lines are read (`settle_items`)."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The chat that the prompt ends, if there is more of it than the prompt."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that may be called."""

    def asking(self, question: "Conversation") -> "SuiteItem":
        """Return the item with what it asks."""
        is_plain = [message["role"] for message in question.messages] == ["user"]
        return replace(
            self,
            prompt=str(question.messages[-1]["content"]),
            messages=() if is_plain else tuple(question.messages),
            tools=tuple(question.tools or ()),
        )

    @property
    def asked_text(self) -> str:
        """All that is asked, or the passage: two chats that end alike are two questions."""
        if not self.messages:
            return self.prompt or self.text
        return "\n".join(str(message.get("content") or "") for message in self.messages)

    @property
    def right_answer(self) -> str:
        """The right choice, or the first accepted text."""
        return self.choices[self.answer] if self.choices else self.references[0]

    def scored(
        self,
        score: float,
        *,
        prediction: str | None,
        answer: str | None,
        weight: float = 1.0,
        parsed: bool = True,
        details: dict[str, Any] | None = None,
    ) -> ItemScore:
        """Return the item's score, with what results are grouped by."""
        return ItemScore(
            id=self.id,
            score=score,
            prediction=prediction,
            answer=answer,
            cluster=self.cluster,
            weight=weight,
            parsed=parsed,
            slices=dict(self.slices),
            details=details or {},
        )


@dataclass(frozen=True)
class Demonstration:
    """A worked example shown before the question (few-shot): a prompt and its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Metric:
    """How a metric is read: its direction, and what one unit means."""

    name: str
    higher_is_better: bool
    unit: str


@dataclass(frozen=True)
class Scoring:
    """How the items of a suite are scored: padded tokens in a batch, and what is shown before."""

    token_budget: int
    demonstrations: Sequence[Demonstration] = ()
    on_items: Callable[[int], None] | None = None


class SuiteConfig(Section):
    """What every suite declares. Paths are relative to the suite file.

    A task is a subclass with a literal `task`, its own knobs, and `metric`, one of `METRICS`.
    """

    METRICS: ClassVar[tuple[Metric, ...]] = ()
    """The metrics that the task can be scored by."""
    ABILITY: ClassVar[Ability] = "knowledge"
    """What a general suite of the task asks for."""
    NEEDS_BASE_ANSWERS: ClassVar[bool] = False
    """Whether the items' references are what the untouched base writes."""
    SCORES_TEXTS: ClassVar[bool] = True
    """Whether a suite that asks can score an answer that was written out."""
    WRITES_ANSWERS: ClassVar[bool] = False
    """Whether an item's prediction is all that was written."""

    if TYPE_CHECKING:
        task: str
        metric: str

    name: str | None = None
    """Name in results; default: the file's stem."""
    description: str = ""
    """One line for people."""
    items: Path
    """File of items (JSONL, JSON, CSV, Parquet), or a folder of such files or of texts."""
    id: str = "id"
    """Field with an item's name; default: its line."""
    cluster: str | None = None
    """Field by which items belong together (a document)."""
    slices: tuple[str, ...] = ()
    """Fields to break results down by."""
    limit: int | None = Field(default=None, ge=1)
    """Items at most; null takes all."""
    role: Role = "target"
    """What was trained, a domain never seen, or general ability."""

    @field_validator("name")
    @classmethod
    def _require_file_name(cls, name: str | None) -> str | None:
        if name is not None and not is_suite_name(name):
            raise ValueError(f"{name!r} cannot name the suite's results: {NAME_RULE}")
        return name

    @classmethod
    def draft(cls, rows: "SuiteDraft") -> list[str] | None:
        """Return the YAML lines of a first suite over the user's rows; None if they do not suit."""
        return None

    @property
    def chosen_metric(self) -> Metric:
        """The metric that items are scored by."""
        return next(metric for metric in self.METRICS if metric.name == self.metric)

    def check_templates(self, items_path: Path) -> None:
        """Raise a `LlmtuneError` if a template of the declaration cannot be compiled."""

    def read_item(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with what the task asks, read from the fields of its line.

        Raises:
            BadItem: a field is missing or wrong.
        """
        raise NotImplementedError

    def settle_items(self, items: Sequence[SuiteItem]) -> tuple[SuiteItem, ...]:
        """Return the items after what only all of them together can say.

        Raises:
            BadItem: they do not fit together; the message names the line.
        """
        return tuple(items)

    def score(self, scored: "LiveModel", suite: "Suite", scoring: Scoring) -> list[ItemScore]:
        """Score every item of a suite of this task, in the suite's order."""
        raise NotImplementedError

    def write_answers(
        self, base: "LiveModel", suite: "Suite", token_budget: int | None = None
    ) -> list[str]:
        """Return what the untouched base answers to every item, if the task needs that."""
        raise NotImplementedError

    def describe(self, scores: Sequence[ItemScore]) -> JsonObject:
        """Return what the items' scores say beside their mean, as JSON values."""
        return {}

    def recipe_facts(self) -> JsonObject:
        """Return what decides scores and is not in the declaration (the user's own code)."""
        return {}

    def count_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: "Suite") -> int:
        """Return the forward tokens of scoring, written ones as many as there may be."""
        raise NotImplementedError

    def item_lengths(self, tokenizer: "PreTrainedTokenizerFast", suite: "Suite") -> list[int]:
        """Return how many positions each item takes at least; 1 if a task does not say."""
        return [1 for _ in suite.items]

    def majority(self, items: Sequence[SuiteItem]) -> float | None:
        """Return what always giving the commonest answer scores; None if it means nothing."""
        return None

    def chance(self, items: Sequence[SuiteItem]) -> float | None:
        """Return what guessing among the choices would score; None if there are none."""
        return None

    @property
    def fixed_choices(self) -> tuple[str, ...]:
        """The choices that every item has; empty if an item has its own, or none."""
        return ()

    def choice_requests(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        suite: "Suite",
        demonstrations: Sequence[Demonstration] = (),
    ) -> "list[ContinuationRequest]":
        """Return each item's prompt and choices as token ids; empty if items have no choices."""
        return []

    @property
    def loss_name(self) -> str:
        """What a learning curve plots of this task."""
        return ERROR

    def item_loss(self, item: SuiteItem, score: ItemScore) -> float | None:
        """Return an item's loss for a learning curve; None if that is only its error."""
        return None

    def kept_answer(self, score: ItemScore) -> KeptAnswer | None:
        """Return what the model wrote to an item's chat; None if it is not known."""
        return None


class PromptedSuite(SuiteConfig):
    """A suite that asks: a prompt rendered over each item's fields, or a chat in one of them."""

    prompt: str | None = None
    """Jinja2 template over an item's fields."""
    messages: str | None = None
    """Field with a chat that waits for an answer, instead of a prompt. Either way an item's fields
    `system` and `tools` are read as in training."""
    system: str | None = None
    """System message (chat only)."""
    chat: bool = True
    """Prompt is a user message; false: raw text, no template."""
    answer: str = "answer"
    """Field with the right answer."""

    @classmethod
    def draft_prompt(cls, rows: "SuiteDraft") -> list[str]:
        """Return the lines that ask each row's question."""
        text = json.dumps(rows.system, ensure_ascii=False)
        system = [] if rows.system is None else [f"system: {text}"]
        return ['prompt: "{{ prompt }}"', *system, *(["chat: false"] if rows.is_plain else [])]

    @model_validator(mode="after")
    def _require_chat_for_system(self) -> "PromptedSuite":
        if self.system is not None and not self.chat:
            raise ValueError("system needs chat: true; with chat: false write it into the prompt")
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('give either prompt: "{{ question }}" or messages: <field of a chat>')
        if self.messages is not None and not self.chat:
            raise ValueError("messages needs chat: true; raw text has a prompt")
        return self

    def check_templates(self, items_path: Path) -> None:
        """Compile the prompt.

        Raises:
            LlmtuneError: it is not a Jinja2 template.
        """
        from llmtune.evaluation.templates import compile_template

        if self.prompt is not None:
            compile_template(self.prompt, f"prompt of the suite over {items_path}")

    def render_prompt(self, fields: Fields) -> str:
        """Return the prompt over an item's fields.

        Raises:
            BadItem: it cannot be rendered, or is empty.
        """
        from llmtune.evaluation import templates

        text = self.prompt or ""
        try:
            prompt = templates.compile_template(text, "prompt").render(fields)
        except templates.RENDERING_ERRORS as error:
            raise BadItem(templates.describe_failure(error, text, fields)) from None
        if not prompt.strip():
            raise BadItem("the prompt is empty")
        return prompt

    @property
    def separator(self) -> str:
        """What is written between a prompt and its answer if there is no chat template."""
        return " "

    def read_item(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with its prompt and its right answer."""
        used: Container[str] = ()
        if self.messages is None:
            from llmtune.evaluation.templates import template_variables

            prompt = self.render_prompt(fields)
            used = template_variables(self.prompt or "")
            turns: Any = [{"role": "user", "content": prompt}]
        else:
            turns = read_field(fields, self.messages)
        try:
            if self.chat:
                item = item.asking(read_question(fields, turns, used, self.system))
            else:
                refuse_context(fields, used)
                item = replace(item, prompt=prompt)
        except RowError as error:
            raise BadItem(str(error)) from None
        return self.read_answer(fields, item)

    def read_answer(self, fields: Fields, item: SuiteItem) -> SuiteItem:
        """Return `item` with what counts as right.

        Raises:
            BadItem: the answer is missing or wrong.
        """
        raise NotImplementedError

    def class_answers(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Demonstration, str]]:
        """Return questions and answers as demonstrations, each with the class that it belongs to.

        A pair whose answer could not be right in any item is left out.
        """
        return [(Demonstration(question, answer), "") for question, answer in pairs]

    def answer_tokens(self, tokenizer: "PreTrainedTokenizerFast", suite: "Suite") -> int:
        """Return how many tokens an answer can need at most, its end included."""
        raise NotImplementedError

    def score_text(self, item: SuiteItem, text: str) -> ItemScore:
        """Score an answer that was written out; one that cannot be read scores 0."""
        raise NotImplementedError

    def require_text_metric(self, name: str) -> None:
        """Raise a `LlmtuneError` if the metric of suite `name` cannot score a written answer."""


@dataclass(frozen=True)
class Suite:
    """A suite read whole: its declaration, its items in file order, and their fingerprint."""

    name: str
    path: Path
    config: SuiteConfig
    items: tuple[SuiteItem, ...]
    items_path: Path
    items_fingerprint: str
    whole: int | None = None
    """Items of the suite that these were selected from; None if these are all."""

    @property
    def num_whole(self) -> int:
        """How many items the suite has, selected here or not."""
        return len(self.items) if self.whole is None else self.whole

    def select(self, ids: Container[str]) -> "Suite":
        """Return the suite with some of its items; its fingerprint stays that of all of them."""
        items = tuple(item for item in self.items if item.id in ids)
        return self if items == self.items else replace(self, items=items, whole=self.num_whole)

    def with_base_answers(self, texts: Sequence[str]) -> "Suite":
        """Return the suite with what the base answers as references, and a fingerprint of both."""
        items = tuple(
            replace(item, references=(text,)) for item, text in zip(self.items, texts, strict=True)
        )
        fingerprint = hash_json([self.items_fingerprint, list(texts)])
        return replace(self, items=items, items_fingerprint=fingerprint)

    @property
    def fingerprint(self) -> str:
        """A hash of the declaration and of every item."""
        return hash_json([self.config.model_dump(mode="json"), self.items_fingerprint])

    @property
    def asks(self) -> bool:
        """Whether the items have prompts, so that a text can answer them."""
        return isinstance(self.config, PromptedSuite) and self.config.SCORES_TEXTS

    @property
    def task(self) -> str:
        """The name of the suite's task."""
        return self.config.task

    @property
    def role(self) -> Role:
        """What the suite is there for."""
        return self.config.role

    @property
    def description(self) -> str:
        """One line for people."""
        return self.config.description


def read_field(fields: Fields, name: str) -> Any:
    """Return a field of an item's line.

    Raises:
        BadItem: it is missing or null.
    """
    if fields.get(name) is None:
        raise BadItem(f"field {name!r} is missing; the item has {', '.join(sorted(fields))}")
    return fields[name]
