"""Which tensors of a checkpoint are 4-bit weights, recognized by their names alone (no torch)."""

from collections.abc import Iterable

STATE_PREFIX = "quant_state.bitsandbytes__"
STATE_SUFFIXES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


def group_four_bit_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Find the 4-bit weights of a checkpoint by the names of its tensors.

    Returns:
        Weight name -> {suffix in `STATE_SUFFIXES`: name of that tensor}, in the order given.
        Weights without a `quant_state` are not 4-bit and are left out.
    """
    known = list(names)
    states: dict[str, dict[str, str]] = {name: {} for name in known}
    for name in known:
        for suffix in STATE_SUFFIXES:
            weight_name = name.removesuffix(f".{suffix}")
            if weight_name != name and weight_name in states:
                states[weight_name][suffix] = name
    return {
        name: state
        for name, state in states.items()
        if any(suffix.startswith(STATE_PREFIX) for suffix in state)
    }
