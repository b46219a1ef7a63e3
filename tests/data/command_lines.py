"""Data commands on a tiny model whose tokenizer has one of the template shapes."""

import json

from tests.data.shapes import make_shape, write_jsonl
from tests.tiny import make_model


def write_project(directory, shape: str, rows: list) -> str:
    """Write a base, rows and a config; return the config's path."""
    base = directory / "base"
    make_model("llama", base)
    for path in base.glob("*token*"):
        path.unlink()
    make_shape(shape).save_pretrained(base)
    train = write_jsonl(directory / "rows.jsonl", rows)
    config = directory / "config.yaml"
    settings = {
        "run_dir": str(directory / "run"),
        "model": {"base": str(base)},
        "data": {"train": [{"path": train}]},
    }
    config.write_text(json.dumps(settings))
    return str(config)
