"""Fitting a linear probe: labeled training prompts, states of the base, cross-validation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    from llmtune.evaluation.diagnosis.states import Standardizer, TextStates
    from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject
    from llmtune.evaluation.tasks.base import Suite

MAX_ROWS = 1000
MIN_ROWS = 20
FOLDS = 5
MIN_MATCHED = 0.9
POOLINGS = ("mean", "last")
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Values of C, strong to weak, for standardised features."""
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class ProbeCell:
    """One layer and pooling of the probe's table with its best C and that C's accuracy."""

    layer: int
    pooling: str
    C: float
    cv_accuracy: float


@dataclass(frozen=True)
class LabelledPrompts:
    """Train prompts as token ids with the class of each, an index of `labels` (folded texts)."""

    prompts: list[tuple[int, ...]]
    classes: np.ndarray
    labels: tuple[str, ...]


@dataclass(frozen=True)
class FittedProbe:
    """A classifier on one layer's pooled states."""

    cell: ProbeCell
    standardizer: Standardizer
    classifier: LogisticRegression
    labels: tuple[str, ...]
    train_rows: int

    def predict(self, states: TextStates) -> np.ndarray:
        """Return probabilities [N, labels]."""
        import numpy as np

        features = self.standardizer.apply(states.pooled(self.cell.pooling, self.cell.layer))
        return np.asarray(self.classifier.predict_proba(features))


def cross_validate(
    states: TextStates, classes: np.ndarray, layers: Sequence[int], *, seed: int
) -> list[ProbeCell]:
    """Return for every layer and pooling the best C and its mean accuracy over the folds.

    Of equal accuracies the stronger regularisation wins.
    """
    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    from llmtune.evaluation.diagnosis.states import fit_standardizer

    folds = StratifiedKFold(
        min(FOLDS, int(np.bincount(classes).min())), shuffle=True, random_state=seed
    )
    table = []
    for layer in layers:
        for pooling in POOLINGS:
            raw = states.pooled(pooling, layer)
            features = _rotate(fit_standardizer(raw).apply(raw))
            accuracies = [
                _accuracy(_classifier(strength), features, classes, folds) for strength in STRENGTHS
            ]
            best = int(np.argmax(accuracies))
            table.append(ProbeCell(layer, pooling, STRENGTHS[best], accuracies[best]))
    return table


def fit_probe(states: TextStates, found: LabelledPrompts, cell: ProbeCell) -> FittedProbe:
    """Fit the chosen cell on all train rows."""
    from sklearn.exceptions import ConvergenceWarning

    from llmtune.evaluation.diagnosis.states import fit_standardizer

    raw = states.pooled(cell.pooling, cell.layer)
    standardizer = fit_standardizer(raw)
    classifier = _classifier(cell.C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(standardizer.apply(raw), found.classes)
    return FittedProbe(cell, standardizer, classifier, found.labels, len(found.classes))


def label_prompts(
    subject: Subject, suites: Sequence[Suite], settings: DiagnosisSettings
) -> LabelledPrompts | str:
    """Return the train prompts with their classes, or why there are none."""
    import numpy as np

    from llmtune.evaluation.diagnosis.subject import answer_text, last_turn, pick

    if not suites:
        return "no target or transfer suite asks for one of fixed choices"
    choices = {fold(choice) for suite in suites for choice in suite.config.fixed_choices}
    places = pick(subject.trained, MAX_ROWS, settings.seed)
    turns = [turn for turn in (last_turn(subject.train[place]) for place in places) if turn]
    answers = [fold(answer_text(subject.scored.tokenizer, turn)) for turn in turns]
    matched = [place for place, answer in enumerate(answers) if answer in choices]
    if len(matched) < MIN_MATCHED * len(places):
        return (
            f"only {len(matched)} of {len(places)} train rows end in one of the suites' choices "
            f"({len(set(answers))} different answers): the task is not classification"
        )
    counts = Counter(answers[place] for place in matched)
    labels = tuple(sorted(label for label, count in counts.items() if count > 1))
    kept = [place for place in matched if answers[place] in labels]
    if len(labels) < 2 or len(kept) < MIN_ROWS:
        return f"{len(kept)} train rows of {len(labels)} answers are too few for a probe"
    return LabelledPrompts(
        prompts=[turns[place].prompt_ids for place in kept],
        classes=np.array([labels.index(answers[place]) for place in kept]),
        labels=labels,
    )


def fold(text: str) -> str:
    """Return a label without case and outer spaces."""
    return " ".join(text.casefold().split())


def _rotate(features: np.ndarray) -> np.ndarray:
    """Return features [N, min(N, H)] with the same inner products.

    The ridge penalty sees nothing else, so the classifier is the same and wide models are cheap.
    """
    import numpy as np

    if features.shape[1] <= features.shape[0]:
        return features
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    return np.asarray(left * singular)


def _classifier(strength: float) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)


def _accuracy(
    classifier: LogisticRegression,
    features: np.ndarray,
    classes: np.ndarray,
    folds: StratifiedKFold,
) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import cross_val_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(classifier, features, classes, cv=folds).mean())
