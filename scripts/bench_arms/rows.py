"""Rows of random lengths, cut from a stream of tokens that a model can learn from."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Tokenizer

MIXES = ("chat", "short", "full", "task")
SHORTEST, LONGEST = 16, 1024
# Log-normal: median and sigma. The mean of "chat" is 200, that of "short" 130. "task" is like the
# quickstart: rows of 64 tokens of which the first 27 are a template's, the same in all.
LENGTHS = {"chat": (150.0, 0.76), "short": (110.0, 0.58), "task": (35.0, 0.3)}
MEAN_LENGTHS = {"chat": 200, "short": 130, "task": 64}
TASK_BEGINNING = 27
TASK_TRAINED = 2
PROMPT_SHARE = (2, 3)
"""Of the beta distribution from which each row's untrained share is drawn."""
NUM_TOKENS = 2048
FIRST_TOKEN = 10
RULE_SHARE = 0.7
STREAM_LENGTH = 200_000
IGNORE_INDEX = -100


def make_rows(
    mix: str, count: int, *, full_length: int, stream: np.ndarray, seed: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Return `count` pieces of a stream of token ids, with labels (-100 on the prompt)."""
    random = np.random.default_rng(seed)
    rows = []
    for length in draw_lengths(mix, count, full_length=full_length, random=random):
        start = random.integers(len(stream) - length)
        input_ids = stream[start : start + length].tolist()
        if mix == "task":
            input_ids = [*stream[:TASK_BEGINNING].tolist(), *input_ids]
            labels = [IGNORE_INDEX] * (len(input_ids) - TASK_TRAINED) + input_ids[-TASK_TRAINED:]
            rows.append((input_ids, labels))
            continue
        prompt = min(max(1, int(length * random.beta(*PROMPT_SHARE))), length - 2)
        rows.append((input_ids, [IGNORE_INDEX] * prompt + input_ids[prompt:]))
    return rows


def read_stream(model_dir: Path) -> np.ndarray:
    """Return token ids for a base: English prose for a trained one, a rule for random weights.

    The prose is the language reference that every Python brings along. Token ids that mean nothing
    to a trained model drive it where 16-bit rounding alone moves its loss by a hundredth.
    """
    tokenizer_file = model_dir / "tokenizer.json"
    if tokenizer_file.exists():
        text = "\n\n".join(topics[name] for name in sorted(topics))
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    config = json.loads((model_dir / "config.json").read_text())
    return follow_rule(config["vocab_size"])


def follow_rule(vocabulary: int) -> np.ndarray:
    """Return token ids of which most follow from the two before them, the rest Zipf-distributed.

    So the loss of a model with random weights falls, and arms that compute something else part.
    """
    random = np.random.default_rng(0)
    count = min(NUM_TOKENS, vocabulary - FIRST_TOKEN)
    tokens = random.choice(np.arange(FIRST_TOKEN, vocabulary), size=count, replace=False)
    zipf = 1.0 / np.arange(1, count + 1)
    ranks = random.choice(count, size=STREAM_LENGTH, p=zipf / zipf.sum())
    follows = random.random(STREAM_LENGTH) < RULE_SHARE
    for index in range(2, STREAM_LENGTH):
        if follows[index]:
            ranks[index] = (3 * ranks[index - 1] + 5 * ranks[index - 2] + 1) % count
    return tokens[ranks]


def draw_lengths(
    mix: str, count: int, *, full_length: int, random: np.random.Generator
) -> list[int]:
    """Return the tokens of each row."""
    if mix == "full":
        return [full_length] * count
    median, sigma = LENGTHS[mix]
    drawn = random.lognormal(np.log(median), sigma, size=count)
    return np.clip(drawn.round(), SHORTEST, LONGEST).astype(int).tolist()
