"""Scoring holds what it needs: no copy of the LM head per row, no logits beyond their bound."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtune.scoring import likelihood
from llmtune.scoring.batches import batch_by_length, run_forward
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.scoring.likelihood import score_continuations
from llmtune.scoring.requests import ContinuationRequest
from tests.tiny import make_model, make_tokenizer

ROWS = 12


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation read or made.

    Expanded tensors count in full: kernels (bfloat16 `bmm` on the CPU) write them out.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, made)):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return made


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    return make_model("llama").eval().to(request.param).requires_grad_(False)


def head_bytes(model):
    return model.get_output_embeddings().weight.nbytes


def test_choices_are_scored_without_a_copy_of_the_head_for_every_row(model):
    requests = [
        ContinuationRequest((6 + row, 1, 2, 3, 4, 5), ((7, 8), (9,))) for row in range(ROWS)
    ]
    with LargestTensor() as largest:
        score_continuations(model, requests, token_budget=1000)
    assert largest.bytes <= 2 * head_bytes(model)


def test_text_is_generated_without_a_copy_of_the_head_for_every_row(model):
    prompts = [[1, 2, 3, 4 + row] for row in range(ROWS)]
    with LargestTensor() as largest:
        generate_texts(model, make_tokenizer(), prompts, Decoding(2, (0,)), token_budget=1000)
    assert largest.bytes <= 2 * head_bytes(model)


def test_logits_of_long_choices_stay_within_their_bound(monkeypatch):
    model = make_model("llama").eval()
    rows = [ContinuationRequest((1, 2, 3, 4 + row), (tuple(range(5, 45)),)) for row in range(ROWS)]
    whole = score_continuations(model, rows, token_budget=10_000)
    bound = 90 * model.config.vocab_size * 4
    monkeypatch.setattr("llmtune.scoring.batches.LOGITS_BYTES", bound)
    seen = []
    real = run_forward

    def record(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.append(result.logits.nbytes)
        return result

    monkeypatch.setattr(likelihood, "run_forward", record)
    cut = score_continuations(model, rows, token_budget=10_000)
    assert max(seen) <= bound
    for first, second in zip(whole, cut, strict=True):
        assert first[0].log_likelihood == pytest.approx(second[0].log_likelihood, abs=1e-4)


def test_a_batch_has_no_more_rows_than_allowed():
    batches = batch_by_length([3] * 10, 1000, max_rows=4)
    assert [len(batch) for batch in batches] == [4, 4, 2]


def test_batches_hold_little_padding_and_are_not_many_more():
    lengths = [7 + 3 * (row % 60) for row in range(300)]
    batches = batch_by_length(lengths, 2048)
    assert sorted(place for batch in batches for place in batch) == list(range(300))
    padded = [len(batch) * max(lengths[place] for place in batch) for batch in batches]
    assert max(padded) <= 2048
    assert sum(padded) < 1.06 * sum(lengths)
    assert len(batches) < 2 * sum(lengths) / 2048
    assert batch_by_length([3000, 5], 2048) == [[0], [1]]
    assert batch_by_length([], 2048) == []
