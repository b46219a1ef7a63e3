"""NEFTune's noise has the paper's size for every row, packed or padded, and only in training."""

import torch

from llmtune.training.batch import pack_rows, pad_rows
from llmtune.training.fused.packing import packed_attention
from llmtune.training.loss import decoder_hidden
from llmtune.training.noise import RowNoise, name_rows, noisy_embeddings
from tests.training.tiny_runs import make_adapter, make_rows


def catch_noise(model, batch, rows, step=1):
    embedding = model.get_input_embeddings()
    clean = torch.nn.functional.embedding(batch["input_ids"], embedding.weight)
    seen = []
    with noisy_embeddings(model, RowNoise(5.0, 0, step, name_rows(rows))):
        handle = embedding.register_forward_hook(lambda *call: seen.append(call[2].detach()))
        decoder_hidden(model, batch)
        handle.remove()
    return seen[0] - clean


def test_the_noise_of_a_row_is_bounded_by_its_own_length():
    rows = make_rows(4, longest=60)
    bounds = [5.0 / (len(row.input_ids) * 64) ** 0.5 for row in rows]
    model = make_adapter().train()
    padded = catch_noise(model, pad_rows(rows, 0), rows)
    with packed_attention(model):
        packed = catch_noise(model, pack_rows(rows), rows)[0].split(
            [len(r.input_ids) for r in rows]
        )
    for bound, one, other, row in zip(bounds, padded, packed, rows, strict=True):
        for noise in (one[: len(row.input_ids)], other):
            assert 0.9 * bound < noise.abs().max() <= bound * 1.0001
        assert torch.equal(one[: len(row.input_ids)], other[0] if other.dim() == 3 else other)


def test_the_noise_of_a_row_does_not_depend_on_the_rows_beside_it():
    rows = make_rows(3)
    model = make_adapter().train()
    together = catch_noise(model, pad_rows(rows, 0), rows)
    length = len(rows[1].input_ids)
    alone = catch_noise(model, pad_rows(rows[1:2], 0), rows[1:2])
    assert torch.equal(together[1, :length], alone[0])
    assert not torch.equal(alone, catch_noise(model, pad_rows(rows[1:2], 0), rows[1:2], step=2))


def test_there_is_no_noise_in_evaluation_nor_afterwards():
    model, rows = make_adapter().eval(), make_rows(2)
    assert catch_noise(model, pad_rows(rows, 0), rows).abs().max() == 0
    assert not model.get_input_embeddings()._forward_hooks
