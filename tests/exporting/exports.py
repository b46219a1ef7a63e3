"""A tiny tuned model, and exporting as the command does."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmtune.exporting.base import ExportSettings
from llmtune.merging.merge import merge_adapter
from llmtune.runs.export import export_target


def export_model(
    source: Path,
    to: str,
    out: Path | None,
    type: str | None = None,
    *,
    force: bool = False,
    **options: Any,
) -> Any:
    """Export a run, an adapter or a model and return the result as JSON."""
    settings = ExportSettings(to, type, out, force=force, options=options)
    return export_target(str(source), (), settings).to_dict()


def make_tuned(base: Path, directory: Path) -> Path:
    """Write an adapter of a tiny base to `directory/adapter`, merged into `directory/merged`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.name_or_path = str(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(directory / "adapter")
    merge_adapter(base, directory / "adapter", directory / "merged")
    return directory
