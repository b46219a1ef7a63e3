"""Print the table of docs/plan.md: which models fit which cards, each cell computed by `plan`."""

import sys
from pathlib import Path

from llmtune.config import load_config
from llmtune.runs.pipeline import plan

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "qwen3-0.6b": "Qwen3-0.6B",
    "qwen3-1.7b": "Qwen3-1.7B",
    "llama-3.2-3b": "Llama-3.2-3B",
    "qwen3-4b": "Qwen3-4B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "qwen2.5-14b": "Qwen2.5-14B",
    "qwen2.5-32b": "Qwen2.5-32B",
    "llama-3.1-70b": "Llama-3.1-70B",
}
METHODS = {"LoRA, 16-bit": "null", "QLoRA, NF4": "{method: nf4}"}
CARDS = ("8GB", "12GB", "16GB", "24GB", "48GB", "80GB")
NO_FIT = "-"


def main() -> None:
    """Print the table."""
    print("\n".join(table_lines()))


def table_lines() -> list[str]:
    """Return the table's lines, in Markdown."""
    heads = ["model", "base", *(f"{card.removesuffix('GB')} GB" for card in CARDS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for shape, name in SHAPES.items():
        for method, quantization in METHODS.items():
            cells = [_cell(shape, quantization, card) for card in CARDS]
            lines.append("| " + " | ".join([name, method, *cells]) + " |")
    return lines


def _cell(shape: str, quantization: str, card: str) -> str:
    """Return the tokens that go through at once, and how many layers are recomputed for it."""
    overrides = [f"model.base={ROOT / 'docs/shapes' / shape}", f"model.quantization={quantization}"]
    memory = plan(load_config(ROOT / "docs/shapes/table.yaml", overrides), gpu=card).memory
    if not memory.fits:
        return NO_FIT
    tokens = f"{memory.tokens / 1024:.1f}".removesuffix(".0") + "k"
    if memory.recomputed_layers:
        tokens += f", {memory.recomputed_layers}/{memory.layers}"
    return tokens


if __name__ == "__main__":
    sys.exit(main())
