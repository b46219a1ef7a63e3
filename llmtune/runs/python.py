"""What a program or a notebook calls: rows and results as Python values."""

import html
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmtune.config import RunConfig, load_config
from llmtune.data.files import json_line
from llmtune.data.formats.base import LABELS, Row
from llmtune.data.init_job import JobName
from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from llmtune.io.fingerprint import hash_text
from llmtune.io.json_files import parse_json
from llmtune.io.listening import Heard, hearing
from llmtune.io.run_dir import atomic_write_text
from llmtune.runs import pipeline

if TYPE_CHECKING:
    import pandas

    from llmtune.evaluation.scores import SuiteScores
    from llmtune.reporting.report import Report

log = logging.getLogger("llmtune")

SHOWN_ROWS = 20
CUT = 200
"""Characters of a cell in a notebook."""


class ScoreTable(dict[str, "SuiteScores"]):
    """Scores by suite, as `llmtune eval --json` prints them, with a table for notebooks."""

    def rows(self) -> list[Row]:
        """Return a row for each suite and arm."""
        return [
            {"suite": name, "arm": arm, "metric": suite["metric"], "n": suite["n"]}
            | {"mean": score["mean"], "standard_error": score["standard_error"]}
            for name, suite in self.items()
            for arm, score in suite["arms"].items()
        ]

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the rows as a DataFrame."""
        return _frame(self.rows())

    def _repr_html_(self) -> str:
        return _table(self.rows())


@dataclass(frozen=True)
class Prediction:
    """One row with its answer; None if the row was too long to be asked."""

    row: Mapping[str, Any]
    answer: str | None
    stopped: bool | None
    """Whether the answer ended by itself."""


class Predictions(tuple[Prediction, ...]):
    """Answers in the order of the rows."""

    __slots__ = ()

    @property
    def answers(self) -> list[str | None]:
        """The answers alone."""
        return [each.answer for each in self]

    def to_pandas(self, answer_column: str = "answer") -> "pandas.DataFrame":
        """Return the rows with `answer` and `stopped` as a DataFrame.

        Raises:
            LlmtuneError: the rows have a column of that name, which would be replaced.
        """
        stopped = "stopped" if answer_column == "answer" else f"{answer_column}_stopped"
        for name in (answer_column, stopped):
            if any(name in each.row for each in self):
                raise LlmtuneError(
                    f"the rows have a column {name!r} already; name the answers' column: "
                    'to_pandas(answer_column="...")'
                )
        return _frame(
            [{**each.row, answer_column: each.answer, stopped: each.stopped} for each in self]
        )

    def _repr_html_(self) -> str:
        name = "model's answer" if any("answer" in each.row for each in self) else "answer"
        return _table([{**each.row, name: each.answer} for each in self])


@dataclass(frozen=True)
class Tuned:
    """A finished run: its config, what its report says, and how to ask it."""

    config: RunConfig
    report: "Report"

    @property
    def run_dir(self) -> Path:
        """Where everything is: adapter, merged model, evaluations, report."""
        return self.config.run_dir

    @property
    def verdict(self) -> str:
        """The first word of the report."""
        return self.report.verdict.name

    def scores(self) -> ScoreTable:
        """Return what was measured."""
        return evaluate(self.config)

    def predict(self, rows: Any, **settings: Any) -> Predictions:
        """Answer rows with the tuned model; see `llmtune.predict`."""
        return predict(self.run_dir, rows, **settings)

    def _repr_html_(self) -> str:
        scores = self.scores()._repr_html_()
        return f"<p><b>{html.escape(self.verdict)}</b> {html.escape(str(self.run_dir))}</p>{scores}"


def tune(  # noqa: PLR0913 (one argument a choice)
    model: Any,
    rows: Any,
    *,
    run_dir: str | Path = "runs/python",
    tokenizer: Any = None,
    test: Any = None,
    task: JobName | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    metric: Callable[[str, str], float] | None = None,
    settings: Mapping[str, Any] | None = None,
    on_step: Heard | None = None,
    on_eval: Heard | None = None,
    force: bool = False,
) -> Tuned:
    """Fine-tune a model on rows as `llmtune init` and `llmtune run` would, and judge it.

    Args:
        model: a checkpoint directory, a .gguf file, a hub id, or a loaded model of transformers,
            which is saved to the cache as it is now.
        rows: a path, a list of dicts, a pandas DataFrame or a datasets Dataset.
        run_dir: where the run is kept; the same call continues it.
        tokenizer: of a loaded model; None takes that of the checkpoint that it came from.
        test: rows for the suite, in place of held-out ones.
        task: what is learned, as `--task` of `llmtune init`.
        format: what the rows are, as `--format`.
        columns: where the format's columns are, as `format's name: rows' name`.
        labels: names of whole-number labels.
        metric: scores a written answer against the reference; it must be importable by its name.
        settings: keys of the config, such as {"train.max_steps": 50, "adapter.rank": 8}.
        on_step: called with each step's line of metrics.
        on_eval: called with each evaluation's.
        force: do again what is finished.

    Raises:
        LlmtuneError: the input is wrong.
        RunInterrupted: stopped; the same call continues.
    """
    from llmtune.data.init import Asked
    from llmtune.runs.rows import draft_config

    _require("run_dir", run_dir, isinstance(run_dir, str | Path), "a path")
    _require("settings", settings, isinstance(settings or {}, Mapping), "a dict of config keys")
    for name, hearer in (("on_step", on_step), ("on_eval", on_eval)):
        _require(name, hearer, hearer is None or callable(hearer), "a function")
    base = _as_base(model, tokenizer)
    path = _as_file(rows)
    names = tuple(labels) or _class_names(rows, columns)
    asked = Asked(
        format=format,
        columns=dict(columns or {}),
        task=task,
        labels=names,
        test=None if test is None else _as_file(test),
    )
    given = json.dumps([path, base, repr(asked)])
    folder = cache_dir() / "python" / hash_text(given)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    draft = draft_config(path, folder / "task.yaml", base=base, asked=asked, force=True)
    if draft.found.bad_rows:
        log.warning(
            "%d of %d rows cannot be used and are left out; the first: %s. "
            'settings={"data.on_bad_row": "error"} refuses them',
            *(draft.found.bad_rows, draft.found.num_rows, draft.found.first_bad_row),
        )
    if metric is not None:
        _set_metric(draft.suite, metric)
    config = load_config(draft.config, [*_overrides(settings or {}), f"run_dir={run_dir}"])
    with hearing(on_step, on_eval):
        return Tuned(config, pipeline.run(config, force=force))


def run(
    config: RunConfig, *, force: bool = False, on_step: Heard | None = None,
    on_eval: Heard | None = None,
) -> "Report":  # fmt: skip
    """Train, merge, evaluate, report and export; see `llmtune.runs.pipeline.run`.

    Args:
        config: of the run.
        force: do again what is finished.
        on_step: called with each step's line of metrics.
        on_eval: called with each evaluation's.
    """
    with hearing(on_step, on_eval):
        return pipeline.run(config, force=force)


def evaluate(
    target: RunConfig | str | Path, suites: Sequence[str | Path] = (), *, force: bool = False
) -> ScoreTable:
    """Score a run on its suites, or any run, adapter or model on `suites`.

    Returns:
        suite -> task, metric, n, arms (mean and standard error), comparison; with `to_pandas()`.
    """
    if isinstance(target, RunConfig):
        return ScoreTable(pipeline.evaluate(target, force=force))
    from llmtune.runs.evaluate import score
    from llmtune.runs.targets import require_run

    if suites:
        return ScoreTable(score(str(target), (), [str(suite) for suite in suites]))
    return ScoreTable(pipeline.evaluate(require_run(str(target)), force=force))


def predict(
    target: str | Path,
    rows: Any,
    *,
    arm: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> Predictions:
    """Answer rows with a run, an adapter or a model.

    Args:
        target: what `llmtune predict` takes.
        rows: a path, prompts as texts, a list of dicts, a DataFrame or a Dataset.
        arm: base, tuned or merged; None takes the target's first.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the likeliest token.
        columns: where a format's columns are, as `format's name: rows' name`.
    """
    from llmtune.data.prompts import PromptChoice
    from llmtune.runs.targets import resolve_target
    from llmtune.serving.predict import PredictSettings, run_predict

    if isinstance(rows, list | tuple) and all(isinstance(row, str) for row in rows):
        rows = [{"prompt": row} for row in rows]
    resolved = resolve_target(str(target))
    like = None if columns else resolved.trained_rows
    with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
        out = Path(folder) / "answers.jsonl"
        settings = PredictSettings(
            Path(_as_file(rows)),
            out,
            arm,
            max_new_tokens,
            temperature,
            PromptChoice(columns=dict(columns or {}), like=like),
            ANSWER,
        )
        run_predict(resolved, settings)
        with out.open(encoding="utf-8") as file:
            lines = [parse_json(line) for line in file]
    text, stopped, skipped = settings.columns
    return Predictions(
        Prediction(
            {key: value for key, value in line.items() if key not in (text, stopped, skipped)},
            line[text],
            line[stopped],
        )
        for line in lines
    )


ANSWER = "llmtune_answer"
"""Such a column no row has."""


def _as_base(model: Any, tokenizer: Any) -> str:
    """Return the base's name; a loaded model is saved, since merge and checks read files."""
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise LlmtuneError("tokenizer: a path or a hub id has its own; take it out")
        return str(model)
    from llmtune.models.loaded import save_loaded

    return str(save_loaded(model, tokenizer))


def _require(name: str, value: Any, is_right: bool, expected: str) -> None:
    """Refuse an argument of the wrong kind before anything is written."""
    if not is_right:
        verb = "are" if name.endswith("s") else "is"
        raise LlmtuneError(f"{name} {verb} a {type(value).__name__}; expected {expected}")


def _as_file(rows: Any) -> str:
    """Return the path of rows; values are written to the cache, under a name by their content."""
    if isinstance(rows, str | Path):
        return str(rows)
    lines = [json_line(row) for row in _iter_rows(rows)]
    if not lines:
        raise LlmtuneError("there are no rows")
    text = "\n".join(lines) + "\n"
    path = cache_dir() / "python" / f"rows-{hash_text(text)[:16]}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    return str(path)


def _iter_rows(rows: Any) -> Iterator[Row]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a DataFrame
        rows = rows.to_dict("records")
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise LlmtuneError(
            f"rows are a {type(rows).__name__}; expected a path, a list of dicts, a DataFrame or "
            "one split of a data set, such as dataset['train']"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise LlmtuneError(f"row {number} is a {type(row).__name__}; expected a dict")
        yield row


def _class_names(rows: Any, columns: Mapping[str, str] | None) -> tuple[str, ...]:
    """Return the names of a data set's whole-number labels, if it has exactly one such column."""
    features = getattr(rows, "features", None)
    if not isinstance(features, Mapping):
        return ()
    named = {key: tuple(each.names) for key, each in features.items() if hasattr(each, "names")}
    wanted = [key for key in named if key in (columns or {}).values()]
    wanted = wanted or [key for key in named if key.lower() in LABELS]
    return named[wanted[0]] if len(wanted) == 1 else ()


def _set_metric(suite: Path | None, metric: Callable[[str, str], float]) -> None:
    """Let a drafted suite score by a function of the user's."""
    from llmtune.evaluation.suite import load_suite

    name = f"{metric.__module__}:{metric.__qualname__}"
    if not metric.__qualname__.isidentifier():
        raise LlmtuneError(f"metric {name}: expected a function of a module, by its own name")
    if suite is None:
        raise LlmtuneError(
            f"metric {name}: there is no suite of your rows; there are too few of them"
        )
    tree = yaml.safe_load(suite.read_text(encoding="utf-8"))
    tree["metric"] = name
    atomic_write_text(suite, yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))
    load_suite(suite)  # says if the task has no metric of one's own


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _frame(rows: Sequence[Mapping[str, Any]]) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError:
        raise LlmtuneError("to_pandas needs one more package: pip install pandas") from None
    return pandas.DataFrame(list(rows))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an HTML table; long ones are cut and the rest counted."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(_cell(row.get(name)))}</td>" for name in names)
        + "</tr>"
        for row in rows[:SHOWN_ROWS]
    )
    more = f"<p>... and {len(rows) - SHOWN_ROWS} more</p>" if len(rows) > SHOWN_ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= CUT else f"{text[:CUT]}..."
