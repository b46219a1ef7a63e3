"""The cluster engines, and what is asked for on the command line (light)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.launching.base import Engine, EngineOption
from llmtune.launching.k8s import K8sEngine
from llmtune.launching.ray import RayEngine
from llmtune.launching.sky import SkyEngine
from llmtune.launching.slurm import SlurmEngine

ENGINES: tuple[Engine, ...] = (SkyEngine(), SlurmEngine(), K8sEngine(), RayEngine())
"""Every engine, in the order in which the command line names them."""


@dataclass(frozen=True)
class LaunchSettings:
    """One launch as asked for on the command line."""

    on: str
    """The name of an engine."""
    package: str | None
    nodes: int = 1
    gpus: int = 1
    store: str | None = None
    env: tuple[str, ...] = ()
    out: Path | None = None
    """The folder of the job's files; None is `launch/RUN-ENGINE`."""
    is_dry: bool = False
    """Write the files, and hand nothing in."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The engines' own options that were given."""


def engine_options() -> list[tuple[EngineOption, str]]:
    """Return each engine option once, with the names of the engines that read it."""
    found: dict[str, tuple[EngineOption, list[str]]] = {}
    for engine in ENGINES:
        for option in engine.options:
            found.setdefault(option.name, (option, []))[1].append(engine.name)
    return [(option, ", ".join(names)) for option, names in found.values()]


def find_engine(settings: LaunchSettings) -> Engine:
    """Return the engine that was asked for.

    Raises:
        LlmtuneError: there is none of this name, or it does not read an option that was given.
    """
    engine = next((each for each in ENGINES if each.name == settings.on), None)
    if engine is None:
        known = ", ".join(each.name for each in ENGINES)
        raise LlmtuneError(f"--on {settings.on}: expected one of {known}")
    known_options = {option.name for option in engine.options}
    for name in settings.options:
        if name not in known_options:
            raise LlmtuneError(f"--{name}: --on {engine.name} has no use for it; leave it out")
    if settings.store is not None and not engine.store_help:
        raise LlmtuneError(
            f"--store: --on {engine.name} keeps the run where the config says; leave it out"
        )
    return engine
