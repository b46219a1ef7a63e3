"""The benchmark of evaluation counts what runs forward, and for what."""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_eval import Cost, counting

from llmtune.scoring.generate import Decoding
from llmtune.scoring.likelihood import Writing, score_and_write
from llmtune.scoring.requests import ContinuationRequest
from tests.tiny import make_model, make_tokenizer


def test_tokens_and_head_positions_are_counted_by_purpose():
    requests = [
        ContinuationRequest((*range(4, 24), 30 + row, 40), ((5,), (6, 7))) for row in range(3)
    ]
    costs: defaultdict[tuple[str, str, str], Cost] = defaultdict(Cost)
    writing = Writing(make_tokenizer(), Decoding(4, ()), lambda scores: True)
    with counting(costs):
        score_and_write(make_model("llama"), requests, writing, token_budget=500)
    found = {key[2]: (cost.passes, cost.tokens, cost.head) for key, cost in costs.items()}
    assert found == {
        "shared beginning": (1, 20, 1),
        "prompts": (1, 6, 3),
        "later tokens of choices": (1, 3, 3),
        "written tokens": (3, 9, 9),
    }
