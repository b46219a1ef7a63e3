"""What a user says about the data: sources, lengths, what the loss is taken on, and mixing."""

import codecs
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtune.data.files import FIRST_SPLIT, UTF8, Reading
from llmtune.data.formats import FORMATS
from llmtune.schema import Section

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[("auto", *FORMATS)]


class SourceConfig(Section):
    """One place rows come from."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a directory, a glob, or a hub id (`org/name`).

    Files: .jsonl .json .csv .tsv .parquet .arrow .txt, each also as .gz .zst .bz2 .xz."""
    format: FormatName = "auto"
    """What a row looks like. `auto` looks at the rows and says what it found."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where the format's columns are in this source, as `format's name: source's name`,
    for example `{instruction: question, output: answer}`."""
    ignore: tuple[str, ...] = ()
    """Columns to leave out on purpose that could change what is trained, such as a label beside
    a text. Without this they are refused; plain metadata needs no entry."""
    render: Literal["chat", "plain"] = "chat"
    """`chat` puts a prompt/completion row through the chat template; `plain` joins the two texts
    as they are (only for `completion`)."""
    instruction: Annotated[str, Field(min_length=1)] | None = None
    """What is put before every prompt, with an empty line between, for example which labels there
    are (only for `completion`)."""
    labels: tuple[str, ...] = ()
    """The names of whole-number labels: the first is that of 0 (only for `completion`)."""
    encoding: str = UTF8
    """Of text files that are not UTF-8, such as cp1252."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Between the fields of a CSV; null: a comma, in .tsv a tab."""
    revision: str | None = None
    """A hub id's commit, branch or tag."""
    split: str = "train"
    """A hub id's split, or a JSON file's list of several (`{"train": [...]}`)."""
    subset: str | None = None
    """A hub id's configuration name."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is seen in one epoch: 0.5 takes half of the rows, 2 takes each twice."""
    rows: Annotated[int | None, Field(gt=0)] = None
    """How many rows of this source one epoch holds, instead of `weight`."""
    limit: Annotated[int | None, Field(gt=0)] = None
    """Read only the first rows of this source."""
    replay: bool = False
    """General data mixed in against forgetting: takes `mixture.replay_share` of the epoch."""

    @field_validator("encoding")
    @classmethod
    def _require_encoding(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError:
            raise ValueError(f"{value!r} is not an encoding; for example utf-8, cp1252") from None
        return value

    @property
    def name(self) -> str:
        """The path, with the list or split if it is not the first."""
        return self.path if self.split == FIRST_SPLIT else f"{self.path}, {self.split}"

    @property
    def reading(self) -> Reading:
        """How its files are read."""
        return Reading(self.encoding, self.delimiter, self.split)

    @model_validator(mode="after")
    def _plain_is_for_completion(self) -> Self:
        plain = [name for name, member in FORMATS.items() if member.has_plain_form]
        if self.render == "plain" and self.format not in ("auto", *plain):
            raise ValueError(
                f"render: plain joins a prompt and a completion; format is {self.format!r}. "
                f"Use format: {' or '.join(plain)}, or leave render out"
            )
        asking = [name for name, member in FORMATS.items() if member.takes_instruction]
        if (self.instruction or self.labels) and self.format not in asking:
            raise ValueError(
                f"instruction and labels need format: {' or '.join(asking)}, not {self.format!r}"
            )
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: a name is there twice")
        if self.rows is not None and self.weight != 1.0:
            raise ValueError("give either rows or weight for a source, not both")
        return self


class MixtureConfig(Section):
    """How several sources share an epoch."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Shares are proportional to (rows x weight)^(1/temperature): above 1, small sources count
    more."""
    max_repeats: Annotated[float, Field(gt=0)] = 4.0
    """No row is seen more often than this in one epoch; what is cut off is reported."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of an epoch's rows that the sources marked `replay` take together."""


class DataConfig(Section):
    """The data of a run."""

    train: Annotated[list[SourceConfig], Field(min_length=1)]
    """What is trained on."""
    evaluation: list[SourceConfig] = Field(default_factory=list)
    """What the loss is watched on during training; it must not share a row with `train`."""
    evaluation_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the train rows kept out for evaluation, chosen by the hash of each
    conversation, so that adding rows moves none."""
    max_length: Annotated[int | None, Field(gt=1)] = None
    """The longest example in tokens. null: no limit."""
    length_policy: Literal["error", "drop", "truncate-prompt", "split"] = "error"
    """What happens to a longer row. `error`: stop when more than 1 % of the trained tokens would
    be lost, else leave the row out. `drop`: leave it out. `truncate-prompt`: take the middle out
    of its longest prompt text. `split`: cut plain text into pieces."""
    loss_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    """Which tokens are trained: every assistant turn and its end, the last one, or everything."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What happens when a row cannot be used: stop and name all, or leave out, count and list."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Short examples share one row of a batch. `auto`: when a probe of the loaded model shows
    that neighbors do not influence each other."""
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    """How the sources share an epoch."""
    system: str | None = None
    """The system prompt of every chat that has none of its own, in training and wherever the model
    is used; "" is an empty one in place of the template's default."""
    cache: bool = True
    """Keep tokenized data, by content, in the cache directory."""

    @field_validator("system")
    @classmethod
    def _refuse_half_characters(cls, system: str | None) -> str | None:
        try:
            (system or "").encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a character pair; write the character itself") from None
        return system

    @field_validator("packing", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: object) -> object:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _mixture_is_possible(self) -> Self:
        if self.train and all(source.replay for source in self.train):
            raise ValueError("every train source is marked replay: mark only the general ones")
        if any(source.replay for source in self.evaluation):
            raise ValueError("replay is for train sources: take it off the evaluation ones")
        if any(source.rows is not None or source.weight != 1.0 for source in self.evaluation):
            raise ValueError(
                "rows and weight mix train sources; an evaluation source is read once (limit: N "
                "reads its first N rows)"
            )
        if self.length_policy != "error" and self.max_length is None:
            raise ValueError(
                f"length_policy: {self.length_policy} needs max_length; set it, or leave both out"
            )
        return self


NO_ROWS = DataConfig.model_construct(train=[])
"""The data of a model that was trained elsewhere, on rows that nobody has named."""
