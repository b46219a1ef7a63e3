"""The items of a suite shared by the processes of a run: the scores are those of one process.

The first process decides what is scored as which arm. The others load what it names, each score
their share of the items, and send the scores back.
"""

import heapq
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from socket import gethostname
from typing import Any, TypedDict, cast

from transformers import PreTrainedTokenizerFast

from llmtune.errors import LlmtuneError
from llmtune.evaluation.prompt_file import PromptFile
from llmtune.evaluation.results import ArmResult, ItemScore
from llmtune.evaluation.run import (
    ArmPlan,
    Progress,
    ScoringSettings,
    build_recipe,
    score_items,
    summarize_items,
)
from llmtune.evaluation.tasks.base import Demonstration, Suite
from llmtune.io.fingerprint import JsonObject
from llmtune.io.processes import Processes
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel, ModelIdentity
from llmtune.scoring.live import as_arm


class Share(TypedDict, total=False):
    """What one process is asked to score, as JSON values; nothing in it is the end."""

    model: str
    """Which model is loaded: tuned (the base with its adapter), original or merged."""
    identity: JsonObject
    """Of that model in the first process."""
    dtype: str
    arm: str
    strength: float | None
    suite: str
    ids: list[str]
    references: list[list[str]]
    """Of the items, since the first process may have asked the base for them."""
    demonstrations: list[list[str]]
    prompt: str | None
    token_budget: int | None


class ItemSharing:
    """The first process's side: deals out a suite's items, and gathers their scores."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def score_plan(self, scored: LiveModel, plan: ArmPlan, model: str) -> ArmResult:
        """Return what `run.score_plan` does; `model` is what the others load for it."""
        started = time.perf_counter()
        settings, processes = plan.settings, self._processes
        dealt = deal_items(plan.suite, scored.tokenizer, processes.world_size)
        for rank in range(1, processes.world_size):
            processes.send(rank, _describe(plan, dealt[rank], model, scored.identity))
        total = len(plan.suite.items)

        def report(done: int) -> None:
            processes.heed()
            if settings.on_progress is not None and done < total:
                settings.on_progress(Progress(plan.suite.name, plan.arm, done, total))

        report(0)
        scores = {item.id: item for item in _score_share(scored, plan, dealt[0], report)}
        for rank in range(1, processes.world_size):
            sent = cast(list[dict[str, Any]], processes.receive(rank)["items"])
            scores |= {item["id"]: ItemScore(**item) for item in sent}
        if settings.on_progress is not None:
            settings.on_progress(Progress(plan.suite.name, plan.arm, total, total))
        return summarize_items(
            plan.suite,
            plan.arm,
            [scores[item.id] for item in plan.suite.items],
            recipe=build_recipe(scored, plan.suite, settings),
            model=scored.identity_as(plan.loaded_arm, plan.strength).as_dict(),
            seconds=time.perf_counter() - started,
            about=plan.about,
        )

    def end(self) -> None:
        """Let the others go: there is nothing more to score."""
        for rank in range(1, self._processes.world_size):
            self._processes.send(rank, {})


def help_scoring(
    processes: Processes,
    suites: Sequence[Suite],
    prompts: Mapping[str, PromptFile],
    load: Callable[[str, str], LiveModel],
) -> None:
    """Score what the first process asks of this one, until it asks no more.

    Args:
        suites: the run's, with all their items.
        prompts: the user's own, by name.
        load: loads a model by its name and dtype.

    Raises:
        LlmtuneError: a model that is loaded here is not the one that the first process scores.
    """
    known = {suite.name: suite for suite in suites}
    live: LiveModel | None = None
    loaded = ""
    while share := cast(Share, processes.receive(0)):
        if live is None or share["model"] != loaded:
            live = None
            release_memory()
            loaded = share["model"]
            live = load(loaded, share["dtype"])
        if live.identity.as_dict() != share["identity"]:
            raise other_model(loaded)
        suite = known[share["suite"]].select(set(share["ids"]))
        references = zip(suite.items, share["references"], strict=True)
        asked = replace(
            suite,
            items=tuple(replace(item, references=tuple(texts)) for item, texts in references),
        )
        prompt = share["prompt"]
        settings = ScoringSettings(
            share["token_budget"],
            tuple(Demonstration(*each) for each in share["demonstrations"]),
            None if prompt is None else prompts[prompt],
        )
        plan = ArmPlan(share["arm"], asked, settings, strength=share["strength"])
        scores = _score_share(live, plan, share["ids"], lambda _: processes.heed())
        processes.send(0, {"items": [asdict(item) for item in scores]})


def deal_items(
    suite: Suite, tokenizer: PreTrainedTokenizerFast, num_shares: int
) -> list[list[str]]:
    """Return the ids of the items of each share, about as many tokens in one as in the other."""
    texts = [" ".join((item.asked_text, *item.choices)) for item in suite.items]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    least = [(0, number) for number in range(num_shares)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        tokens, number = heapq.heappop(least)
        shares[number].append(suite.items[place].id)
        heapq.heappush(least, (tokens + lengths[place], number))
    return shares


def other_model(name: str) -> LlmtuneError:
    """Return what ends a process that does not have the model that the first one scores."""
    return LlmtuneError(
        f"on {gethostname()} the {name} model is missing, or differs from the one that the first "
        "process scores (compared by content): all machines need the same base and one run_dir; "
        "put run_dir on a disk that all machines share"
    )


def _describe(plan: ArmPlan, ids: Collection[str], model: str, identity: ModelIdentity) -> Share:
    settings, suite = plan.settings, plan.suite.select(set(ids))
    return {
        "model": model,
        "identity": identity.as_dict(),
        "dtype": identity.dtype,
        "arm": plan.arm,
        "strength": plan.strength,
        "suite": suite.name,
        "ids": list(ids),
        "references": [list(item.references) for item in suite.items],
        "demonstrations": [[one.prompt, one.answer] for one in settings.demonstrations],
        "prompt": None if settings.prompt is None else settings.prompt.name,
        "token_budget": settings.token_budget,
    }


def _score_share(
    scored: LiveModel, plan: ArmPlan, ids: Collection[str], report: Callable[[int], None]
) -> list[ItemScore]:
    suite = plan.suite.select(set(ids))
    if not suite.items:
        return []
    with as_arm(scored, plan.loaded_arm, strength=plan.strength) as answering:
        return score_items(answering, suite, plan.settings, report)
