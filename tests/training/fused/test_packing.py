"""Rows are packed only where the probe shows that they stay apart."""

from typing import Any

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.training.batch import pack_rows, pad_rows
from llmtune.training.fused.packing import choose_packing, packed_attention, relative_difference
from llmtune.training.loss import decoder_hidden
from tests.training.tiny_runs import make_adapter, make_rows
from tests.versions import IS_CURRENT

PACKABLE: tuple[str, ...] = ("llama", "qwen2", "qwen3", "mistral", "phi", "gpt_neox", "mixtral")
if IS_CURRENT:  # on transformers 5.17 the probe refuses gemma2, whose rows are padded then
    PACKABLE += ("gemma2",)


# Learned positions: unlike rotary ones, they would tell if positions went on over a row's border.
LEARNED_POSITIONS: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1},
}
MORE_THAN_CAUSAL: list[tuple[str, dict[str, Any]]] = [
    # its attention is given no window, and its mask has one
    ("phimoe", EXPERTS | {"num_key_value_heads": 2, "sliding_window": 32}),
    (
        "llama4_text",
        EXPERTS | {"attention_chunk_size": 32, "head_dim": 16, "num_key_value_heads": 2},
    ),
    ("gpt_oss", EXPERTS | {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 32}),
    (
        "deepseek_v3",
        EXPERTS
        | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    ),
]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [*((family, {}) for family in PACKABLE), ("gpt2", LEARNED_POSITIONS), *MORE_THAN_CAUSAL],
)
def test_packed_rows_equal_the_rows_alone(family, overrides):
    model = make_adapter(family, **overrides, targets=r".*self_attn\.o_proj|.*c_proj|.*dense")
    rows = make_rows(4, longest=90)  # longer than gemma2's sliding window of 64
    assert choose_packing(model, "auto", rows).packed
    model.eval()
    with torch.no_grad():
        alone = [decoder_hidden(model, pad_rows([row], 0))[0] for row in rows]
        with packed_attention(model) as is_applied:
            assert is_applied
            packed = decoder_hidden(model, pack_rows(rows))[0]
    for expected, row in zip(alone, packed.split([len(one) for one in alone]), strict=True):
        assert torch.allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("family", PACKABLE)
def test_the_probe_lets_real_families_pack(family):
    assert choose_packing(make_adapter(family), "auto", make_rows(3)).packed


def test_positions_that_go_on_from_row_to_row_are_found(monkeypatch):
    def pack_without_restart(rows):
        packed = pack_rows(rows)
        packed["position_ids"] = torch.arange(packed["input_ids"].numel())[None]
        return packed

    monkeypatch.setattr("llmtune.training.fused.packing.pack_rows", pack_without_restart)
    choice = choose_packing(make_adapter("gpt2", **LEARNED_POSITIONS), "auto", make_rows(3))
    assert not choice.packed
    assert "from the row alone" in choice.reason


def test_the_probe_works_in_bfloat16():
    assert choose_packing(make_adapter(dtype=torch.bfloat16), "on", make_rows(3)).packed


def leak_into_later_tokens(model):
    """Let every token see the running sum of all tokens before it, across rows."""

    def leak(_module, _inputs, output):
        return output + 1e-6 * output.cumsum(1)

    model.get_base_model().model.layers[0].mlp.register_forward_hook(leak)


def test_a_model_that_mixes_neighbors_is_padded():
    model = make_adapter()
    leak_into_later_tokens(model)
    choice = choose_packing(model, "auto", make_rows(3))
    assert not choice.packed
    assert "neighbor" in choice.reason


def test_demanding_packing_of_a_model_that_mixes_is_an_error():
    model = make_adapter()
    leak_into_later_tokens(model)
    with pytest.raises(LlmtuneError, match="data.packing.*auto or off"):
        choose_packing(model, "on", make_rows(3))


def test_an_attention_that_ignores_the_window_is_found(monkeypatch):
    from llmtune.ops.varlen_attention import varlen_attention
    from llmtune.training.fused import packing

    model = make_adapter("gemma2", sliding_window=8)
    real = varlen_attention
    monkeypatch.setattr(
        packing,
        "varlen_attention",
        lambda *inputs, **options: real(*inputs, **(options | {"sliding_window": None})),
    )
    choice = choose_packing(model, "auto", make_rows(3))
    assert not choice.packed
    assert "differs" in choice.reason


def test_the_layers_of_a_pass_ask_their_mask_once(monkeypatch):
    from llmtune.training.fused import packing

    asked = []

    class Asked(packing.MaskRule):
        def __init__(self, size, is_seen):
            super().__init__(size, lambda *places: asked.append(places) or is_seen(*places))

    monkeypatch.setattr(packing, "MaskRule", Asked)
    model = make_adapter("mistral", sliding_window=8)
    assert model.config.num_hidden_layers > 1
    with packed_attention(model), torch.no_grad():
        decoder_hidden(model, pack_rows(make_rows(2, longest=40)))
    assert len(asked) == 3  # just before, at and inside the window


def test_one_token_turned_around_by_rounding_is_let_pass_and_a_third_of_the_row_is_not():
    alone = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    one_off, third_off, broken = alone.clone(), alone.clone(), alone.clone()
    one_off[0] *= -1000
    third_off[16:] *= 1.5
    broken[3] = torch.nan
    assert relative_difference(one_off, alone) == 0.0
    assert relative_difference(third_off, alone) == pytest.approx(0.5)
    assert not relative_difference(broken, alone) <= 1.0


def test_attention_dropout_is_not_packed():
    choice = choose_packing(make_adapter("gpt2"), "auto", make_rows(3))
    assert choice == (False, "its attention uses dropout")


def test_whatever_a_library_raises_in_the_probe_means_padded_rows(monkeypatch):
    def fail(*_inputs, **_options):
        raise NotImplementedError("no kernel for this\nwidth")

    monkeypatch.setattr("llmtune.training.fused.packing.varlen_attention", fail)
    choice = choose_packing(make_adapter(), "auto", make_rows(3))
    assert choice == (False, "NotImplementedError: no kernel for this width")


def test_the_models_own_attention_is_back_afterwards():
    model = make_adapter()
    base = model.get_base_model()
    before = base.config._attn_implementation
    with packed_attention(model):
        assert base.config._attn_implementation != before
    assert base.config._attn_implementation == before
