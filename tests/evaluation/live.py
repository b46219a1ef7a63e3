"""A model made in memory, as if it had been loaded."""

from pathlib import Path

import torch

from llmtune.models.checkpoint import Checkpoint
from llmtune.models.live import LiveModel, ModelIdentity
from llmtune.models.quantization.describe import describe_quantization
from llmtune.models.turns import stop_token_ids
from llmtune.scoring.batches import has_adapter

IDENTITY = ModelIdentity(base="b", adapter="a", dtype="float32", quantization="none")


def make_live(model, tokenizer, identity=IDENTITY) -> LiveModel:
    """Return a tiny model with what an evaluation asks of a loaded one."""
    return LiveModel(
        model=model,
        tokenizer=tokenizer,
        source=Checkpoint.open(Path("in-memory")),
        identity=identity,
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="sdpa",
        quantized=describe_quantization(model, "none"),
        stop_token_ids=stop_token_ids(tokenizer, model.generation_config),
        arms=("tuned", "base") if has_adapter(model) else ("base",),
    )
