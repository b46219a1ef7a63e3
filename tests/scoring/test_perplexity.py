"""Every token of a text is predicted exactly once, whatever the windows and the batches."""

from itertools import pairwise

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llmtune.data.render import leading_special_ids
from llmtune.errors import LlmtuneError
from llmtune.scoring.batches import pad_rows, run_forward
from llmtune.scoring.perplexity import score_texts
from llmtune.scoring.requests import cut_windows, encode_passage
from tests.tiny import make_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Paris is the capital of France.",
    "Eh, ça va: naïve café — 12 + 30 = 42",
]


@pytest.fixture(scope="module")
def tokenizer_with_bos():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def loss_plainly(model, window):
    ids = torch.tensor([window])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


def test_a_text_in_one_window_scores_its_plain_loss(llama, tokenizer):
    for text in TEXTS:
        [score] = score_texts(llama, tokenizer, [text], max_length=512, token_budget=1000)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert score.negative_log_likelihood == pytest.approx(loss_plainly(llama, ids), rel=1e-5)
        assert score.num_tokens == len(ids) - 1
        first = tokenizer.decode(ids[:1])
        assert score.num_bytes == len(text.encode()) - len(first.encode())


@pytest.mark.parametrize("token_budget", [1, 40, 5000])
def test_scores_do_not_depend_on_the_batches(llama, tokenizer, token_budget):
    together = score_texts(llama, tokenizer, TEXTS, max_length=16, token_budget=token_budget)
    for text, score in zip(TEXTS, together, strict=True):
        [alone] = score_texts(llama, tokenizer, [text], max_length=16, token_budget=16)
        assert score.negative_log_likelihood == pytest.approx(
            alone.negative_log_likelihood, abs=1e-4
        )


@pytest.mark.parametrize("max_length", [2, 5, 16, 512])
def test_windows_predict_every_token_once(tokenizer, tokenizer_with_bos, max_length):
    for tok in (tokenizer, tokenizer_with_bos):
        passage = encode_passage(tok, TEXTS[0])
        windows = cut_windows(passage, max_length)
        predicted = [token for window in windows for token in window[1:]]
        assert predicted == list(passage.token_ids[1:])
        assert max(map(len, windows)) <= max_length


def test_every_window_begins_with_the_bos_where_the_tokenizer_has_one(tokenizer_with_bos):
    passage = encode_passage(tokenizer_with_bos, TEXTS[0])
    assert {window[0] for window in cut_windows(passage, 8)} == {tokenizer_with_bos.bos_token_id}
    assert passage.num_bytes == len(TEXTS[0].encode())


def test_windows_without_bos_continue_from_the_last_token(tokenizer):
    passage = encode_passage(tokenizer, TEXTS[0])
    windows = cut_windows(passage, 8)
    assert all(b[0] == a[-1] for a, b in pairwise(windows))


def test_only_ids_before_the_text_count_as_leading(tokenizer, tokenizer_with_bos):
    assert leading_special_ids(tokenizer) == ()
    assert leading_special_ids(tokenizer_with_bos) == (tokenizer_with_bos.bos_token_id,)


def test_a_window_longer_than_the_model_is_refused(llama, tokenizer):
    with pytest.raises(LlmtuneError, match="positions"):
        score_texts(llama, tokenizer, ["dog " * 2000], max_length=600, token_budget=1000)


def test_padding_behind_rows_needs_no_mask_where_attention_is_causal_by_itself(llama):
    given: list[bool] = []
    llama.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs.get("attention_mask") is not None),
        with_kwargs=True,
    )
    rows = [[5, 6, 7, 8, 9], [10, 11]]
    with torch.no_grad():
        for left in (False, True):
            logits = run_forward(llama, pad_rows(rows, torch.device("cpu"), left=left)).logits
            alone = [llama(torch.tensor([ids])).logits[0] for ids in rows]
            for row, ids in enumerate(rows):
                place = slice(5 - len(ids), 5) if left else slice(0, len(ids))
                torch.testing.assert_close(logits[row, place], alone[row], atol=1e-5, rtol=1e-4)
        llama.set_attn_implementation("eager")
        run_forward(llama, pad_rows(rows, torch.device("cpu"), left=False))
    assert [given[0], given[3], given[6]] == [False, True, True]
