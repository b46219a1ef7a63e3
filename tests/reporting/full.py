"""A planted run in which everything was measured: every arm, every diagnosis, every log."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.evaluation.diagnosis.base import Diagnostic, write_diagnostic
from llmtune.evaluation.diagnosis.contamination import (
    ContaminatedItem,
    ContaminationResult,
    SuiteContamination,
)
from llmtune.evaluation.diagnosis.divergence import (
    DivergenceResult,
    StrengthDivergence,
    TextDivergence,
)
from llmtune.evaluation.diagnosis.learning_curve import (
    CurvePoint,
    Forecast,
    LearningCurveResult,
    PowerLaw,
)
from llmtune.evaluation.diagnosis.memorization import MemorizationResult
from llmtune.evaluation.diagnosis.probe import ProbeResult
from llmtune.evaluation.diagnosis.probe_fit import ProbeCell
from llmtune.evaluation.diagnosis.shift import PairShift, ShiftResult, TextSet
from llmtune.evaluation.diagnosis.stops import StopCount, StopsResult
from llmtune.evaluation.halves import in_half_size
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir, atomic_write_text
from tests.reporting.planted import (
    PlantedSuite,
    improve,
    item_ids,
    plant_generations,
    plant_run,
    right_wrong,
    worsen,
)

N = 300
INPUTS = {"items": "i"}


def plant_full_run(path: Path, *, name: str = "full") -> RunDir:
    """Write the run and return its directory."""
    training = {
        "steps": 60,
        "tokens": 60_000,
        "trained_tokens": 1920,
        "seconds": 190.0,
        "device": "cpu",
    }
    stages: dict[str, Any] = {
        "train": {"finished": "now", "seconds": 197.0, "peak_bytes": 3 * 2**30, "result": training},
        "merge": {
            "finished": "now",
            "seconds": 36.0,
            "peak_bytes": 2 * 2**30,
            "result": {"check": {"dtype": "float32", "kl": 2e-6, "num_tokens": 800}},
        },
    }
    manifest = Manifest(
        config={
            "seed": 0,
            "adapter": {"method": "lora", "rank": 16},
            "evaluate": {"bootstrap_samples": 1000},
        },
        base={"origin": "org/small-model", "fingerprint": "b" * 64, "quantization": "nf4"},
        data={
            "train": {
                "sources": [
                    {"path": "a/movies.jsonl", "format": "messages", "rows_read": 9, "rows_kept": 9}
                ]
            }
        },
        stages=stages,
    )
    suites = [_movies(), _tweets(), _general(), _prose()]
    run = plant_run(path / name, suites, manifest=manifest)
    _plant_log(run)
    plant_generations(
        run,
        [
            {
                "prompt": "Is this review positive or negative? A warm and funny film.",
                "base": "The review is negative about the film.",
                "tuned": "The review is positive about the film.",
                "base_stopped": False,
                "tuned_stopped": True,
                "reference": "positive",
            }
        ],
    )
    plant_diagnostics(run)
    return run


def plant_diagnostics(run: RunDir) -> None:
    """Write every diagnosis."""
    directory = run.diagnostics_dir

    def text(kl: float) -> TextDivergence:
        return TextDivergence(kl, kl / 2, 4000, 100, (kl * 0.9, kl * 1.1))

    whole, half = (StrengthDivergence(text(kl), text(3 * kl)) for kl in (0.09, 0.03))
    base, tuned = StopCount(12, 16, 40.0), StopCount(15, 16, 11.0)
    leaked = SuiteContamination(
        1, 1, 0, N, ("movies-3", "movies-5"), (ContaminatedItem("movies-3", "exact", "a:7"),)
    )
    clean = SuiteContamination(0, 0, 0, N, ())
    shift = PairShift(0.41, 0.12, 1.2, (1.0, 1.4), 0.2, 0.013, 0.002, 200, 100)
    texts = TextSet(200, 4.1, 1.2, 1.4, (9.0, 14.0, 22.0, 31.0, 60.0))
    cells = tuple(ProbeCell(layer, "mean", 1.0, 0.7 + layer / 200) for layer in (7, 15, 30))
    for result in (
        DivergenceResult(
            inputs=INPUTS,
            seconds=21.0,
            general=whole.general,
            target=whole.target,
            by_strength={"0.5": half, "1.0": whole},
        ),
        StopsResult(
            inputs=INPUTS,
            seconds=9.0,
            base=base,
            tuned=tuned,
            trained_stop_share=1.0,
            max_new_tokens=64,
        ),
        ContaminationResult(
            inputs=INPUTS, suites={"movies": leaked, "tweets": clean}, n_train_rows=8211
        ),
        ShiftResult(
            inputs=INPUTS,
            sets={"train": texts, "general": texts},
            pairs={"train-evaluation": shift, "train-general": shift},
            layer=15,
        ),
        MemorizationResult(
            inputs=INPUTS,
            gap_nats=0.08,
            gap_interval=(0.02, 0.15),
            auc=0.57,
            auc_interval=(0.51, 0.63),
            n_train=200,
            n_held_out=200,
        ),
        ProbeResult(
            inputs=INPUTS,
            table=cells,
            chosen=cells[-1],
            labels=("positive", "negative"),
            majority=0.51,
            train_rows=300,
        ),
        plant_curve(gain=(0.02, 0.09)),
    ):
        write_diagnostic(result, directory)


def plant_curve(gain: tuple[float, float]) -> LearningCurveResult:
    """Return a learning curve whose doubling lowers the loss by an interval."""
    rows = (120, 240, 480, 960)
    law = PowerLaw(
        E=0.3,
        A=4.0,
        beta=0.5,
        at_n=Forecast(960, 0.43, (0.41, 0.45)),
        at_2n=Forecast(1920, 0.39, (0.36, 0.42)),
        at_4n=Forecast(3840, 0.36, (0.31, 0.41)),
        gain_at_2n=sum(gain) / 2,
        gain_interval=gain,
    )
    return LearningCurveResult(
        inputs=INPUTS,
        suite="movies",
        metric="accuracy",
        loss_name="nats per answer",
        points=tuple(CurvePoint(n, 0, 0.3 + 4 * n**-0.5, 0.8, N) for n in rows),
        fit=law,
        score_fit=None,
        refused=None,
    )


def _movies() -> PlantedSuite:
    base = right_wrong(N, 0.6, seed=0)
    tuned = improve(base, 0.25, seed=1)
    half = worsen(tuned, 0.02, seed=2)
    halves = [i for i, name in enumerate(item_ids("movies", N)) if in_half_size(name)]
    return PlantedSuite(
        "movies",
        "target",
        {
            "original": base,
            "base": base,
            "tuned": tuned,
            "merged": worsen(tuned, 0.01, seed=3),
            "few-shot-1": improve(base, 0.1, seed=4),
            "few-shot-2": improve(base, 0.05, seed=5),
            "few-shot-3": improve(base, 0.12, seed=6),
            "prompt-short": improve(base, 0.02, seed=7),
            "probe": improve(base, 0.15, seed=8),
            "strength-0.5": [half[index] for index in halves],
            "other-large": improve(base, 0.3, seed=9),
        },
        majority=0.52,
        unparsed={"base": 20, "few-shot-1": 2},
        ids={"strength-0.5": [item_ids("movies", N)[index] for index in halves]},
        choices=("positive", "negative"),
        slices=[{"genre": ("war", "comedy", "drama")[index % 3]} for index in range(N)],
        about={
            "strength-0.5": {"strength": 0.5},
            "probe": {"layer": 20, "pooling": "mean", "C": 1.0, "train_rows": 300},
            **{
                f"few-shot-{draw}": {"shots": 8, "draw": draw, "demonstration_tokens": 410 + draw}
                for draw in (1, 2, 3)
            },
        },
    )


def _tweets() -> PlantedSuite:
    base = right_wrong(N, 0.7, seed=11)
    return PlantedSuite("tweets", "transfer", {"base": base, "tuned": improve(base, 0.05, seed=12)})


def _general() -> PlantedSuite:
    base = right_wrong(240, 0.75, seed=21)
    return PlantedSuite("general", "general", {"base": base, "tuned": worsen(base, 0.02, seed=22)})


def _prose() -> PlantedSuite:
    base = [3.0 + index % 17 / 20 for index in range(100)]
    ids = [name for name in item_ids("passages", 100) if in_half_size(name)]
    kept = [index for index, name in enumerate(item_ids("passages", 100)) if in_half_size(name)]
    return PlantedSuite(
        "passages",
        "general",
        {
            "base": base,
            "tuned": [score + 0.09 + index % 5 / 100 for index, score in enumerate(base)],
            "strength-0.5": [base[index] + 0.03 for index in kept],
        },
        metric="nats_per_token",
        ids={"strength-0.5": ids},
        about={"strength-0.5": {"strength": 0.5}},
    )


def _plant_log(run: RunDir) -> None:
    lines = []
    for step in range(1, 61):
        loss, kl = 0.3 + 5 / step, 0.08 * (1 - 0.95**step)
        lines.append(f'{{"step": {step}, "loss": {loss}, "kl_to_base": {kl}}}\n')
        if step % 20 == 0:
            lines.append(f'{{"step": {step}, "eval_loss": {loss + 0.05}}}\n')
    atomic_write_text(run.metrics_path, "".join(lines))


def with_inputs(result: Diagnostic, **inputs: str) -> Diagnostic:
    """Return a diagnosis that says it was made from these inputs."""
    return replace(result, inputs=inputs)
