"""docs/suites.md names every key of every task, and its examples are suites."""

import re
from pathlib import Path

import pytest
import yaml

from llmtune.evaluation.tasks.config import TASKS

TEXT = (Path(__file__).parents[2] / "docs" / "suites.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))


@pytest.mark.parametrize("task", TASKS)
def test_every_key_has_its_line_and_the_example_is_valid(task):
    [example] = re.findall(r"```yaml\n(.*?)```", SECTIONS[task], re.S)
    TASKS[task].model_validate(yaml.safe_load(example))
    shared = " ".join(body for title, body in SECTIONS.items() if title not in TASKS)
    for key, info in TASKS[task].model_fields.items():
        line = f"| `{key}` |"
        assert key == "task" or line in SECTIONS[task] or line in shared, key
        assert info.description or key == "task"
