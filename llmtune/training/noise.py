"""NEFTune's noise on the embeddings: drawn for each row, whatever rows are beside it."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from llmtune.data.example import Example

LARGEST_SEED = 2**63 - 1


@dataclass
class RowNoise:
    """Uniform noise of size alpha / sqrt(row length * width) (arXiv 2310.05914).

    It is a function of the seed, the step and the row's own tokens: neither packing nor the split
    into micro-batches, nor the number of processes changes it.
    """

    alpha: float
    seed: int
    step: int = 0
    rows: Sequence[tuple[int, int]] = field(default_factory=tuple)
    """Length and key (see `name_rows`) of the rows that go through the model next, in order."""

    def draw(self, embedded: Tensor) -> Tensor:
        """Return the noise for embeddings [rows, longest, width], or [1, T, width] if packed."""
        noise = torch.zeros_like(embedded)
        width = embedded.shape[-1]
        generator = torch.Generator(embedded.device)
        packed_start = 0
        for place, (length, key) in enumerate(self.rows):
            mixed = ((self.seed * 1_000_003 + self.step) * 1_000_003 + key) % LARGEST_SEED
            generator.manual_seed(mixed)
            if embedded.shape[0] == 1:
                own = noise[0, packed_start : packed_start + length]
                packed_start += length
            else:
                own = noise[place, :length]
            own.uniform_(-1, 1, generator=generator).mul_(self.alpha / (length * width) ** 0.5)
        return noise


def name_rows(examples: Sequence[Example]) -> tuple[tuple[int, int], ...]:
    """Return the length of each row and a key made of its tokens, 32 bits."""
    return tuple(
        (len(row.input_ids), zlib.crc32(np.array(row.input_ids, dtype="<i8").tobytes()))
        for row in examples
    )


@contextmanager
def noisy_embeddings(model: PeftModel, noise: RowNoise) -> Iterator[None]:
    """Add the noise of `noise.rows` to the embeddings inside, while the model is training."""

    def add_noise(module: nn.Module, _inputs: tuple[Any, ...], embedded: Tensor) -> Tensor:
        return embedded + noise.draw(embedded) if module.training else embedded

    handle = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
