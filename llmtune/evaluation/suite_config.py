"""What a suite file may say: one class per task, told apart by `task`."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from llmtune.evaluation.metrics import Normalization
from llmtune.schema import Section

Role = Literal["target", "transfer", "general"]
NAME_RULE = "letters, digits, `_`, `-` and `.`, no dot or dash first"


def is_suite_name(text: str) -> bool:
    """Return whether a name can stand in the names of result files without leading elsewhere."""
    return re.fullmatch(r"\w[\w.-]*", text) is not None


class SuiteConfig(Section):
    """What every suite declares. Paths are relative to the suite file."""

    name: str | None = Field(default=None, description="Name in results; default: the file's stem.")
    description: str = Field(default="", description="One line for people.")
    items: Path = Field(description="JSONL file, one item a line.")
    id: str = Field(default="id", description="Field with an item's name; default: its line.")
    cluster: str | None = Field(
        default=None, description="Field by which items belong together (a document)."
    )
    slices: tuple[str, ...] = Field(default=(), description="Fields to break results down by.")
    limit: int | None = Field(default=None, ge=1, description="Items at most; null takes all.")
    role: Role = Field(
        default="target",
        description="What was trained, a domain never seen, or general ability.",
    )

    @field_validator("name")
    @classmethod
    def _require_file_name(cls, name: str | None) -> str | None:
        if name is not None and not is_suite_name(name):
            raise ValueError(f"{name!r} cannot name the suite's results: {NAME_RULE}")
        return name


class PromptedSuite(SuiteConfig):
    """A suite that asks: a prompt rendered over each item's fields."""

    prompt: str = Field(description="Jinja2 template over an item's fields.")
    system: str | None = Field(default=None, description="System message (chat only).")
    chat: bool = Field(
        default=True, description="Prompt is a user message; false: raw text, no template."
    )
    answer: str = Field(default="answer", description="Field with the right answer.")

    @model_validator(mode="after")
    def _require_chat_for_system(self) -> "PromptedSuite":
        if self.system is not None and not self.chat:
            raise ValueError("system needs chat: true; with chat: false write it into the prompt")
        return self


class ChoiceSuite(PromptedSuite):
    """The most likely of some given answers."""

    task: Literal["choice"]
    choices: tuple[str, ...] | None = Field(default=None, description="The same for every item.")
    choices_field: str | None = Field(default=None, description="Field with an item's choices.")
    normalize: Literal["none", "length"] = Field(
        default="none", description="Compare log-likelihoods, or their mean per token."
    )
    delimiter: str = Field(
        default=" ", description="Between prompt and choice where chat is false."
    )
    end_of_answer: bool = Field(
        default=False,
        description="Also score the end-of-turn token, so that '4' is not favoured over '42'.",
    )
    metric: Literal["accuracy", "answer_probability"] = "accuracy"
    """What an item scores."""

    @model_validator(mode="after")
    def _require_choices(self) -> "ChoiceSuite":
        if (self.choices is None) == (self.choices_field is None):
            raise ValueError("give either choices: [..] or choices_field: <field>")
        if self.choices is not None and len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError(f"choices must be at least two different texts, not {self.choices}")
        if self.end_of_answer and not self.chat:
            raise ValueError("end_of_answer needs chat: true; raw text has no end-of-turn token")
        return self


class ExactSuite(PromptedSuite):
    """A generated answer compared with the reference."""

    task: Literal["exact"]
    max_new_tokens: int = Field(default=16, ge=1, description="Length of an answer in tokens.")
    normalize: tuple[Normalization, ...] = Field(
        default=("strip", "lowercase", "whitespace"),
        description="Applied to prediction and reference before they are compared.",
    )
    extract: str | None = Field(
        default=None,
        description="Regex with one group that finds the answer; no match is unparseable.",
    )
    metric: Literal["exact_match", "contains", "token_f1", "number_match"] = "exact_match"
    """What an item scores."""

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


class PerplexitySuite(SuiteConfig):
    """How well the model predicts passages of text."""

    task: Literal["perplexity"]
    text: str = Field(default="text", description="Field with the passage.")
    max_length: int = Field(default=512, ge=2, description="Window in tokens.")
    metric: Literal["nats_per_token", "bits_per_byte"] = "nats_per_token"
    """What an item scores."""


AnySuiteConfig = ChoiceSuite | ExactSuite | PerplexitySuite
TASKS: dict[str, type[AnySuiteConfig]] = {
    "choice": ChoiceSuite,
    "exact": ExactSuite,
    "perplexity": PerplexitySuite,
}
