"""Log-likelihoods of continuations against the plain definition, over families and batches."""

import random
from typing import Any

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.scoring.likelihood import Writing, score_and_write, score_continuations
from llmtune.scoring.requests import ContinuationRequest
from tests.tiny import FAMILIES, make_model


def make_requests(*, shared: int = 0, num: int = 12, longest_choice: int = 4, seed: int = 0):
    """Random prompts of unequal lengths; the first `shared` tokens are the same in all."""
    source = random.Random(seed)

    def tokens(count):
        return tuple(source.randrange(4, 512) for _ in range(count))

    start = tokens(shared)
    return [
        ContinuationRequest(
            start + tokens(source.randint(1, 30)),
            tuple(tokens(source.randint(1, longest_choice)) for _ in range(source.randint(2, 4))),
        )
        for _ in range(num)
    ]


def score_plainly(model, request):
    """The definition: one unpadded row per choice, the sum of log p over its tokens."""
    rows = []
    for choice in request.choice_ids:
        ids = torch.tensor([[*request.prompt_ids, *choice]])
        with torch.no_grad():
            log_probs = model(ids).logits[0].float().log_softmax(-1)
        places = range(len(request.prompt_ids) - 1, ids.shape[1] - 1)
        pairs = list(zip(places, choice, strict=True))
        rows.append(
            (
                sum(log_probs[place, token].item() for place, token in pairs),
                all(log_probs[place].argmax() == token for place, token in pairs),
            )
        )
    return rows


def assert_same(found, model, requests):
    for scores, request in zip(found, requests, strict=True):
        for score, ids, (log_likelihood, is_greedy) in zip(
            scores, request.choice_ids, score_plainly(model, request), strict=True
        ):
            assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
            assert score.is_greedy == is_greedy
            assert score.num_tokens == len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_definition_in_every_family(family):
    model = make_model(family)
    requests = make_requests(shared=9)
    assert_same(score_continuations(model, requests, token_budget=64), model, requests)


@pytest.mark.parametrize("token_budget", [1, 50, 10_000])
def test_scores_do_not_depend_on_the_batches(llama, token_budget):
    requests = make_requests()
    assert_same(score_continuations(llama, requests, token_budget=token_budget), llama, requests)


def test_a_prompt_that_is_the_whole_shared_part_is_scored_right(llama):
    long, *others = make_requests(shared=10)
    requests = [ContinuationRequest(long.prompt_ids[:10], long.choice_ids), long, *others]
    assert_same(score_continuations(llama, requests, token_budget=100), llama, requests)


def test_identical_prompts_are_scored_right(llama):
    request = make_requests()[0]
    assert_same(score_continuations(llama, [request] * 3, token_budget=100), llama, [request] * 3)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_prompts_longer_than_a_sliding_window_are_scored_right(family):
    model = make_model(family, sliding_window=16)
    requests = make_requests(shared=12)
    assert_same(score_continuations(model, requests, token_budget=100), model, requests)


def test_a_model_with_recurrent_layers_is_scored_right():
    model = make_model("lfm2", layer_types=["conv", "full_attention"], num_key_value_heads=4)
    requests = make_requests(shared=8, num=4)
    assert_same(score_continuations(model, requests, token_budget=1), model, requests)


def test_what_prompts_share_is_computed_once(llama):
    requests = make_requests(shared=40, longest_choice=1)
    seen = []
    llama.model.embed_tokens.register_forward_hook(
        lambda m, args, out: seen.append(args[0].numel())
    )
    score_continuations(llama, requests, token_budget=10_000)
    longest = max(len(request.prompt_ids) for request in requests) - 40
    assert sum(seen) == 40 + len(requests) * longest


def test_the_head_sees_one_position_of_each_prompt(llama):
    requests = make_requests(longest_choice=1)
    seen = []
    llama.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    score_continuations(llama, requests, token_budget=10_000)
    assert sum(seen) == len(requests)


def test_training_mode_is_put_back_and_dropout_is_off(adapted):
    adapted.train()
    adapted.base_model.model.model.norm.eval()
    modes = [module.training for module in adapted.modules()]
    requests = make_requests(num=3)
    first = score_continuations(adapted, requests, token_budget=100)
    assert [module.training for module in adapted.modules()] == modes
    assert first == score_continuations(adapted.eval(), requests, token_budget=100)


def test_progress_counts_up_to_the_number_of_requests(llama):
    seen = []
    score_continuations(llama, make_requests(num=7), token_budget=40, on_progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 7 and len(seen) > 1


def test_a_prompt_longer_than_the_model_is_refused(llama):
    request = ContinuationRequest(tuple([5] * 512), ((6,),))
    with pytest.raises(LlmtuneError, match="513 tokens.*512 positions"):
        score_continuations(llama, [request], token_budget=10_000)


def test_no_requests_give_no_scores(llama):
    assert score_continuations(llama, [], token_budget=100) == []


def test_a_bfloat16_head_gives_float32_logits_and_is_put_back():
    model = make_model("gemma2", dtype=torch.bfloat16)
    requests = make_requests(num=6, longest_choice=1)
    ids = torch.tensor([requests[0].prompt_ids])
    before = model(ids).logits
    scores = score_continuations(model, requests, token_budget=1)
    assert torch.equal(model(ids).logits, before)
    assert not model.lm_head._forward_hooks
    with torch.no_grad():
        logits = model.model(ids).last_hidden_state[0, -1].float() @ model.lm_head.weight.float().T
    cap = model.config.final_logit_softcapping
    log_probs = (cap * (logits / cap).tanh()).log_softmax(-1)
    for score, choice in zip(scores[0], requests[0].choice_ids, strict=True):
        assert score.log_likelihood == pytest.approx(log_probs[choice[0]].item(), abs=1e-5)


def test_a_model_that_computes_nan_is_refused_instead_of_scored(llama):
    with torch.no_grad():
        llama.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(LlmtuneError, match="computes NaN"):
        score_continuations(llama, [ContinuationRequest((1, 2, 3), ((4,), (5,)))], token_budget=64)


WRITERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 40},
    "mistral": {"sliding_window": 200},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 4},
    "mamba": {},
}


@pytest.mark.parametrize("family", WRITERS)
def test_texts_written_beside_the_scores_are_those_written_alone(family, tokenizer):
    model = make_model(family, **WRITERS[family])
    requests = make_requests(shared=12, num=14)
    decoding = Decoding(5, (3,))
    writing = Writing(tokenizer, decoding, lambda scores: scores[0].num_tokens != 2)
    scores, texts = score_and_write(model, requests, writing, token_budget=60)
    assert_same(scores, model, requests)
    prompts = [request.prompt_ids for request in requests]
    alone = generate_texts(model, tokenizer, prompts, decoding, token_budget=1)
    wanted = [len(request.choice_ids[0]) != 2 for request in requests]
    assert texts == [
        text if is_wanted else None for text, is_wanted in zip(alone, wanted, strict=True)
    ]
    assert {True, False} == set(wanted)


def test_a_prompt_runs_once_for_its_scores_and_its_text(llama, tokenizer):
    requests = make_requests(shared=40, longest_choice=1)
    seen = []
    llama.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    writing = Writing(tokenizer, Decoding(6, ()), lambda scores: True)
    score_and_write(llama, requests, writing, token_budget=300)
    prompts, steps = [s for s in seen if s[1] > 1], [s for s in seen if s[1] == 1]
    assert len(prompts) > 2 and sum(s.numel() for s in prompts) < 40 + len(requests) * 31
    assert steps == [(len(requests), 1)] * 5
