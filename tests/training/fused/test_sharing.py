"""What the rows of a micro-batch begin with is computed once: the same gradients, fewer tokens."""

import json
import random
from contextlib import ExitStack

import pytest
import torch

from llmtune.adapters.fused import fused_lora
from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.models.decoder import decoder_of
from llmtune.training.batch import StepCollator, pack_rows, pack_sharing
from llmtune.training.fused.packing import packed_attention
from llmtune.training.fused.sharing import find_sharing_obstacle
from llmtune.training.grouping import computed_tokens, plan_shared, shared_beginning
from llmtune.training.loss import choose_loss_path, decoder_hidden, summed_loss
from llmtune.training.memory.arithmetic import UNLIMITED, BatchLimits
from llmtune.training.setup import set_up
from llmtune.training.train import train_adapter
from tests.tiny import make_model
from tests.training.tiny_runs import add_lora, make_adapter, make_config, make_request, make_rows

CHUNKS = {
    "attention_chunk_size": 32,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
}
CONVOLUTION = {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}


def make_shared_rows(count, *, shared=20, seed=0, longest=90):
    """Return rows that begin alike, and then not."""
    rng = random.Random(seed)
    beginning = [rng.randrange(4, 200) for _ in range(shared)]
    rows = []
    for line in range(count):
        rest = [10 + line, *(rng.randrange(4, 200) for _ in range(rng.randint(3, longest)))]
        trained = rng.randint(1, len(rest))
        ids = beginning + rest
        labels = [IGNORE_INDEX] * (len(ids) - trained) + ids[-trained:]
        rows.append(Example(ids, labels, "rows.jsonl", line, weight=rng.choice([0.5, 1.0])))
    return rows


def gradients(model, micro_batch, path):
    model.zero_grad()
    loss = summed_loss(model, micro_batch, path)
    loss.backward()
    parts = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(parts)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {}), ("qwen3", {}), ("gemma2", {}), ("gemma2", {"sliding_window": 24})],
)
def test_gradients_equal_those_of_whole_rows(family, overrides):
    model = make_adapter(family, **overrides).train()
    rows = make_shared_rows(6)
    path = choose_loss_path(model)
    with ExitStack() as stack:
        stack.enter_context(packed_attention(model))
        stack.enter_context(fused_lora(model, lambda: decoder_hidden(model, pack_rows(rows[:1]))))
        whole_loss, whole = gradients(model, pack_rows(rows), path)
        loss, shared = gradients(model, pack_sharing(rows), path)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert ((shared - whole).norm() / whole.norm()).item() < 1e-6


def test_gradients_over_a_4_bit_base_equal_those_of_whole_rows(tmp_path):
    from llmtune.models.checkpoint import Checkpoint
    from llmtune.models.config import ModelConfig
    from llmtune.models.load import load_model

    make_model("llama", tmp_path / "base")
    config = ModelConfig.model_validate(
        {"base": str(tmp_path / "base"), "quantization": {"method": "nf4"}, "dtype": "float32"}
    )
    model = add_lora(load_model(config, Checkpoint.open(tmp_path / "base")).model).train()
    rows = make_shared_rows(6)
    path = choose_loss_path(model)
    with packed_attention(model):
        _, whole = gradients(model, pack_rows(rows), path)
        _, shared = gradients(model, pack_sharing(rows), path)
    assert ((shared - whole).norm() / whole.norm()).item() < 1e-6


def test_the_beginning_ends_before_the_first_trained_token_and_leaves_one_to_each_row():
    ids = list(range(30, 50))
    trained_late = Example(ids, [IGNORE_INDEX] * 18 + ids[18:], "r", 1)
    trained_early = Example(ids, [IGNORE_INDEX] * 12 + ids[12:], "r", 2)
    short = Example(ids[:11], [IGNORE_INDEX] * 10 + ids[10:11], "r", 3)
    assert shared_beginning([trained_late, trained_late]) == 18
    assert shared_beginning([trained_late, trained_early]) == 12
    assert shared_beginning([trained_late, short]) == 10
    packed = pack_sharing([trained_late, trained_early])
    assert packed["row_lengths"] == (12, 8, 8)
    assert packed["position_ids"][0].tolist() == [*range(20), *range(12, 20)]
    # The first trained token is predicted by the last shared one.
    assert packed["target_positions"].tolist() == [17, 18, 11, *range(20, 27)]
    assert packed["targets"].tolist() == [*ids[18:], *ids[12:]]


def test_a_step_is_split_by_beginnings_only_where_that_pays():
    limits = BatchLimits(None, 150)
    one, other = (make_shared_rows(6, seed=seed, shared=60, longest=20) for seed in (0, 1))
    plan = plan_shared([*one, *other, *make_rows(3)], limits)
    assert sorted(index for group in plan for index in group) == list(range(15))
    rows = [*one, *other, *make_rows(3)]
    for group in plan:
        members = [rows[index] for index in group]
        assert computed_tokens(members) <= 150
        assert len({place // 6 for place in group}) == 1
    assert plan_shared(make_rows(12), limits) is None
    assert plan_shared(make_shared_rows(1), limits) is None
    short = [*make_shared_rows(2, shared=9, seed=0), *make_shared_rows(2, shared=9, seed=1)]
    assert plan_shared(short, UNLIMITED) is None  # two passes for 18 tokens
    weights = StepCollator(rows, limits, packed=True, pad_token_id=0)
    weights.shares_beginnings = True
    step = weights.collate(range(15))
    assert sum(float(each["target_weights"].sum()) for each in step["micro_batches"]) == (
        pytest.approx(1)
    )
    assert step["tokens"] == sum(len(row.input_ids) for row in rows)


def test_rows_of_several_system_prompts_with_one_template_are_split_where_that_pays():
    template = list(range(100, 112))
    prompts = [make_shared_rows(3, seed=seed, shared=90, longest=20) for seed in (0, 1)]
    rows = [
        Example(template + row.input_ids, [IGNORE_INDEX] * 12 + row.labels, "r", 1)
        for pair in zip(*prompts, strict=True)  # the prompts take turns
        for row in pair
    ]
    assert sorted(map(sorted, plan_shared(rows, UNLIMITED) or [])) == [[0, 2, 4], [1, 3, 5]]
    assert sorted(map(sorted, plan_shared(rows[:2], UNLIMITED) or [])) == [[0, 1]]


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {"dropout": 0.1}, "dropout, are different in every row"),
        ("mixtral", {"router_jitter_noise": 0.01}, "are different in every row"),
        ("llama4_text", CHUNKS, "its attention is cut into chunks"),
        ("lfm2", CONVOLUTION, "1 of 2 layers pass a state from token to token"),
    ],
)
def test_what_cannot_be_shared_is_named(family, options, reason):
    model = make_adapter(family, **options)
    with packed_attention(model):
        before = torch.get_rng_state()
        assert reason in find_sharing_obstacle(model, make_rows(3), longest=90)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_single_token_that_reads_its_neighbor_is_found():
    model = make_adapter()

    def shift(_module, inputs):
        (hidden,) = inputs
        return (hidden + 0.1 * hidden.roll(1, dims=1),)  # a short convolution beside attention

    with packed_attention(model):
        assert find_sharing_obstacle(model, make_rows(3), longest=90) is None
        decoder_of(model.get_base_model()).layers[-1].mlp.register_forward_pre_hook(shift)
        assert "with its neighbor" in find_sharing_obstacle(model, make_rows(3), longest=90)


def test_a_trained_head_shares_only_where_rows_are_limited(tmp_path):
    for size, said in (("auto", "more logits at once than were tried"), (8, "computed once")):
        model = add_lora(make_model("llama"), modules_to_save=["lm_head"])
        request = make_request(model, tmp_path / str(size), train=make_shared_rows(8, longest=10))
        with ExitStack() as stack:
            setup = set_up(make_config(micro_batch_size=size), request, stack)
        assert said in setup.choices["shared beginnings"]


def test_a_beginning_too_short_to_be_shared_saves_nothing():
    rows = make_shared_rows(4, shared=5)
    assert computed_tokens(rows) == pack_sharing(rows)["input_ids"].numel()


def test_training_with_shared_beginnings_computes_less_and_learns_the_same(tmp_path):
    rows = make_shared_rows(16, longest=10)
    metrics = {}
    for name, without in (("whole", {"shared_beginnings"}), ("shared", set())):
        model = make_adapter()
        request = make_request(
            model, tmp_path / name, train=rows, evaluation=rows[:4], without=frozenset(without)
        )
        seen = count_tokens(model)
        train_adapter(make_config(), request)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [each for line in lines for key, each in json.loads(line).items() if "loss" in key]
        metrics[name] = (losses, sum(seen))
    (whole, many), (shared, few) = metrics.values()
    assert shared == pytest.approx(whole, rel=1e-4)
    assert few < 0.75 * many


def count_tokens(model):
    """Return a list of the tokens of every pass with gradients: probes of sharing have none."""
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].numel() * torch.is_grad_enabled())
    )
    return seen
