"""What base and tuned model write for the same prompts, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.data.render import render_messages
from llmtune.data.template import stop_token_ids
from llmtune.scoring.batches import adapter_disabled, choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts


@dataclass(frozen=True)
class GenerationPair:
    """One prompt's two greedy continuations, and whether each stopped by itself."""

    prompt: str
    base: str
    tuned: str
    base_stopped: bool
    tuned_stopped: bool


def sample_generations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int = 64,
    token_budget: int | None = None,
) -> list[GenerationPair]:
    """Continue each prompt greedily with the adapter off and on.

    Args:
        model: a PeftModel.
        prompts: user messages, or whole conversations of messages with `role` and `content`.

    Raises:
        LlmtuneError: no adapter, no chat template, or a prompt too long for the model.
    """
    talks = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    ids = [render_messages(tokenizer, talk, add_generation_prompt=True) for talk in talks]
    decoding = Decoding(max_new_tokens, tuple(stop_token_ids(tokenizer)))
    budget = token_budget or choose_token_budget(model)
    with adapter_disabled(model):
        base = generate_texts(model, tokenizer, ids, decoding, token_budget=budget)
    tuned = generate_texts(model, tokenizer, ids, decoding, token_budget=budget)
    return [
        GenerationPair(talk[-1]["content"], first.text, second.text, first.stopped, second.stopped)
        for talk, first, second in zip(talks, base, tuned, strict=True)
    ]
