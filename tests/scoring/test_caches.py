"""Caches that grow and lose rows in place hold what transformers' own would."""

import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from llmtune.scoring.caches import can_drop, drop_rows, give_room, select_rows

HEADS, WIDTH = 2, 4


def states(rows, tokens):
    return torch.randn(rows, HEADS, tokens, WIDTH)


def grow(caches, rows, tokens):
    for layer in range(2):
        keys, values = states(rows, tokens), states(rows, tokens)
        shown = [cache.update(keys, values, layer) for cache in caches]
        assert all(torch.equal(one[i], shown[0][i]) for one in shown for i in (0, 1))


def test_steps_and_lost_rows_copy_only_what_moves():
    plain = DynamicCache()
    grow([plain], rows=5, tokens=3)
    roomy = give_room(plain)
    grow([plain, roomy], rows=5, tokens=1)
    assert can_drop(roomy) and not can_drop(plain)
    memory = [layer.keys.data_ptr() for layer in roomy.layers]
    order = drop_rows(roomy, [0, 2, 4])
    assert sorted(order) == [0, 2, 4] and order[0] == 0 and order[2] == 2
    plain = select_rows(plain, torch.tensor(order))
    for _ in range(12):
        grow([plain, roomy], rows=3, tokens=1)
    assert [layer.keys.data_ptr() for layer in roomy.layers] == memory
    grow([plain, roomy], rows=3, tokens=20)  # more than there was room for


def test_rows_selected_of_a_roomy_cache_leave_it_as_it_was():
    first = DynamicCache()
    grow([first], rows=2, tokens=3)
    roomy = give_room(first)
    grow([roomy], rows=2, tokens=1)
    before = [layer.keys.clone() for layer in roomy.layers]
    other = select_rows(roomy, torch.tensor([1, 0]))
    drop_rows(other, [1])
    grow([other], rows=1, tokens=1)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, roomy.layers, strict=True))


def test_a_roomy_cache_leaves_the_one_it_was_made_of_as_it_was():
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 4
    given = DynamicCache(config=config)
    grow([given], rows=2, tokens=3)
    before = [layer.keys.clone() for layer in given.layers]
    grow([give_room(given)], rows=2, tokens=1)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, given.layers, strict=True))
    assert given.get_seq_length(1) == 3
