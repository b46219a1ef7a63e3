"""The verdict: the rules in their order; the first that holds decides."""

from collections.abc import Callable
from dataclasses import replace

from llmtune.reporting.alternatives import more_data, ship_at_strength, use_probe, use_prompt
from llmtune.reporting.evidence import Evidence
from llmtune.reporting.outcome import Verdict
from llmtune.reporting.rules import (
    broke_general,
    contaminated,
    inconclusive,
    negative,
    not_measured,
    ship,
)

Rule = Callable[[Evidence], Verdict | None]


def beyond_rescue(evidence: Evidence) -> Verdict | None:
    """BROKE-GENERAL where no smaller strength mends it."""
    return None if ship_at_strength(evidence) else broke_general(evidence)


RULES: tuple[Rule, ...] = (
    contaminated,
    not_measured,
    negative,
    beyond_rescue,
    use_prompt,
    use_probe,
    ship_at_strength,
    broke_general,
    ship,
    more_data,
    inconclusive,
)


def decide(evidence: Evidence) -> Verdict:
    """Return the first rule's verdict that holds; `also` names the later ones that hold too."""
    fired = [verdict for rule in RULES if (verdict := rule(evidence)) is not None]
    names = list(dict.fromkeys(verdict.name for verdict in fired))
    return replace(fired[0], also=tuple(names[1:]))
