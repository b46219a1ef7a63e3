"""Several adapters' deltas of one weight made into one: sum, TIES, DARE, and cutting the rank."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llmtune.merging.config import Combination


def combine_deltas(
    deltas: Sequence[Tensor], weights: Sequence[float], how: Combination, *, name: str
) -> Tensor:
    """Return the one delta that replaces `deltas`, in float32.

    Args:
        deltas: each adapter's `scaling * B @ A`, all [out, in] in float32.
        weights: each adapter's weight.
        how: the method; `linear` and `cat` are the sum in the order given.
        name: the tensor's name; the random choice of `dare` depends on it.
    """
    if how.method == "ties":
        return ties(deltas, weights, how.density)
    if how.method == "dare":
        deltas = [
            drop_and_rescale(delta, how.density, _generator(how.seed, name, place))
            for place, delta in enumerate(deltas)
        ]
    total = add_up(deltas, weights)
    return truncate_rank(total, how.rank)[0] if how.method == "svd" and how.rank else total


def add_up(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum, added in the order given."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += delta * weight
    return total


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES-Merging (Yadav et al. 2023, arXiv:2306.01708, section 4, algorithm 1).

    Trim: of each delta keep the `density` largest magnitudes. Elect: the sign of a number is that
    of the trimmed deltas' sum. Merge: of those trimmed deltas that have this sign, the mean, each
    times its weight. Where nothing is left, or one delta is, the divisor is 1.
    """
    trimmed = [keep_largest(delta, density) for delta in deltas]
    is_positive = add_up(trimmed, [1.0] * len(trimmed)) >= 0
    total = torch.zeros_like(trimmed[0])
    num_agreeing = torch.zeros_like(trimmed[0])
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = torch.where(is_positive, delta > 0, delta < 0)
        total += delta * agrees * weight
        num_agreeing += agrees
    return total / num_agreeing.clamp(min=1)


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Return the delta with all but its `density * size` largest magnitudes set to zero."""
    num_kept = int(density * delta.numel())
    if num_kept >= delta.numel():
        return delta
    if num_kept == 0:
        return torch.zeros_like(delta)
    _, kept = delta.abs().flatten().topk(num_kept, sorted=False)
    result = torch.zeros_like(delta).flatten()
    result[kept] = delta.flatten()[kept]
    return result.view_as(delta)


def drop_and_rescale(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2023, arXiv:2311.03099, section 3.2).

    Each number is dropped with probability 1 - density and the others are divided by density, so
    that the expected delta stays what it was.
    """
    kept = torch.rand(delta.shape, generator=generator) < density
    return delta * kept.to(delta.device) / density


def truncate_rank(delta: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return the nearest delta of that rank, and the share of the energy that is lost.

    The energy of a delta is the sum of its squares; truncating its singular values after `rank`
    loses least (Eckart and Young 1936).
    """
    a_RI, b_OR, lost = factorize(delta, rank)
    return b_OR @ a_RI, lost


def factorize(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A [rank, in] and B [out, rank] with B @ A nearest to delta, and the energy lost."""
    rank = min(rank, *delta.shape)
    u_OK, values_K, v_KI = torch.linalg.svd(delta, full_matrices=False)
    root = values_K[:rank].sqrt()
    energy = values_K.double().square()
    lost = (energy[rank:].sum() / energy.sum().clamp(min=1e-300)).item()
    return root[:, None] * v_KI[:rank], u_OK[:, :rank] * root, lost


def _generator(seed: int, name: str, place: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{place}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def factorize_product(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """As `factorize` of B @ A, whose rank is at most R, without making the product.

    With B = Q_B R_B and A^T = Q_A R_A the singular values are those of the small R_B R_A^T.

    Returns:
        A [rank, in], B [out, rank], the share of the energy lost, and the energy of B @ A.
    """
    q_b, r_b = torch.linalg.qr(b_OR.double())
    q_a, r_a = torch.linalg.qr(a_RI.double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    energy = values.square()
    total = energy.sum().item()
    lost = energy[rank:].sum().item() / max(total, 1e-300)
    new_a = root[:, None] * (v[:rank] @ q_a.T)
    return new_a.float(), ((q_b @ u[:, :rank]) * root).float(), lost, total
