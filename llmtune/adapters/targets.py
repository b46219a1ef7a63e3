"""Which modules an adapter config means, by their names; what matches none is an error."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from llmtune.adapters.base import LowRankAdapter, matches_pattern
from llmtune.errors import LlmtuneError

ALL_LINEAR = "all-linear"
LAYER_NUMBER = re.compile(r"\.(\d+)(?=\.)")
NUM_SUGGESTIONS = 3


@dataclass(frozen=True)
class ModuleNames:
    """The names a model offers, full and in the model's order."""

    linear: Mapping[str, tuple[int, int]]
    """Linear layers that can be adapted, {name: (out, in)}; the LM head is not among them."""
    head: str | None
    """The LM head, which is not adapted."""
    is_head_tied: bool
    """Whether the head shares its weight with the input embedding."""
    others: Mapping[str, str]
    """Every other module, {name: type}."""
    experts: Sequence[str]
    """Fused expert weights, which are parameters and no modules."""


def choose_targets(config: LowRankAdapter, names: ModuleNames) -> list[str]:
    """Return the full names of the modules to adapt, in the model's order.

    Raises:
        LlmtuneError: lists every name, regex, layer and pattern of the config that matches
            nothing, each with the nearest names.
    """
    problems: list[str] = []
    chosen = _by_name(config.target_modules, names, problems)
    chosen = _by_layer(config, chosen, problems)
    for key in ("rank_pattern", "alpha_pattern"):
        problems += _unmatched_patterns(f"adapter.{key}", getattr(config, key), chosen)
    everything = [*names.others, *names.linear, *([names.head] if names.head else [])]
    for name in config.modules_to_save:
        if not any(_ends_with(module, name) for module in everything):
            problems.append(f"adapter.modules_to_save: {name!r} {_nearest(name, everything)}")
    if not chosen and not problems:
        problems.append("adapter.target_modules: this model has no linear layer to adapt.")
    if problems:
        raise LlmtuneError("\n".join(problems))
    return chosen


def shorten_targets(chosen: Sequence[str], all_names: Iterable[str]) -> list[str]:
    """Return the last name parts of `chosen` if they mean just those modules, else the full names.

    Short names keep adapter_config.json readable, and other tools expect them.
    """
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    meant = {name for name in all_names if name.rpartition(".")[2] in endings}
    return endings if meant == set(chosen) else sorted(chosen)


def layer_number(module: str) -> int | None:
    """Return the number of the layer that a module is in: the first number in its name."""
    match = LAYER_NUMBER.search(module)
    return None if match is None else int(match.group(1))


def _by_name(wanted: str | list[str], names: ModuleNames, problems: list[str]) -> list[str]:
    if wanted == ALL_LINEAR:
        return list(names.linear)
    if isinstance(wanted, str):
        return _by_regex(wanted, names, problems)
    if not wanted:
        problems.append("adapter.target_modules: the list is empty; give names, or all-linear.")
    found: set[str] = set()
    for name in wanted:
        matching = [module for module in names.linear if _ends_with(module, name)]
        if not matching:
            problems.append(_why_not(name, names))
        found.update(matching)
    return [module for module in names.linear if module in found]


def _by_regex(pattern: str, names: ModuleNames, problems: list[str]) -> list[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        problems.append(f"adapter.target_modules: {pattern!r} is not a regex: {error}")
        return []
    if names.head is not None and regex.fullmatch(names.head):
        problems.append(_why_not(names.head, names))
    found = [module for module in names.linear if regex.fullmatch(module)]
    if not found:
        example = next(iter(names.linear), "none")
        problems.append(
            f"adapter.target_modules: no linear layer's whole name matches the regex {pattern!r} "
            f"(a name is {example}); for names write a list: [{pattern}]"
        )
    return found


def _by_layer(config: LowRankAdapter, chosen: list[str], problems: list[str]) -> list[str]:
    if config.layers == "all" or not chosen:
        return chosen
    numbers = {name: layer_number(name) for name in chosen}
    present = sorted({number for number in numbers.values() if number is not None})
    num_layers = max(present, default=-1) + 1
    if isinstance(config.layers, str):
        count = int(config.layers.removeprefix("last-"))
        if count > num_layers:
            problems.append(f"adapter.layers: {config.layers}, but there are {num_layers} layers.")
        wanted = set(range(num_layers - count, num_layers))
    else:
        wanted = set(config.layers)
        missing = sorted(wanted - set(present))
        if missing or not wanted:
            problems.append(
                f"adapter.layers: {missing or 'the empty list'} names no layer with a target "
                f"module; there are layers 0 to {num_layers - 1}."
            )
    kept = [name for name in chosen if numbers[name] in wanted]
    if isinstance(config.target_modules, list) and kept:
        problems += [
            f"adapter.target_modules: {name!r} is in none of the chosen layers ({config.layers})."
            for name in config.target_modules
            if any(_ends_with(module, name) for module in chosen)
            and not any(_ends_with(module, name) for module in kept)
        ]
    return kept


def _unmatched_patterns(
    key: str, patterns: Mapping[str, float], chosen: Sequence[str]
) -> Iterable[str]:
    for pattern in patterns:
        try:
            is_matched = any(matches_pattern(pattern, module) for module in chosen)
        except re.error as error:
            yield f"{key}: {pattern!r} is not a regex: {error}"
            continue
        if not is_matched and chosen:
            yield f"{key}: {pattern!r} {_nearest(pattern, chosen, of='adapted module')}"


def _why_not(name: str, names: ModuleNames) -> str:
    """Say why a named target cannot be adapted."""
    start = f"adapter.target_modules: {name!r}"
    if names.head is not None and _ends_with(names.head, name):
        if names.is_head_tied:
            return (
                f"{start} is the LM head, and its weight is the input embedding too (tied): a "
                "LoRA update could not be merged into one without changing the other. Leave it out."
            )
        return (
            f"{start} is the LM head: the loss is computed from its weight directly, so an adapter "
            "there would not be trained. Leave it out, or train it whole: "
            f"adapter.modules_to_save=[{name}]"
        )
    kinds = {kind for module, kind in names.others.items() if _ends_with(module, name)}
    if kinds:
        return f"{start} is {', '.join(sorted(kinds))}; only linear layers are adapted."
    if any(_ends_with(parameter, name) for parameter in names.experts):
        return f"{start} is a fused expert weight; these are not adapted."
    return f"{start} {_nearest(name, names.linear, of='linear layer')}"


def _nearest(name: str, known: Iterable[str], *, of: str = "module") -> str:
    endings = list(dict.fromkeys(module.rpartition(".")[2] for module in known))
    pool = endings if "." not in name else list(known)
    close = get_close_matches(name, pool, NUM_SUGGESTIONS, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are: {', '.join(endings)}."
    return f"matches no {of}; {hint}"


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
