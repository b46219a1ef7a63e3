"""A whole small project on disk: a tiny model, sentiment rows, suites and a config."""

import json
from pathlib import Path

from tests.conftest import write_jsonl
from tests.tiny import make_model

GOOD = ("warm", "funny", "bright", "moving", "clever", "lovely", "brisk", "tender")
BAD = ("dull", "flat", "tired", "clumsy", "hollow", "stale", "grim", "sloppy")
THINGS = ("film", "plot", "ending", "cast")


def sentences() -> list[tuple[str, str]]:
    """Return 64 sentences with their labels, no two alike."""
    return [
        (f"The {thing} is {word}.", label)
        for thing in THINGS
        for words, label in ((GOOD, "positive"), (BAD, "negative"))
        for word in words
    ]


def chat_row(sentence: str, label: str) -> dict:
    """Return a training row in the `messages` format."""
    return {
        "messages": [
            {"role": "user", "content": f"{sentence} positive or negative?"},
            {"role": "assistant", "content": label},
        ]
    }


def make_project(directory: Path, family: str = "llama", **settings) -> Path:
    """Write model, rows, suites and config under `directory`; return the config's path.

    `settings` are top-level sections laid over the config's own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    make_model(family, directory / "base")
    rows = sentences()
    train = [row for i, row in enumerate(rows) if i % 4]
    held_out = [row for i, row in enumerate(rows) if not i % 4]
    write_jsonl(directory / "train.jsonl", [chat_row(*row) for row in train])
    write_jsonl(directory / "validation.jsonl", [chat_row(*row) for row in held_out[:4]])
    write_jsonl(
        directory / "items.jsonl",
        [
            {"id": f"item-{i}", "text": text, "answer": label}
            for i, (text, label) in enumerate(held_out[4:])
        ],
    )
    write_jsonl(
        directory / "prose.jsonl",
        [{"id": f"p{i}", "text": f"The quick brown fox saw {i} lazy dogs."} for i in range(4)],
    )
    suites = {
        "sentiment": {
            "task": "choice",
            "role": "target",
            "description": "held-out sentences",
            "items": "items.jsonl",
            "prompt": "{{ text }} positive or negative?",
            "choices": ["positive", "negative"],
        },
        "prose": {
            "task": "perplexity",
            "role": "general",
            "description": "plain text",
            "items": "prose.jsonl",
        },
    }
    for name, suite in suites.items():
        (directory / f"{name}.yaml").write_text(json.dumps(suite))
    config = {
        "run_dir": str(directory / "run"),
        "model": {"base": str(directory / "base")},
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "data": {
            "train": [{"path": str(directory / "train.jsonl")}],
            "evaluation": [{"path": str(directory / "validation.jsonl")}],
            "max_length": 128,
        },
        "train": {"learning_rate": 5e-3, "max_steps": 3, "batch_size": 8},
        "evaluate": {
            "suites": [str(directory / f"{name}.yaml") for name in suites],
            "bootstrap_samples": 1000,
        },
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config | settings, indent=1))
    return path
