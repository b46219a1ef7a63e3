"""Tasks of lm-evaluation-harness, run on a model that is already loaded and kept item by item."""

import difflib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.template import template_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import LM_EVAL_TASK, ArmResult, ItemScore, Recipe, finite_or_none
from llmtune.evaluation.stats import standard_error
from llmtune.io.fingerprint import hash_json
from llmtune.io.quiet import quieted
from llmtune.io.stopping import limited_work
from llmtune.models.live import LiveModel
from llmtune.scoring.batches import inference

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

LIBRARY = "lm_eval"
HOW_TO_INSTALL = "install it with: pip install lm-eval"
PREFERRED = ("acc", "exact_match", "bits_per_byte")
"""The metric kept for each item if a task has it; else its first with a value per item."""
METRIC_NAMES = {"acc": "accuracy"}
"""What the same metric is called elsewhere in llmtune."""
TEMPLATE_SECONDS = 10.0
"""Of the processor, for one template of one item."""
PER_BYTE = "bits_per_byte"


@dataclass(frozen=True)
class LmEvalSettings:
    """Tasks of lm-evaluation-harness and how they are run.

    `limit` is the number of items of each task; `num_fewshot` None takes each task's own number;
    `role` says where the report puts the results.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch_size: int = 8
    role: str = "general"


@dataclass(frozen=True)
class LmEvalRun:
    """What one call of the harness gave for one arm: a result a task, and its own summary."""

    results: tuple[ArmResult, ...]
    summary: dict[str, dict[str, Any]]
    """task -> `metric,filter` -> the value that the harness itself reports."""


def suite_name(task: str) -> str:
    """Return the name under which a task's results are kept: `lm_eval_<task>`."""
    return f"lm_eval_{task.replace('/', '_')}"


def run_tasks(scored: LiveModel, arm: str, settings: LmEvalSettings) -> LmEvalRun:
    """Run the settings' tasks on a loaded model as it is.

    Raises:
        LlmtuneError: the harness is not installed, or a task is unknown, needs the network, is
            unsafe, or has no value per item.
    """
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        if error.name is None or not error.name.startswith(LIBRARY):
            raise
        raise LlmtuneError(
            f"--lm-eval: lm-evaluation-harness is not installed; {HOW_TO_INSTALL}"
        ) from None
    started = time.perf_counter()
    with quieted(LIBRARY), inference(scored.model), _bounded_templates():
        manager = _task_manager(settings)
        tasks = _known_tasks(manager, settings)
        model = harness_model(scored, batch_size=settings.batch_size)
        try:
            found = simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.chat_template,
                bootstrap_iters=0,
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise LlmtuneError(
                f"--lm-eval {','.join(settings.tasks)}: lm-evaluation-harness stopped with "
                f"{type(error).__name__}: {_one_line(error)}. Its own tasks fetch their data from "
                "the hub; tasks of your own are found with --include-path"
            ) from error
    seconds = (time.perf_counter() - started) / max(len(found["samples"]), 1)
    return LmEvalRun(
        tuple(
            _arm_result(scored, arm, settings, _Task(name, found, samples), seconds)
            for name, samples in found["samples"].items()
        ),
        found["results"],
    )


@contextmanager
def _bounded_templates() -> Iterator[None]:
    """Bound the time of the templates of tasks, which the harness renders without any limit."""
    from lm_eval.utils import env

    compile_template = env.from_string

    def compile_bounded(source: str, *args: Any, **options: Any) -> Any:
        template = compile_template(source, *args, **options)
        render = template.render

        def render_bounded(*values: Any, **named: Any) -> str:
            with limited_work(TEMPLATE_SECONDS, f"--lm-eval: rendering {source[:60]!r}"):
                text: str = render(*values, **named)
            return text

        template.render = render_bounded
        return template

    env.from_string = compile_bounded
    try:
        yield
    finally:
        del env.from_string


def harness_model(scored: LiveModel, *, batch_size: int = 8) -> "HFLM":
    """Return the loaded model as the harness takes it; nothing is loaded again."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=scored.model, tokenizer=scored.tokenizer, batch_size=batch_size)


@dataclass(frozen=True)
class _Task:
    name: str
    found: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]


def _task_manager(settings: LmEvalSettings) -> "TaskManager":
    """Return an index of tasks; the harness's own, some 10,000, only where they are asked for."""
    from lm_eval.tasks import TaskManager

    if settings.include_path is not None:
        own = TaskManager(include_path=settings.include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in settings.tasks):
            return own
    return TaskManager(include_path=settings.include_path)


def _known_tasks(manager: "TaskManager", settings: LmEvalSettings) -> list[str]:
    chosen = []
    for name in settings.tasks:
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise LlmtuneError(
                f"--lm-eval {name}: no task of that name"
                + (f"; near it: {', '.join(near)}" if near else "")
                + ". Tasks of your own are found with --include-path DIR"
            )
        chosen += matches
    return chosen


def _arm_result(
    scored: LiveModel, arm: str, settings: LmEvalSettings, task: _Task, seconds: float
) -> ArmResult:
    metric, chosen_filter = _choose_metric(task)
    rows = [row for row in task.samples if row["filter"] == chosen_filter]
    items = tuple(_item_score(row, metric) for row in sorted(rows, key=lambda row: row["doc_id"]))
    scores = np.array([item.score for item in items])
    weights = np.array([item.weight for item in items])
    even = bool((weights == 1).all())
    recipe = _recipe(scored, settings, task, metric, chosen_filter)
    return ArmResult(
        suite=suite_name(task.name),
        task=LM_EVAL_TASK,
        role=settings.role,
        description=f"lm-evaluation-harness task {task.name}, {metric}",
        arm=arm,
        metric=METRIC_NAMES.get(metric, metric),
        higher_is_better=metric != PER_BYTE and bool(_direction(task, metric)),
        n=len(items),
        mean=float(np.average(scores, weights=weights)),
        standard_error=finite_or_none(standard_error(scores, weights=None if even else weights)),
        unparseable=sum(not item.parsed for item in items),
        majority=None,
        chance=None,
        recipe=recipe,
        recipe_hash=hash_json(recipe),
        model=scored.identity.as_dict(),
        seconds=seconds,
        items=items,
    )


def _choose_metric(task: _Task) -> tuple[str, str]:
    """Return the metric that has one value an item, and the first of the task's filters."""
    first = task.samples[0]
    per_item = [name for name in first["metrics"] if _has_item_value(first[name], name)]
    if not per_item:
        raise LlmtuneError(
            f"--lm-eval {task.name}: its metrics ({', '.join(first['metrics'])}) have no value per "
            "item, so arms cannot be compared on the same items; choose another task"
        )
    preferred = [name for name in PREFERRED if name in per_item]
    return (preferred or per_item)[0], first["filter"]


def _has_item_value(value: Any, metric: str) -> bool:
    if isinstance(value, tuple | list):
        return metric == PER_BYTE and len(value) == 2
    return isinstance(value, bool | int | float | np.number)


def _item_score(row: Mapping[str, Any], metric: str) -> ItemScore:
    value, weight = row[metric], 1.0
    if metric == PER_BYTE:
        # Rolling likelihood: (sum of log p in nats, bytes), which the harness sums over items.
        log_likelihood, weight = value[0], float(value[1])
        value = -log_likelihood / math.log(2) / weight
    responses = row["filtered_resps"]
    is_choice = all(isinstance(each, tuple | list) for each in responses) and len(responses) > 1
    prediction, details = None, {}
    if is_choice:
        likelihoods = [float(each[0]) for each in responses]
        best = likelihoods.index(max(likelihoods))
        prediction = str(row["arguments"][best][1]).strip()
        details = {"log_likelihoods": likelihoods}
    elif isinstance(responses[0], str):
        prediction = responses[0]
    return ItemScore(
        id=f"{row['doc_id']}-{row['doc_hash'][:12]}",
        score=float(value),
        prediction=prediction,
        answer=None if row["target"] is None else str(row["target"]),
        weight=weight,
        parsed=prediction != "[invalid]",
        details=details,
    )


def _direction(task: _Task, metric: str) -> bool:
    return bool(task.found["higher_is_better"].get(task.name, {}).get(metric, True))


def _recipe(
    scored: LiveModel, settings: LmEvalSettings, task: _Task, metric: str, chosen_filter: str
) -> Recipe:
    identity = scored.identity
    template = template_fingerprint(scored.tokenizer).to_json() if settings.chat_template else None
    return {
        "items": hash_json(sorted({row["doc_hash"] for row in task.samples})),
        "num_items": len({row["doc_id"] for row in task.samples}),
        "scoring": {
            "harness": version(LIBRARY),
            "task": task.name,
            "task_version": task.found["versions"].get(task.name),
            "prompts": hash_json(sorted({row["prompt_hash"] for row in task.samples})),
            "num_fewshot": task.found["n-shot"].get(task.name),
            "metric": metric,
            "filter": chosen_filter,
        },
        "template": hash_json(template),
        "demonstrations": hash_json([]),
        "base": identity.base,
        "precision": {"dtype": identity.dtype, "quantization": identity.quantization},
        "versions": {name: version(name) for name in ("llmtune", "torch", "transformers")},
    }


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]
