"""What a token is said to cost is what autograd keeps in training's own forward pass."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmtune.adapters.dora import DoraAdapter
from llmtune.adapters.fused import fused_lora
from llmtune.adapters.inject import adapted_layers, inject_adapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.other_bases import BoftAdapter
from llmtune.data.example import Example
from llmtune.planning.activations import Adapted, activation_cost, merged_expert_bytes
from llmtune.planning.families import FAMILIES
from llmtune.planning.shape import read_shape
from llmtune.training.batch import pack_rows
from llmtune.training.fused.blocks import fused_blocks
from llmtune.training.fused.packing import packed_attention
from llmtune.training.loss import choose_loss_path, decoder_hidden, summed_loss
from llmtune.training.memory.dry_run import recomputable_layers
from llmtune.training.memory.measure import measure_activations
from tests.planning.shapes import small_config

SPARSE_MIXERS = {"phimoe"}
"""Their routers keep a dozen numbers an expert: much beside 64 features, little beside 4096."""
LAYERS = 6  # the more, the less the first layer's own counts
ROW = Example(list(range(3, 67)), list(range(3, 67)), "rows.jsonl", 1)


def compare(family, adapter, *, dtype=torch.bfloat16, is_fused=True):
    """Return (computed, measured) bytes a token and layer; constants cancel between two lengths."""
    torch.manual_seed(0)
    config = small_config(family, layers=LAYERS)
    config.pop("mlp_only_layers", None)  # peft adapts no experts in a mixed stack
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config), dtype=dtype)
    injected = inject_adapter(model, adapter).model
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32)
    with ExitStack() as stack:
        stack.enter_context(autocast)
        if is_fused:
            ids = {"input_ids": torch.arange(1, 5)[None]}
            stack.enter_context(fused_lora(injected, lambda: decoder_hidden(injected, ids)))
        stack.enter_context(fused_blocks(injected))
        head = choose_loss_path(injected)
        stack.enter_context(packed_attention(injected))
        injected.train()
        layers = recomputable_layers(injected)
        costs = {
            rows: measure_activations(
                injected,
                layers,
                partial(summed_loss, injected, pack_rows([ROW] * rows), head),
                64 * rows,
            )
            for rows in (4, 8)
        }
    measured = 2 * costs[8].layer_bytes - costs[4].layer_bytes
    ranks = {name: adapter.thin_width(name) for name in adapted_layers(injected)}
    shape = read_shape({**model.config.to_dict(), **config, "model_type": family}, "here")
    adapted = Adapted(
        ranks,
        is_fused=is_fused,
        dropout_mask_bytes=4 if adapter.drops_inputs else 0,
        kept_outputs=adapter.KEPT_OUTPUTS,
        kept_inputs=adapter.kept_inputs,
        dense_copies=adapter.DENSE_COPIES,
    )
    b = dtype.itemsize
    cost = activation_cost(shape, adapted, element_bytes=b, trained_ratio=63 / 64)
    assert cost.other_bytes == pytest.approx(costs[8].other_bytes, rel=0.05)
    assert merged_expert_bytes(shape, adapted, b) == b * shape.expert_parameters
    return cost.layer_bytes, measured


def butterflies(num_factors: int) -> BoftAdapter:
    return BoftAdapter(num_factors=num_factors)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_cost_is_the_measured_one(family):
    computed, measured = compare(family, LoraAdapter(rank=4))
    assert computed == pytest.approx(measured, rel=0.06 if family in SPARSE_MIXERS else 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "adapter",
    [LoraAdapter(rank=4, dropout=0.1), DoraAdapter(rank=4), *map(butterflies, (1, 4))],
    ids=["dropout", "dora", "boft", "boft-4"],
)
def test_what_pefts_own_layers_keep_is_computed_too(adapter, dtype):
    computed, measured = compare("llama", adapter, dtype=dtype, is_fused=False)
    assert computed == pytest.approx(measured, rel=0.06)


def test_only_adapted_linears_keep_their_input():
    computed, measured = compare("llama", LoraAdapter(rank=4, target_modules=["q_proj", "v_proj"]))
    assert computed == pytest.approx(measured, rel=0.03)


def test_layers_before_the_first_adapter_keep_nothing():
    computed, measured = compare("llama", LoraAdapter(rank=4, layers="last-2"))
    assert computed == pytest.approx(measured, rel=0.05)


def test_a_tiny_llamas_layer_added_up_by_hand():
    shape = read_shape({**small_config("llama", layers=1), "model_type": "llama"}, "here")
    adapted = Adapted(dict.fromkeys(shape.linear, 8), is_fused=True)
    cost = activation_cost(shape, adapted, element_bytes=2, trained_ratio=0.5)
    norms = 2 * 64 + 4  # of one: no gradient reaches the embeddings through the first
    attention = 2 * 64 + 2 * (64 + 2 * 32) + 2 * 64  # shared input, q k v, o's input
    feed_forward = 2 * 64 + 2 * 2 * 128  # shared input, gate and up
    assert cost.layer_bytes == norms + attention + feed_forward + 2 * 7 * 8
    assert cost.recomputed_layer_bytes == 2 * 64
    assert cost.other_bytes == 2 * 64 + 4 + 2 * 64 * 0.5
