"""Scores of an untouched base, kept in the cache directory: later runs on it take them over.

They depend on no adapter, only on base, items, precision, machine and the code that scores.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.evaluation.main_arms import WITHOUT_ADAPTER, kind_among
from llmtune.evaluation.results import REUSED, ArmResult, read_items
from llmtune.evaluation.run import ArmPlan, build_recipe, summarize_items
from llmtune.io.cached import cache_dir
from llmtune.io.fingerprint import JsonObject, code_fingerprint, hash_json
from llmtune.io.kept_json import read_kept, write_kept
from llmtune.models.live import LiveModel
from llmtune.scoring.live import facts_of

FOLDER = "scores"
NO_SCORES = {"name", "description", "items", "role"}
"""Suite keys that change no item's score; the items have a fingerprint of their own."""
SCORING_ROOMS = ("evaluation", "scoring", "data", "adapters", "models", "ops")


def find_kept(scored: LiveModel, plan: ArmPlan) -> ArmResult | None:
    """Return what an earlier run measured of the very same; None if there is nothing.

    Args:
        scored: whose identity, as this arm, the result has.
        plan: the arm; one that the adapter takes part in is never kept.
    """
    key = _key(scored, plan)
    if key is None:
        return None
    path = _place(key)
    found = read_kept(path)
    if not isinstance(found, dict) or found.get("key") != key:
        return None
    try:
        items = read_items(path, found.get("items"))
    except LlmtuneError:
        return None  # of a different version: it is measured again
    if [item.id for item in items] != [item.id for item in plan.suite.items]:
        return None
    return summarize_items(
        plan.suite,
        plan.arm,
        items,
        recipe=build_recipe(scored, plan.suite, plan.settings),
        model=scored.identity_as(plan.loaded_arm, plan.strength).as_dict(),
        seconds=0.0,
        about={**plan.about, REUSED: True},
    )


def keep_scores(scored: LiveModel, plan: ArmPlan, result: ArmResult) -> None:
    """Keep the items' scores of an arm without an adapter, whole or not at all."""
    key = _key(scored, plan)
    if key is None:
        return
    items = [asdict(item) for item in result.items]
    with suppress(ValueError):  # a score that is not a number, which JSON cannot hold
        write_kept(_place(key), {"key": key, "items": items}, "the base's scores are")


def _key(scored: LiveModel, plan: ArmPlan) -> JsonObject | None:
    """Return all that the scores depend on; None if an adapter or the user's code is part of it."""
    suite = plan.suite
    if not kind_among(WITHOUT_ADAPTER, plan.arm) or suite.config.recipe_facts():
        return None
    declared = suite.config.model_dump(mode="json", exclude=NO_SCORES)
    identity = scored.identity_as(plan.loaded_arm, plan.strength)
    return {
        "recipe": hash_json(build_recipe(scored, suite, plan.settings)),
        "suite": hash_json([declared, suite.items_fingerprint, [i.id for i in suite.items]]),
        "model": hash_json(facts_of(scored, identity)),
        "token_budget": plan.settings.token_budget,
        "code": code_fingerprint(SCORING_ROOMS),
    }


def _place(key: Mapping[str, Any]) -> Path:
    return cache_dir() / FOLDER / f"{hash_json(key)[:32]}.json"
