"""One loaded model that answers as base or as tuned, or the merged model of a run."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.adapters.saved import load_adapter
from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.evaluation.scored_model import ModelIdentity, ScoredModel
from llmtune.models.config import Loadable, ModelConfig
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.resolve import resolve_base
from llmtune.scoring.batches import adapter_disabled

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class LiveTarget:
    """A target in memory. `arms` are those it can answer as without loading anything more."""

    model: Any
    loaded: LoadedModel
    identity: ModelIdentity
    arms: tuple[str, ...]

    @property
    def scored(self) -> ScoredModel:
        """The model as evaluation takes it."""
        return ScoredModel(
            self.model, self.loaded.tokenizer, self.identity, self.loaded.stop_token_ids
        )

    @contextlib.contextmanager
    def answering_as(self, arm: str) -> Iterator[Any]:
        """Yield the model as `arm`: `base` is the adapter switched off."""
        if arm not in self.arms:
            raise LlmtuneError(f"no {arm} model here; there is: {', '.join(self.arms)}")
        if arm == "base" and "tuned" in self.arms:
            with adapter_disabled(self.model):
                yield self.model
        else:
            yield self.model

    @contextlib.contextmanager
    def scored_as(self, arm: str) -> Iterator[ScoredModel]:
        """Yield the model as `arm`, as evaluation takes it: the base's identity has no adapter."""
        with self.answering_as(arm):
            identity = self.identity
            yield replace(
                self.scored,
                identity=replace(identity, adapter=None) if arm == "base" else identity,
            )


def load_live(target: Loadable, arm: str | None = None) -> LiveTarget:
    """Load what `target` names so that it can answer as `arm` (default: its first).

    Raises:
        LlmtuneError: the target has no such arm, or its adapter was made for a different base or
            chat template.
    """
    wanted = arm or target.arms[0]
    if wanted not in target.arms:
        raise LlmtuneError(
            f"{target.name}: has no {wanted} model; there is: {', '.join(target.arms)}"
        )
    if wanted == "merged":
        return _load_merged(target)
    loaded = load_model(target.model, resolve_base(target.model))
    _say_loaded(loaded)
    if target.adapter_dir is None:
        return LiveTarget(loaded.model, loaded, _identity(target.model, loaded), ("base",))
    require_trained_template(loaded.tokenizer, target.adapter_dir)
    model = load_adapter(loaded.model, target.adapter_dir, base_fingerprint=loaded.fingerprint)
    adapter = adapter_fingerprint(target.adapter_dir)
    return LiveTarget(model, loaded, _identity(target.model, loaded, adapter), ("tuned", "base"))


def merged_model_config(target: Loadable) -> ModelConfig:
    """Return how the merged model of a run is loaded: as the run's base, but never quantized."""
    return target.model.model_copy(
        update={"base": str(target.merged_dir), "revision": None, "quantization": None}
    )


def _load_merged(target: Loadable) -> LiveTarget:
    config = merged_model_config(target)
    loaded = load_model(config, resolve_base(config))
    _say_loaded(loaded)
    if target.adapter_dir is not None:
        require_trained_template(loaded.tokenizer, target.adapter_dir)
    return LiveTarget(loaded.model, loaded, _identity(config, loaded), ("merged",))


def _say_loaded(loaded: LoadedModel) -> None:
    dtype = str(loaded.dtype).removeprefix("torch.")
    log.info("model: %s on %s, %s", loaded.source.origin, loaded.device, dtype)


def _identity(
    config: ModelConfig, loaded: LoadedModel, adapter: str | None = None
) -> ModelIdentity:
    return ModelIdentity(
        base=loaded.fingerprint,
        adapter=adapter,
        dtype=str(loaded.dtype).removeprefix("torch."),
        quantization=config.quantization_method,
    )
