"""The facts that the rules look at: measured changes, compared with bounds and with chance."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from scipy.special import ndtri

from llmtune.evaluation.diagnosis.base import Leak
from llmtune.evaluation.stats import holm
from llmtune.evaluation.tasks.base import ABILITIES, Ability
from llmtune.reporting.beside import has_fewer_answers
from llmtune.reporting.diagnostics import Diagnostics
from llmtune.reporting.sections.arms import FEW_SHOT, PROMPTING, split_name
from llmtune.reporting.sections.strengths import StrengthSweep
from llmtune.reporting.suites import Change, SuiteReport, Thresholds


@dataclass(frozen=True)
class Evidence:
    """The numbers a rule may look at; what was not measured is None."""

    suites: tuple[SuiteReport, ...]
    thresholds: Thresholds = field(default_factory=Thresholds)
    confidence: float = 0.95
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    strengths: StrengthSweep | None = None
    keep: tuple[Ability, ...] = ABILITIES
    """What must not be lost; other general suites are given up."""
    merge_base: str | None = None
    """What the adapter was merged into; None if the base was not quantized, or without a merge."""
    is_judged: bool = False
    """Whether an adapter or model from elsewhere is judged, with `llmtune judge`."""

    def with_role(self, role: str) -> tuple[SuiteReport, ...]:
        """Return the suites of a role on which what ships was compared with what was there."""
        return tuple(s for s in self.suites if s.role == role and s.change is not None)

    @property
    def significance(self) -> float:
        """Return the level that Holm-adjusted p-values must stay below."""
        return 1 - self.confidence

    def better(self, role: str) -> tuple[SuiteReport, ...]:
        """Return the role's suites with a gain clear of 0, Holm-adjusted over the role.

        A suite below the floor of items and clusters shows none.
        """
        return self.clear(self.with_role(role), lambda suite: suite.change, sign=1)

    def worse(self, role: str) -> tuple[SuiteReport, ...]:
        """Return the role's suites with a loss clear of 0, each by its own interval.

        No correction: more suites must not make harm harder to find.
        """
        return self.clear(self.with_role(role), lambda suite: suite.change, sign=-1)

    def lost_answers(self) -> tuple[SuiteReport, ...]:
        """Return the target suites that gained whole answers and lost right ones beyond the bound.

        The right answer is somewhere in the text less often, clear of 0 and by more than a general
        suite may lose: taking it out of the text of the model before would beat what ships. How
        much the form gained does not excuse it. A smaller loss is in the headline.
        """
        return tuple(
            suite
            for suite in self.better("target")
            if has_fewer_answers(suite) and self.used_bound(suite, suite.lenient) > 1
        )

    def hurt_targets(self) -> tuple[SuiteReport, ...]:
        """Return the target suites that are worse, in their own score or in right answers."""
        return (*self.worse("target"), *self.lost_answers())

    def broken(self) -> tuple[SuiteReport, ...]:
        """Return the general suites that lost more than their bound, clear of 0."""
        return tuple(suite for suite in self._lost() if suite.ability in self.keep)

    def given_up(self) -> tuple[SuiteReport, ...]:
        """Return the general suites that lost as much and that nobody asked to keep."""
        return tuple(suite for suite in self._lost() if suite.ability not in self.keep)

    def _lost(self) -> tuple[SuiteReport, ...]:
        worse = {s.name for s in self.worse("general") if self.used_bound(s, s.change) > 1}
        return tuple(
            suite
            for suite in self.with_role("general")
            if suite.name in worse or suite.has_collapsed(self.thresholds)
        )

    def merged_worse(self) -> tuple[SuiteReport, ...]:
        """Return the suites on which merging lost what training had brought, or broke something.

        That is a loss clear of 0 that takes a quarter of a target's gain or half of a general
        suite's bound; smaller ones are caveats.
        """
        suites = [s for s in self.suites if s.role in ("target", "general")]
        return tuple(
            suite
            for suite in self.clear(suites, lambda suite: suite.chain.get("merging"), sign=-1)
            if self._share_lost_in_merging(suite) > self.thresholds.merging_share[suite.role]
        )

    def _share_lost_in_merging(self, suite: SuiteReport) -> float:
        merging, training = (suite.chain.get(part) for part in ("merging", "training"))
        if suite.role == "general":
            return self.used_bound(suite, merging)
        if merging is None or training is None or suite.gain(training)[1] <= 0:
            return 0.0
        return -suite.gain(merging)[0] / suite.gain(training)[0]

    def is_within(self, suite: SuiteReport, change: Change | None) -> bool:
        """Return whether a general suite is shown to be within its bound, interval and all."""
        if change is None or not change.is_enough or self.is_at_chance(suite):
            return False
        return -suite.gain(change)[1] <= self.thresholds.general_bound(suite.unit)

    def is_at_chance(self, suite: SuiteReport) -> bool:
        """Return whether there was so little to lose that no loss beyond the bound can be seen."""
        if suite.chance is None or suite.before is None or not suite.higher_is_better:
            return False
        return suite.before - suite.chance <= self.thresholds.general_bound(suite.unit)

    def unmeasured_abilities(self) -> tuple[Ability, ...]:
        """Return what must not be lost and no general suite asks for."""
        asked = {suite.ability for suite in self.with_role("general")}
        return tuple(ability for ability in self.keep if ability not in asked)

    def unshown(self) -> tuple[SuiteReport, ...]:
        """Return the general suites that are neither broken nor shown to be within their bound."""
        broken = self.broken()
        return tuple(
            suite
            for suite in self.with_role("general")
            if suite.ability in self.keep
            and suite not in broken
            and not self.is_within(suite, suite.change)
        )

    def doubtful(self) -> tuple[SuiteReport, ...]:
        """Return the general suites measured beyond their bound that chance might explain."""
        return tuple(s for s in self.unshown() if self.used_bound(s, s.change) > 1)

    def used_bound(self, suite: SuiteReport, change: Change | None) -> float:
        """Return a loss as a share of what a general suite may lose; negative for a gain."""
        assert change is not None, "only compared suites use up a bound"
        return -suite.gain(change)[0] / self.thresholds.general_bound(suite.unit)

    def clear(
        self,
        suites: Iterable[SuiteReport],
        change_of: Callable[[SuiteReport], Change | None],
        *,
        sign: int,
    ) -> tuple[SuiteReport, ...]:
        """Return the suites whose change is clear of 0 in one direction.

        Gains are Holm-adjusted over all, need the floor of items and, if their changes have a long
        tail towards harm, a smaller p-value; losses need none of these.

        Args:
            change_of: the change that is asked about; suites that have none are left out.
            sign: 1 for gains, -1 for losses.
        """
        pairs = [(s, change) for s in suites if (change := change_of(s)) is not None]
        adjusted = holm([change.gain_p for _, change in pairs])
        found = []
        for (suite, change), p_value in zip(pairs, adjusted, strict=True):
            _, low, high = suite.gain(change)
            is_gain = low > 0 and change.is_enough and p_value <= self.significance
            if is_gain if sign > 0 else high < 0:
                found.append(suite)
        return tuple(found)

    def leaked(self) -> tuple[tuple[SuiteReport, Leak], ...]:
        """Return the target suites with too many of their items among the training rows."""
        found = self.diagnostics.leaks
        return tuple(
            (suite, found[suite.name])
            for suite in self.suites
            if suite.role == "target"
            and suite.name in found
            and found[suite.name].share > self.thresholds.contaminated_share
        )

    def prompts(self) -> list[str]:
        """Return the ways of prompting that were tried; few-shot counts once, by its mean."""
        targets = self.with_role("target")
        names = dict.fromkeys(name for suite in targets for name in suite.rivals)
        return [
            name
            for name in names
            if split_name(name).kind in PROMPTING
            and not (split_name(name).kind == FEW_SHOT and split_name(name).rest)
        ]

    def is_as_good(self, arm: str, *, among: Sequence[str]) -> bool:
        """Return whether this arm is shown to be as good as tuning, and to beat the bare base.

        As good: on every target suite the whole interval of tuned minus it is within the margin
        (`Thresholds.as_good_margin`). Both are held to what the number of arms in `among` asks for
        (Bonferroni): the best of many prompts is not believed for being the best.
        """
        measured = [suite for suite in self.with_role("target") if tuned_over(suite, arm)]
        tried = max(len(among), 1)
        if not measured or not all(self._is_within_margin(s, arm, tried) for s in measured):
            return False
        return any(
            change.gain_p * tried <= self.significance
            for suite in self.clear(measured, lambda suite: over_base(suite, arm), sign=1)
            if (change := over_base(suite, arm))
        )

    def margin(self, suite: SuiteReport) -> float:
        """Return by how much an arm may be worse than tuning on a target suite, raw unit."""
        gain = suite.gain(suite.change)[0] if suite.change else 0.0
        return self.thresholds.as_good_margin(suite.unit, gain)

    def _is_within_margin(self, suite: SuiteReport, arm: str, tried: int) -> bool:
        change = tuned_over(suite, arm)
        if change is None or not change.is_enough:
            return False
        lead, _, high = suite.gain(change)
        usual, asked = (ndtri(1 - self.significance / 2 / times) for times in (1, tried))
        return bool(lead + (high - lead) * asked / usual <= self.margin(suite))


def gain_of(suite: SuiteReport) -> tuple[float, float, float]:
    """Return the change and its interval, turned so that positive is better."""
    assert suite.change is not None, "only compared suites are asked for their gain"
    return suite.gain(suite.change)


def is_above_majority(suite: SuiteReport) -> bool:
    """Return whether what ships is shown to beat always giving the most frequent right answer.

    By its interval, if the items tell that answer's score one by one.
    """
    if suite.over_majority is not None:
        return suite.gain(suite.over_majority)[1] > 0
    return suite.majority is None or suite.after is None or suite.after > suite.majority


def over_base(suite: SuiteReport, arm: str) -> Change | None:
    """Return the change from the base to an arm, None if it was not measured."""
    rival = suite.rivals.get(arm)
    return rival.over_base if rival else None


def tuned_over(suite: SuiteReport, arm: str) -> Change | None:
    """Return the change from an arm to the tuned model, None if it was not measured."""
    rival = suite.rivals.get(arm)
    return rival.tuned_over if rival else None
