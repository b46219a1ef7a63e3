"""Which weights an adapter config means, by their names; what matches none is an error."""

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from llmtune.adapters.base import Adapter, matches_pattern
from llmtune.adapters.patterns import require_quick_patterns
from llmtune.errors import LlmtuneError

ALL_LINEAR = "all-linear"
LAYER_NUMBER = re.compile(r"\.(\d+)(?=\.)")
NUM_SUGGESTIONS = 3


@dataclass(frozen=True)
class ModuleNames:
    """The names a model offers, full and in the model's order."""

    linear: Mapping[str, tuple[int, int]]
    """Linear layers that can be adapted, {name: (out, in)}; the LM head is not among them."""
    experts: Mapping[str, tuple[int, int, int]]
    """Fused expert weights, {parameter's name: its shape}; they are not modules."""
    head: str | None
    """The LM head, which is not adapted."""
    is_head_tied: bool
    """Whether the head shares its weight with the input embedding."""
    others: Mapping[str, str]
    """Every other module, {name: type}."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Linear layers that cannot be adapted, {name: why}."""
    biased: Collection[str] = ()
    """Linear layers that have a bias."""
    norms: Mapping[str, int] = field(default_factory=dict)
    """The decoder's norms, {name: number of parameters}; they are among `others` too."""

    @property
    def adaptable(self) -> dict[str, tuple[int, ...]]:
        """Every weight that can be adapted, {name: shape}."""
        return {**self.linear, **self.experts}

    def offered_to(self, config: Adapter) -> dict[str, tuple[int, ...]]:
        """Return what the targets of a config choose from, {name: shape}."""
        parts = config.trained_parts
        chosen = dict(self.adaptable) if "weights" in parts else {}
        if "biases" in parts:
            chosen |= {name: shape for name, shape in self.linear.items() if name in self.biased}
        if "norms" in parts:
            chosen |= {name: (size,) for name, size in self.norms.items()}
        return chosen

    @property
    def modules(self) -> list[str]:
        """The name of every module."""
        return [
            *self.others,
            *self.linear,
            *self.excluded,
            *([self.head] if self.head else []),
        ]


def choose_targets(config: Adapter, names: ModuleNames) -> list[str]:
    """Return the full names of the linear layers and expert weights to adapt.

    Raises:
        LlmtuneError: lists every name, regex, layer and pattern of the config that matches
            nothing, each with the nearest names; or a knob does not fit the layers' shapes.
    """
    problems: list[str] = []
    require_quick_patterns(_regexes(config), names.modules, place="adapter")
    chosen = _by_name(config, names, problems)
    chosen = _by_layer(config, chosen, problems)
    for key, patterns in config.patterns.items():
        problems += _unmatched_patterns(f"adapter.{key}", patterns, chosen)
    for name in config.modules_to_save:
        if not any(_ends_with(module, name) for module in names.modules):
            problems.append(f"adapter.modules_to_save: {name!r} {_nearest(name, names.modules)}")
    if not problems:
        shapes = names.offered_to(config)
        problems += config.why_not_shapes({name: shapes[name] for name in chosen})
    if not problems:
        problems += _parts_without_any(config, names, chosen)
    if problems:
        raise LlmtuneError("\n".join(problems))
    return chosen


def means(wanted: str | Sequence[str], name: str) -> bool:
    """Whether targets that a config names (`all-linear`, names, a regex) mean this layer."""
    if wanted == ALL_LINEAR:
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(_ends_with(name, one) for one in wanted)


def shorten_targets(
    chosen: Sequence[str], all_names: Iterable[str], *, num_parts: int = 1
) -> list[str]:
    """Return the last name parts of `chosen` if they mean just those, else the full names.

    Short names keep adapter_config.json readable, and other tools expect them.
    """
    endings = sorted({_ending(name, num_parts) for name in chosen})
    meant = {name for name in all_names if _ending(name, num_parts) in endings}
    return endings if meant == set(chosen) else sorted(chosen)


def layer_number(name: str) -> int | None:
    """Return the number of the layer that a module is in: the first number in its name."""
    match = LAYER_NUMBER.search(name)
    return None if match is None else int(match.group(1))


def _regexes(config: Adapter) -> Iterator[str]:
    """Yield the regexes of a config; what is none is named later, with all other problems."""
    wanted = config.target_modules
    for pattern in (
        *([wanted] if isinstance(wanted, str) and wanted != ALL_LINEAR else ()),
        *(pattern for patterns in config.patterns.values() for pattern in patterns),
    ):
        with contextlib.suppress(re.error):
            re.compile(pattern)
            yield pattern


def _by_name(config: Adapter, names: ModuleNames, problems: list[str]) -> list[str]:
    wanted = config.target_modules
    refusal = config.why_no_experts()
    offered = names.offered_to(config)
    if wanted == ALL_LINEAR:
        return [name for name in offered if refusal is None or name not in names.experts]
    if isinstance(wanted, str):
        chosen = _by_regex(wanted, names, offered, problems)
    else:
        chosen = _by_list(wanted, names, offered, problems)
    if refusal is not None:
        problems += [
            f"adapter.target_modules: {name} is a fused expert weight: {refusal}."
            for name in chosen
            if name in names.experts
        ][:1]
    return chosen


def _by_list(
    wanted: Sequence[str], names: ModuleNames, offered: Collection[str], problems: list[str]
) -> list[str]:
    if not wanted:
        problems.append("adapter.target_modules: the list is empty; give names, or all-linear.")
    found: set[str] = set()
    for name in wanted:
        matching = _matching(name, offered)
        if not matching:
            problems.append(_why_not(name, names, offered))
        found.update(matching)
    return [name for name in offered if name in found]


def _by_regex(
    pattern: str, names: ModuleNames, offered: Collection[str], problems: list[str]
) -> list[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        problems.append(f"adapter.target_modules: {pattern!r} is not a regex: {error}")
        return []
    if names.head is not None and regex.fullmatch(names.head):
        problems.append(_why_not(names.head, names, offered))
    found = [name for name in offered if regex.fullmatch(name)]
    reasons = {why for name, why in names.excluded.items() if regex.fullmatch(name)}
    if not found and reasons:
        problems.append(
            f"adapter.target_modules: what {pattern!r} matches cannot be adapted: "
            f"{'; '.join(sorted(reasons))}."
        )
    elif not found:
        example = next(iter(offered), "none")
        problems.append(
            f"adapter.target_modules: no linear layer's whole name matches the regex {pattern!r} "
            f"(a name is {example}); for names write a list: [{pattern}]"
        )
    return found


def _by_layer(config: Adapter, chosen: list[str], problems: list[str]) -> list[str]:
    if config.layers == "all" or not chosen:
        return chosen
    numbers = {name: layer_number(name) for name in chosen}
    present = {number for number in numbers.values() if number is not None}
    num_layers = max(present, default=-1) + 1
    if isinstance(config.layers, str):
        count = int(config.layers.removeprefix("last-"))
        if count > num_layers:
            problems.append(f"adapter.layers: {config.layers}, but there are {num_layers} layers.")
        wanted = set(range(num_layers - count, num_layers))
    else:
        wanted = set(config.layers)
        missing = sorted(wanted - present)
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
            if _matching(name, chosen) and not _matching(name, kept)
        ]
    return kept


def _unmatched_patterns(
    key: str, patterns: Mapping[str, float], chosen: Sequence[str]
) -> Iterator[str]:
    for pattern in patterns:
        try:
            is_matched = any(matches_pattern(pattern, name) for name in chosen)
        except re.error as error:
            yield f"{key}: {pattern!r} is not a regex: {error}"
            continue
        if not is_matched and chosen:
            yield f"{key}: {pattern!r} {_nearest(pattern, chosen, of='adapted module')}"


def _parts_without_any(config: Adapter, names: ModuleNames, chosen: list[str]) -> Iterator[str]:
    """Yield each part to train that nothing has in what was chosen."""
    owners = {"weights": names.adaptable, "biases": names.biased, "norms": names.norms}
    for part in sorted(config.trained_parts):
        if any(name in owners[part] for name in chosen):
            continue
        yield (
            "adapter.target_modules: this model has no linear layer to adapt."
            if config.trained_parts == {"weights"}
            else f"adapter.parameters: this model has no {part} in what was chosen. Leave {part} "
            "out, or choose different target_modules or layers."
        )


def _why_not(name: str, names: ModuleNames, offered: Collection[str]) -> str:
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
    reasons = {why for module, why in names.excluded.items() if _ends_with(module, name)}
    if reasons:
        return f"{start} cannot be adapted: {'; '.join(sorted(reasons))}. Leave it out."
    if _matching(name, [*names.adaptable, *names.norms]) and offered != set(names.adaptable):
        return f"{start} has none of what adapter.parameters names. Leave it out."
    kinds = {kind for module, kind in names.others.items() if _ends_with(module, name)}
    if kinds:
        return f"{start} is {', '.join(sorted(kinds))}; only linear layers are adapted."
    return f"{start} {_nearest(name, offered, of='linear layer')}"


def _nearest(name: str, known: Iterable[str], *, of: str = "module") -> str:
    endings = list(dict.fromkeys(_ending(known_name, 1) for known_name in known))
    pool = endings if "." not in name else list(known)
    close = get_close_matches(name, pool, NUM_SUGGESTIONS, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are: {', '.join(endings)}."
    return f"matches no {of}; {hint}"


def _matching(wanted: str, names: Iterable[str]) -> list[str]:
    """Return the names that end in `wanted`, or in `wanted` and a parameter of fused experts."""
    is_module = wanted.rpartition(".")[2] == "experts"
    return [
        name
        for name in names
        if _ends_with(name, wanted) or (is_module and _ends_with(name.rpartition(".")[0], wanted))
    ]


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _ending(name: str, num_parts: int) -> str:
    return ".".join(name.split(".")[-num_parts:])
