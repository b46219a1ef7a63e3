"""The terminal's table: whole at 80 columns, and without color if none is wanted."""

import pytest
from rich.console import Console

from llmtune.io.manifest import Manifest
from llmtune.reporting.build import build_report
from llmtune.reporting.terminal import render_terminal
from tests.reporting.planted import PlantedSuite, improve, plant_run, right_wrong


@pytest.fixture
def report(tmp_path):
    base = right_wrong(1200, 0.7, seed=0)
    tuned = improve(base, 0.2, seed=1)
    prose = [3.0 + index / 100 for index in range(40)]
    return build_report(
        plant_run(
            tmp_path,
            [
                PlantedSuite(
                    "movies",
                    "target",
                    {"base": base, "tuned": tuned, "merged": tuned},
                    majority=0.525,
                ),
                PlantedSuite("[bold]a-very-long-name", "transfer", {"base": base, "tuned": tuned}),
                PlantedSuite(
                    "prose",
                    "general",
                    {"base": prose, "tuned": [score + 0.3 for score in prose]},
                    metric="nats_per_token",
                ),
            ],
            manifest=Manifest(
                config={"evaluate": {"bootstrap_samples": 1000}},
                stages={"train": {"seconds": 209.0, "peak_bytes": 2**31, "result": {}}},
            ),
        )
    )


def printed(report, *, soft_wrap: bool = False, **options) -> str:
    console = Console(width=80, force_terminal=True, **options)
    with console.capture() as capture:
        console.print(render_terminal(report), soft_wrap=soft_wrap)
    return capture.get()


@pytest.mark.parametrize("soft_wrap", [False, True])
def test_every_number_and_sentence_is_whole_at_80_columns(report, soft_wrap):
    text = printed(report, color_system=None, soft_wrap=soft_wrap)
    assert max(len(line) for line in text.splitlines()) <= 80
    for part in ("BROKE-GENERAL", "70.0 %", "90.0 %", "52.5 %", "+20.0 [", "+0.300"):
        assert part in text
    assert "…" not in text
    words = " ".join(text.split())
    for sentence in (*report.verdict.reasons, *report.caveats):
        assert " ".join(sentence.split()) in words


def test_markup_in_a_suite_name_is_text(report):
    assert "[bold]" in printed(report, color_system=None)


def test_no_color_prints_no_color(report, monkeypatch):
    assert "\x1b[1;31mBROKE-GENERAL" in printed(report, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(report, color_system="standard")
    assert not any(f"\x1b[{code}m" in text for code in ("31", "1;31", "32", "33"))


def test_cost_line_names_only_what_is_known(report):
    last = printed(report, color_system=None).strip().splitlines()[-1]
    assert last == "train 3 min 29 s, peak 2.0 GiB"
