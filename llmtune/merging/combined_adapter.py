"""Several adapters of one base made into one new adapter in PEFT's format."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtune.adapters.low_rank_update import NewFactors, form_adapter
from llmtune.adapters.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    adapter_fingerprint,
)
from llmtune.adapters.update import Factors
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject, hash_file
from llmtune.io.json_files import read_json_object
from llmtune.io.own_files import copy_own
from llmtune.io.run_dir import atomic_write_json
from llmtune.io.unfinished import move_into_place, unfinished_dir
from llmtune.merging.adapter_files import AdapterFiles
from llmtune.merging.changes import ADAPTER_PREFIX, WeightedAdapter
from llmtune.merging.combine import combine_deltas, factorize, factorize_product
from llmtune.merging.config import Combination
from llmtune.merging.scratch import read_tensor
from llmtune.merging.sidecar import TEMPLATE_FILES, TOKENIZER_FILES

COMBINED_FILE = "llmtune_combined.json"
"""What a new adapter was made of, without any path of this machine; it marks it as ours."""


@dataclass(frozen=True)
class CombinedAdapter:
    """What was written."""

    out_dir: Path
    num_modules: int
    ranks: Mapping[int, int]
    """Rank -> how many modules have it."""
    lost_energy: float
    """Share of the deltas' squares that cutting the rank lost, over all modules."""
    worst_module: str | None
    worst_lost_energy: float


@dataclass
class _Written:
    factors: dict[str, NewFactors] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)


def combine_adapters(
    adapters: Sequence[WeightedAdapter], how: Combination, out_dir: Path
) -> CombinedAdapter:
    """Write `out_dir` as one adapter that replaces the weighted adapters.

    `linear` and `cat` are exact: the factors are laid side by side, so a module's rank is the sum
    of theirs. `svd`, `ties` and `dare` are cut to `how.rank`. The scaling of the new adapter is 1.

    Raises:
        LlmtuneError: an adapter holds more than low-rank factors of linear layers and embeddings,
            a module's factors have different widths, or a rank is needed and none is given.
    """
    if how.is_dense and how.rank is None:
        raise LlmtuneError(f"--method {how.method} --to adapter needs --rank")
    opened = [AdapterFiles.open(one.directory) for one in adapters]
    for files in opened:
        _require_low_rank(files)
    modules = dict.fromkeys(module for files in opened for module in files.modules)
    written = _Written()
    for module in modules:
        parts = [
            (files.factors(module), one.weight)
            for files, one in zip(opened, adapters, strict=True)
            if module in files.modules
        ]
        _add_module(module, parts, how, written)
    tensors, config = form_adapter(written.factors, opened[0].config)
    tensors = {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in tensors.items()}
    _write(opened[0].directory, config, tensors, _record(adapters, how), out_dir)
    total = sum(written.energy.values())
    worst = max(written.lost, key=written.lost.__getitem__, default=None)
    return CombinedAdapter(
        out_dir=out_dir,
        num_modules=len(modules),
        ranks=dict(Counter(made.a.shape[0] for made in written.factors.values())),
        lost_energy=sum(
            share * written.energy[module] / max(total, 1e-300)
            for module, share in written.lost.items()
        ),
        worst_module=worst,
        worst_lost_energy=written.lost[worst] if worst is not None else 0.0,
    )


def _require_low_rank(files: AdapterFiles) -> None:
    for kind in files.beside_factors():
        raise LlmtuneError(
            f"{files.directory}: holds {kind}, which cannot be combined into one new adapter; "
            "leave --to adapter away to combine into a model"
        )


def _add_module(
    module: str, parts: Sequence[tuple[Factors, float]], how: Combination, written: _Written
) -> None:
    factors = [(read_tensor(one.a).float(), read_tensor(one.b).float()) for one, _ in parts]
    widths = {(a.shape[1], b.shape[0]) for a, b in factors}
    if len(widths) > 1:
        raise LlmtuneError(f"the adapters' factors of {module!r} have different widths: {widths}")
    scalings = [one.scaling for one, _ in parts]
    weights = [weight for _, weight in parts]
    if how.method in {"ties", "dare"}:
        assert how.rank is not None
        deltas = [s * (b @ a) for s, (a, b) in zip(scalings, factors, strict=True)]
        combined = combine_deltas(deltas, weights, how, name=f"{module}.weight/0")
        a_RI, b_OR, lost = factorize(combined, how.rank)
        energy = combined.double().square().sum().item()
    else:
        a_RI = torch.cat([a for a, _ in factors])
        scaled = zip(factors, scalings, weights, strict=True)
        b_OR = torch.cat([b * (s * w) for (_, b), s, w in scaled], dim=1)
        lost, energy = 0.0, 0.0
        if how.method == "svd":
            assert how.rank is not None
            a_RI, b_OR, lost, energy = factorize_product(a_RI, b_OR, how.rank)
    written.factors[module] = NewFactors(a_RI, b_OR, parts[0][0].is_embedding)
    written.lost[module], written.energy[module] = lost, energy


def _record(adapters: Sequence[WeightedAdapter], how: Combination) -> JsonObject:
    parts = [
        {
            "name": one.directory.name,
            "weight": one.weight,
            "adapter_hash": adapter_fingerprint(one.directory),
        }
        for one in adapters
    ]
    return {"adapters": parts, **asdict(how)}


def _write(
    first_dir: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    out_dir: Path,
) -> None:
    out_dir = out_dir.absolute()
    with unfinished_dir(out_dir) as scratch:
        directory = scratch / out_dir.name
        directory.mkdir()
        save_file(dict(tensors), directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (directory / WEIGHTS_NAME).chmod(0o644)
        atomic_write_json(directory / CONFIG_NAME, dict(config))
        atomic_write_json(directory / COMBINED_FILE, dict(record))
        for name in (*TOKENIZER_FILES, *TEMPLATE_FILES):
            if (first_dir / name).is_file():
                copy_own(first_dir / name, directory / name, root=first_dir)
        if (first_dir / MANIFEST_NAME).is_file():
            _write_manifest(first_dir, directory)
        move_into_place(directory, out_dir)


def _write_manifest(first_dir: Path, directory: Path) -> None:
    """Record the base and template, which all the adapters share, and nothing of a training."""
    known = read_json_object(first_dir / MANIFEST_NAME)
    files = {path.name: hash_file(path) for path in sorted(directory.iterdir())}
    kept: dict[str, Any] = {
        key: known[key] for key in ("format", "base", "template", "stop_token_ids") if key in known
    }
    model = known.get("config", {}).get("model", {})
    record = {**kept, "config": {"model": model}, "files": files}
    atomic_write_json(directory / MANIFEST_NAME, record)
