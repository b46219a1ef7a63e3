"""By what names the models of a target answer (light)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.models.resolve import Loadable

MERGED = "merged"
ORIGINAL = "original"


@dataclass(frozen=True)
class ServedModel:
    """One name of `/v1/models`: what is loaded for it, and as which arm that answers."""

    name: str
    target: Loadable
    arm: str

    @property
    def is_live(self) -> bool:
        """Whether it is the target's base, with or without its adapter, as it was trained."""
        return self.arm in ("tuned", "base")


def find_models(
    target: Loadable, exports: Mapping[str, Loadable], chosen: Sequence[str] = ()
) -> list[ServedModel]:
    """Return what can be asked by name, the default first.

    Args:
        exports: checkpoints that were exported from the target, by name.
        chosen: only these; empty is all.

    Raises:
        LlmtuneError: one of `chosen` is not there.
    """
    found = [ServedModel(arm, target, arm) for arm in target.arms]
    if not is_alone(target):
        found.append(ServedModel(ORIGINAL, target, ORIGINAL))
    elif len(found) == 1:
        found = [ServedModel(name_alone(target), target, found[0].arm)]
    found += [ServedModel(name, one, one.arms[0]) for name, one in exports.items()]
    names = [one.name for one in found]
    for name in chosen:
        if name not in names:
            raise LlmtuneError(
                f"--model {name}: {target.name} has no such model; there is: {', '.join(names)}"
            )
    by_name = {one.name: one for one in found}
    return [by_name[name] for name in chosen] if chosen else found


def is_alone(target: Loadable) -> bool:
    """Whether a target is one model: nothing is put on it, and it is computed as it is stored."""
    is_made = target.adapter_dir is not None or target.merged_dir is not None
    return not is_made and not target.model.storage.is_quantized


def name_alone(target: Loadable) -> str:
    """Return by what name a model alone answers: `original`, or `merged` if it is called so."""
    return MERGED if Path(target.name).name == MERGED else ORIGINAL
