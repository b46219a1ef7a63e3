"""The table of seeds shows where a rule of points alone flips and the verdict does not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from seeds_table import main

from llmtune.io.run_dir import RunDir, atomic_write_json
from llmtune.reporting.build import build_report
from tests.experiments.test_seeds import plant_seeds


def test_a_point_rule_flips_between_seeds_where_the_verdict_does_not(tmp_path, capsys):
    runs = plant_seeds(tmp_path, (0.0, 0.01, 0.0, 0.013))
    for run in map(RunDir, map(Path, runs)):
        atomic_write_json(run.report_json_path, build_report(run).as_json())
    main(runs)
    _, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["0", "1", "2", "3", "all"]
    assert [row[2] for row in cells] == ["no", "SHIP", "no", "SHIP", ""]
    assert {row[3] for row in cells} == {"INCONCLUSIVE"}
