"""Print the table of docs/report.md: several seeds of one recipe, by a point rule and by ours.

    python scripts/seeds_table.py runs/edge/seed-0 runs/edge/seed-1 ...

A point rule compares means alone: it ships if the target suite is above the base and no general
suite is below it by more than its bound. Ours is the verdict in each run's `report.json`; the last
row is that of all of them together (`llmtune report RUN RUN RUN`).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtune.experiments.seeds import join_reports, open_seed_run
from llmtune.reporting.numbers import unit_of_metric
from llmtune.reporting.suites import Thresholds

Suites = dict[str, dict[str, Any]]


def ships_by_points(suites: Suites) -> bool:
    """Return what a rule without intervals says: every target up, no general beyond its bound."""
    for suite in suites.values():
        gain = suite["difference"] if suite["higher_is_better"] else -suite["difference"]
        bound = Thresholds().general_bound(unit_of_metric(suite["metric"]))
        if suite["role"] == "target" and gain <= 0:
            return False
        if suite["role"] == "general" and -gain > bound:
            return False
    return True


def row_of(name: str, suites: Suites, verdict: str, *, is_joint: bool = False) -> str:
    """Return one line of the table."""
    cells = [name]
    for suite in suites.values():
        unit, (low, high) = unit_of_metric(suite["metric"]), suite["interval"]
        cells.append(f"{unit.difference(suite['difference'])} {unit.interval(low, high)}")
    cells += ["" if is_joint else "SHIP" if ships_by_points(suites) else "no", verdict]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args(arguments).runs
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    names = [
        f"{name} ({suite['role']}, n = {suite['n']})"
        for name, suite in reports[0]["suites"].items()
    ]
    print(f"| seed | {' | '.join(names)} | point rule | verdict |")
    print("|---" * (len(names) + 3) + "|")
    for report in reports:
        print(row_of(str(report["config"]["seed"]), report["suites"], report["verdict"]))
    joint = join_reports([open_seed_run(run) for run in runs], "joint").as_json()
    print(row_of("all", joint["suites"], joint["verdict"], is_joint=True))


if __name__ == "__main__":
    main()
