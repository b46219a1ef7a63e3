"""NEFTune: noise on the embeddings of the training rows (arXiv 2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(model: PeftModel, alpha: float | None) -> Iterator[None]:
    """Add uniform noise of size alpha / sqrt(row length * width) to embeddings while training.

    The length is that of each row, not of the batch, so packing and padding change nothing.
    """
    if alpha is None:
        yield
        return
    lengths: list[Tensor] = []

    def note_lengths(_decoder: nn.Module, _args: tuple, kwargs: dict) -> None:
        lengths[:] = [_row_lengths(kwargs)]

    def add_noise(module: nn.Module, _inputs: tuple, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        size = alpha / torch.sqrt(lengths[0] * embedded.shape[-1])
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * size[..., None].to(embedded.dtype)

    decoder = model.get_base_model().base_model
    handles = [
        decoder.register_forward_pre_hook(note_lengths, with_kwargs=True),
        model.get_input_embeddings().register_forward_hook(add_noise),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row_lengths(inputs: dict) -> Tensor:
    """Return the length of the row that each token belongs to, [rows, T] as float32."""
    if inputs.get("attention_mask") is not None:
        lengths = inputs["attention_mask"].sum(dim=1, keepdim=True)
        return lengths.float().expand(inputs["input_ids"].shape)
    per_row = inputs["cu_seq_lens_q"].diff()
    total = inputs["input_ids"].shape[1]
    return per_row.float().repeat_interleave(per_row, output_size=total)[None]
