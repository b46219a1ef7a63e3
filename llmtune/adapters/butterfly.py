"""BOFT's layer without dense tables: inputs are turned block by block, between two reorderings.

peft's own makes a permutation matrix of width squared for every factor of every layer, and needs a
CUDA extension, compiled on first use, for more than one factor; without it, it silently trains one.
Here permutations are lists of places, and the same tensors mean the same rotation.

Widths: T tokens, I inputs, O outputs; D blocks of size B each, N factors.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import BOFTConfig
from peft.tuners.boft import model as peft_boft
from peft.tuners.boft.layer import Linear
from torch import Tensor, nn


class ButterflyLinear(Linear):
    """peft's BOFT linear: y = s * ((x R) W'), with R the product of N sparse rotations."""

    places_NI: Tensor
    """Factor n sees input `places_NI[n].argsort()[i]` in place i."""

    def update_layer(self, adapter_name: str, config: BOFTConfig, **_: Any) -> None:
        """Lay out the rotations and the scales of an adapter.

        Raises:
            ValueError: the blocks do not fit the layer's width.
        """
        width, num_factors = self.in_features, config.boft_n_butterfly_factor
        size = config.boft_block_size or width // config.boft_block_num
        reason = why_no_blocks(width, size, num_factors)
        if reason is not None:
            raise ValueError(reason)
        num_blocks = width // size
        device = self.get_base_layer().weight.device
        with torch.device("cpu"):  # it reads the places one by one
            orders = [
                self.block_butterfly_perm(width, num_blocks // 2**n, size // 2, num_factors - 1)
                for n in range(num_factors)
            ]
        with torch.device(device):
            self.boft_R[adapter_name] = nn.Parameter(
                torch.zeros(num_factors, num_blocks, size, size)
            )
            self.boft_s[adapter_name] = nn.Parameter(torch.ones(self.out_features, 1))
        self.register_buffer("places_NI", torch.stack(orders).to(device), persistent=False)
        self.boft_dropout[adapter_name] = nn.Identity()
        self.boft_block_size[adapter_name] = size
        self.boft_block_num[adapter_name] = num_blocks
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return R [I, I] and the scales [O, 1]."""
        factors = self.boft_R[adapter]
        eye_II = torch.eye(self.in_features, device=factors.device, dtype=factors.dtype)
        return self._turn(eye_II, adapter), self.boft_s[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's result for inputs [..., I], in their precision."""
        active = [name for name in self.active_adapters if name in self.boft_R]
        if self.disable_adapters or self.merged or not active:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        turned = x
        for name in reversed(active):
            turned = self._turn(turned, name)
        result = self.base_layer(turned, *args, **kwargs)
        bias = self.get_base_layer().bias
        result = result if bias is None else result - bias
        for name in active:
            result = result * self.boft_s[name].squeeze(-1).to(result.dtype)
        return (result if bias is None else result + bias).to(x.dtype)

    def _turn(self, x: Tensor, adapter: str) -> Tensor:
        factors_NDBB = self.boft_R[adapter]
        num_factors, num_blocks, size, _ = factors_NDBB.shape
        turns = self.cayley_batch(factors_NDBB.flatten(0, 1)).view_as(factors_NDBB).to(x.dtype)
        x_TI = x.reshape(-1, self.in_features)
        for n in reversed(range(num_factors)):
            places_I = self.places_NI[n].to(x.device)
            blocks_TDB = x_TI[:, places_I.argsort()].view(-1, num_blocks, size)
            x_TI = torch.einsum("tdb,dbc->tdc", blocks_TDB, turns[n]).flatten(1)[:, places_I]
        return x_TI.view(x.shape)


def why_no_blocks(width: int, size: int, num_factors: int) -> str | None:
    """Say why a width cannot be cut into such blocks; None if it can."""
    if num_factors > 1 and size % 2:
        return f"blocks of {size}: with more than one factor their size must be even"
    span = size * 2 ** (num_factors - 1)
    if width % span:
        return f"{num_factors} factors of blocks of {size} need a multiple of {span} inputs"
    return None


@contextlib.contextmanager
def butterfly_layers() -> Iterator[None]:
    """Have peft make these layers while the block runs: it picks a class by its module's name."""
    theirs = peft_boft.Linear
    peft_boft.Linear = ButterflyLinear
    try:
        yield
    finally:
        peft_boft.Linear = theirs
