"""Fused norms and MLPs: what is replaced, that it computes the same, and that it is undone."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from llmtune.adapters.fused import fused_lora
from llmtune.training.fused.blocks import fused_blocks
from llmtune.training.loss import decoder_hidden
from tests.training.tiny_runs import make_adapter

INPUTS = {"input_ids": torch.arange(4, 20)[None]}


def run(model):
    return decoder_hidden(model, INPUTS)


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    run(model).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def randomize_adapter(model) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


# Gemma's norms multiply by 1 + w and its MLP's activation is not silu.
@pytest.mark.parametrize(
    ("family", "norms", "mlps"), [("llama", 5, 2), ("qwen2", 5, 2), ("gemma2", 0, 0)]
)
def test_only_what_computes_the_same_is_replaced(family, norms, mlps):
    model = make_adapter(family)
    randomize_adapter(model)
    expected, expected_hidden = adapter_gradients(model), run(model).detach()
    with fused_lora(model, lambda: run(model)), fused_blocks(model) as blocks:
        assert (blocks.num_norms, blocks.num_mlps) == (norms, mlps)
        torch.testing.assert_close(run(model).detach(), expected_hidden, rtol=1e-5, atol=1e-5)
        for name, gradient in adapter_gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(run(model).detach(), expected_hidden)


def test_mlps_stay_stock_where_their_projection_does():
    model = make_adapter("llama", dropout=0.1)
    with fused_lora(model, lambda: run(model)), fused_blocks(model) as blocks:
        assert (blocks.num_norms, blocks.num_mlps) == (5, 0)


def test_a_changed_adapter_is_seen_at_the_next_call():
    model = make_adapter("llama")
    randomize_adapter(model)
    with fused_lora(model, lambda: run(model)), fused_blocks(model):
        before = run(model).detach()
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True
        )
        adapter_gradients(model)
        optimizer.step()
        after = run(model).detach()
        with model.disable_adapter():
            disabled = run(model).detach()
    torch.testing.assert_close(run(model).detach(), after, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)
    with model.disable_adapter():
        torch.testing.assert_close(run(model).detach(), disabled, rtol=1e-5, atol=1e-5)


class BrokenRMSNorm(torch.nn.Module):
    """Of a library whose code fails here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64), requires_grad=False)
        self.eps = 1e-6

    def forward(self, hidden_states):
        raise TypeError("no kernel image")


def test_a_norm_with_a_gate_or_one_that_fails_keeps_its_forward_and_says_why():
    model = make_adapter("llama")
    layer = model.get_base_model().model.layers[0]
    layer.gated = Qwen3NextRMSNormGated(64).requires_grad_(False)
    layer.broken = BrokenRMSNorm()
    with fused_blocks(model) as blocks:
        assert blocks.num_norms == 5
        assert "forward" not in layer.gated.__dict__
        assert blocks.stock["Qwen3NextRMSNormGated: it is also given gate"] == 1
        assert blocks.stock["BrokenRMSNorm: TypeError: no kernel image"] == 1
        assert "1 stock (BrokenRMSNorm: TypeError: no kernel image)" in blocks.describe()


def test_memory_that_runs_out_in_a_probe_is_not_an_answer(monkeypatch):
    def run_out(self, hidden_states):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(BrokenRMSNorm, "forward", run_out)
    model = make_adapter("llama")
    model.get_base_model().model.layers[0].broken = BrokenRMSNorm()
    with pytest.raises(torch.OutOfMemoryError), fused_blocks(model):
        pass
