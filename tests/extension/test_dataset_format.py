"""A dataset format is one new file and one entry, and is found, guessed, checked and trained."""

import json

from tests.conftest import write_jsonl
from tests.extension.house import House
from tests.project import make_project, sentences

FORMAT = '''
"""The `pair` format: a list of two texts, the question and its answer."""

from typing import ClassVar

from llmtune.data.conversation import Conversation, chat
from llmtune.data.formats.base import DatasetFormat, Row, row_weight


class PairFormat(DatasetFormat):
    """`{"pair": ["question", "answer"]}`."""

    name: ClassVar[str] = "pair"
    columns: ClassVar[dict[str, str]] = {"pair": "question and answer", "weight": "of the loss"}
    required: ClassVar[tuple[str, ...]] = ("pair",)
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {"pair": ("pair", "turn")}

    def recognizes(self, row: Row) -> bool:
        return isinstance(row.get("pair"), list)

    def to_conversation(self, row: Row) -> Conversation:
        question, answer = row["pair"]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return chat(turns, weight=row_weight(row))
'''


def test_a_format_is_one_file_and_one_entry(tmp_path):
    house = House(tmp_path / "house")
    house.add("data/formats/pair.py", FORMAT)
    house.enter(
        "data/formats/__init__.py",
        {
            "from llmtune.data.formats.text import TextFormat\n": (
                "from llmtune.data.formats.text import TextFormat\n"
                "from llmtune.data.formats.pair import PairFormat\n"
            ),
            "        TextFormat,\n": "        TextFormat,\n        PairFormat,\n",
        },
    )
    project = tmp_path / "project"
    config = make_project(project)
    rows = [{"pair": [f"{text} positive or negative?", label]} for text, label in sentences()]
    write_jsonl(project / "pairs.jsonl", rows)
    tree = json.loads(config.read_text())
    tree["data"]["train"] = [{"path": str(project / "pairs.jsonl"), "format": "pair"}]
    tree["data"]["evaluation"] = []
    config.write_text(json.dumps(tree))

    house.run("data", "check", str(config), cwd=project)
    shown = house.run("data", "show", str(config), "--json", cwd=project).stdout
    assert "The film is warm. positive or negative?" in json.loads(shown.splitlines()[0])["text"]
    trained = house.run("train", str(config), "--json", cwd=project).stdout
    assert json.loads(trained)["trained_tokens"] > 0
    turns = [{"turn": pair["pair"]} for pair in rows]
    write_jsonl(project / "turns.jsonl", turns)
    house.run("init", "turns.jsonl", "--out", "mine.yaml", cwd=project)
    assert "{path: turns.jsonl, format: pair, columns: {pair: turn}}" in (
        (project / "mine.yaml").read_text()
    )
