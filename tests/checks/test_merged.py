"""Verification sees a merged model that answers otherwise, and says where."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.checks.merged import verify_merge
from llmtune.checks.prompts import ComparedPrompts
from llmtune.errors import LlmtuneError
from llmtune.merging.merge import merge_adapter
from llmtune.scoring.generate import Decoding
from llmtune.scoring.requests import ContinuationRequest
from tests.merging.adapters import PROMPTS, load_adapter, make_adapter, make_base

DECODING = Decoding(max_new_tokens=8, stop_token_ids=(3,))


@pytest.fixture
def merged(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    return tmp_path


def prompts() -> ComparedPrompts:
    ids = tuple(tuple(prompt) for prompt in PROMPTS)
    labels = tuple(ContinuationRequest(one, ((5, 6), (7,), (9,))) for one in ids)
    return ComparedPrompts(sequences=ids, labels=labels, open_prompts=ids)


def verify(place, dtype=torch.float32):
    live = load_adapter(place / "base", place / "adapter", dtype)
    return verify_merge(live, place / "merged", prompts(), decoding=DECODING, dtype=dtype)


def change_merged(place, name: str, factor: float) -> None:
    path = place / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_is_close_to_the_adapter_model(merged, dtype):
    result = verify(merged, dtype)
    assert result.dtype == str(dtype).removeprefix("torch.")
    assert result.num_tokens == sum(len(prompt) for prompt in PROMPTS)
    assert 0 < result.max_logit_difference < 0.2
    assert 0 < result.kl < 1e-3
    assert result.top1_agreement > 0.8
    assert result.num_same_labels == result.num_labels == len(PROMPTS)
    assert result.num_same_texts + len(result.divergences) == result.num_open_prompts
    assert json.loads(json.dumps(asdict(result)))["dtype"] == result.dtype


def test_what_all_rows_begin_with_runs_once_and_counts_for_each(merged, monkeypatch):
    rows = tuple((*range(20, 31), *prompt) for prompt in PROMPTS)
    live = load_adapter(merged / "base", merged / "adapter", torch.float32)
    num_run = []
    embedding = live.get_input_embeddings()
    embedding.register_forward_hook(lambda _, given, __: num_run.append(given[0].numel()))

    def numbers():
        num_run.clear()
        only_rows = ComparedPrompts(sequences=rows)
        found = verify_merge(
            live, merged / "merged", only_rows, decoding=DECODING, dtype=torch.float32
        )
        return asdict(found), sum(num_run)

    shared, tokens_shared = numbers()
    monkeypatch.setattr("llmtune.checks.merged._share", lambda *_: 0)
    whole, tokens_whole = numbers()
    names = ("kl", "base_kl", "live_perplexity", "merged_perplexity", "max_logit_difference")
    assert [shared[name] for name in names] == pytest.approx(
        [whole[name] for name in names], rel=0.01
    )
    assert shared["num_tokens"] == whole["num_tokens"] == sum(map(len, rows))
    assert shared["top1_agreement"] == whole["top1_agreement"]
    assert tokens_shared < tokens_whole


def test_corrupted_tensor_shows_in_every_number(merged):
    before = verify(merged)
    change_merged(merged, "model.layers.1.mlp.down_proj.weight", -3.0)
    after = verify(merged)
    assert after.max_logit_difference > 10 * before.max_logit_difference
    assert after.kl > 100 * before.kl
    assert after.top1_agreement < 0.9
    assert after.divergences


def test_a_label_that_differs_is_listed_with_both_leads(merged):
    change_merged(merged, "lm_head.weight", -1.0)
    result = verify(merged)
    assert result.label_differences
    assert len(result.label_differences) == result.num_labels - result.num_same_labels
    for each in result.label_differences:
        assert each.live_choice != each.merged_choice
        assert each.live_margin > 0 and each.merged_margin > 0


def test_divergence_tells_both_tokens_and_how_sure_each_model_was(merged):
    change_merged(merged, "model.layers.1.mlp.down_proj.weight", -3.0)
    live = load_adapter(merged / "base", merged / "adapter", torch.float32)
    for divergence in verify(merged).divergences:
        assert divergence.live_token != divergence.merged_token
        assert divergence.live_text != divergence.merged_text
        assert divergence.live_margin > 0
        assert divergence.merged_margin > 0
        if divergence.position == 0:
            ids = torch.tensor([PROMPTS[divergence.prompt]])
            with torch.no_grad():
                top = live(ids).logits[0, -1].topk(2)
            expected = divergence.live_token if divergence.live_token is not None else 3
            assert top.indices[0] == expected
            difference = (top.values[0] - top.values[1]).item()
            assert divergence.live_margin == pytest.approx(difference, abs=1e-4)


def test_directory_that_lacks_a_tensor_is_an_error(merged):
    path = merged / "merged" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LlmtuneError, match=r"missing_keys: \['model\.norm\.weight'\]"):
        verify(merged)


def test_directory_of_another_vocabulary_is_an_error(merged, tmp_path):
    base = make_base(tmp_path / "other", vocab_size=576)
    live = load_adapter(merged / "base", merged / "adapter", torch.float32)
    with pytest.raises(LlmtuneError, match="576 tokens.*512"):
        verify_merge(live, base, prompts(), decoding=DECODING, dtype=torch.float32)
