"""A model behind an OpenAI-compatible endpoint: asked the suites' questions, and what it costs.

Nothing is sent unless `evaluate.endpoints` names one.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from llmtune.evaluation.endpoint import (
    Endpoint,
    EndpointConfig,
    Question,
    ask_all,
    describe_cost,
)
from llmtune.evaluation.few_shot import takes_demonstrations
from llmtune.evaluation.question import question_of
from llmtune.evaluation.run import build_recipe, summarize_items
from llmtune.evaluation.session import Evaluation, Work
from llmtune.evaluation.tasks.base import PromptedSuite, Suite, SuiteItem

CHOICE_TOKENS = 64
"""Length of an answer that names a choice, in tokens: models of APIs write around it."""


def plan_endpoints(evaluation: Evaluation) -> list[Work]:
    """The questions of target and transfer suites, answered by each endpoint."""
    return [
        Work(0, partial(_score_suite, evaluation, name, config, suite))
        for name, config in evaluation.knobs.endpoints.items()
        for suite in evaluation.suites
        if takes_demonstrations(suite)
    ]


def check_endpoint(name: str, config: EndpointConfig, suites: Sequence[Suite]) -> None:
    """Refuse an endpoint that cannot be asked; nothing is sent.

    Raises:
        LlmtuneError: its url, its key, or a suite that a text cannot answer.
    """
    _endpoint_of(name, config)
    for suite in filter(takes_demonstrations, suites):
        assert isinstance(suite.config, PromptedSuite)
        suite.config.require_text_metric(suite.name)


def _endpoint_of(name: str, config: EndpointConfig) -> Endpoint:
    return Endpoint(f"evaluate.endpoints.{name}", config)


def kept_answers(evaluations_dir: Path, name: str) -> Path:
    """Return where an endpoint's answers are kept, one JSON line each: none is paid for twice."""
    return evaluations_dir / f"endpoint-{name}.jsonl"


def _score_suite(evaluation: Evaluation, name: str, config: EndpointConfig, suite: Suite) -> None:
    chosen = evaluation.settings
    assert isinstance(suite.config, PromptedSuite)
    path = kept_answers(evaluation.run.evaluations_dir, name)
    questions = {item.id: _question(suite, item) for item in suite.items}
    endpoint = _endpoint_of(name, config)
    replies = ask_all(endpoint, questions, path, what=suite.name, is_new=evaluation.force)
    items = [suite.config.score_text(item, replies[item.id].text) for item in suite.items]
    evaluation.keep(
        summarize_items(
            suite,
            f"other-{name}",
            items,
            recipe=build_recipe(evaluation.scored, suite, chosen),
            model={"endpoint": config.url, "model": config.model},
            seconds=sum(reply.seconds for reply in replies.values()),
            about=asdict(describe_cost(config, list(replies.values()))),
        )
    )


def _question(suite: Suite, item: SuiteItem) -> Question:
    question = question_of(suite, item)
    longest = getattr(suite.config, "max_new_tokens", CHOICE_TOKENS)
    return Question(question.messages, longest, question.tools or ())
