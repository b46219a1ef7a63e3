"""Data commands on a tiny model whose tokenizer has one of the template shapes."""

import json

from tests.data.shapes import SHAPES, Shape, make_shape_tokenizer, write_jsonl
from tests.tiny import make_model


def write_project(directory, shape: str | Shape, rows: list) -> str:
    """Write a base, rows and a config; return the config's path."""
    base = directory / "base"
    make_model("llama", base)
    for path in base.glob("*token*"):
        path.unlink()
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    make_shape_tokenizer(shape).save_pretrained(base)
    train = write_jsonl(directory / "rows.jsonl", rows)
    config = directory / "config.yaml"
    settings = {
        "run_dir": str(directory / "run"),
        "model": {"base": str(base)},
        "data": {"train": [{"path": train}]},
    }
    config.write_text(json.dumps(settings))
    return str(config)
