"""The models of one target by name, one loaded at a time, answering requests of the protocol."""

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from llmtune.data.problems import RowError
from llmtune.data.prompts import PromptEncoder
from llmtune.data.render import encode_plain
from llmtune.errors import LlmtuneError
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel
from llmtune.models.resolve import Loadable
from llmtune.models.turns import require_chat_template
from llmtune.scoring.batches import position_limit
from llmtune.scoring.generate import Decoding, Piece, stream_pieces
from llmtune.scoring.live import as_arm, load_target
from llmtune.serving.openai_api import AnswerRequest, RefusedRequest, StopTexts, require_name

log = logging.getLogger("llmtune")

ORIGINAL = "original"
MOST_TOKENS = 1 << 20
"""An answer's length if neither the request nor the model has a limit."""


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
    if target.adapter_dir is not None or target.merged_dir is not None:
        found.append(ServedModel(ORIGINAL, target, ORIGINAL))
    found += [ServedModel(name, one, one.arms[0]) for name, one in exports.items()]
    names = [one.name for one in found]
    for name in chosen:
        if name not in names:
            raise LlmtuneError(
                f"--model {name}: {target.name} has no such model; there is: {', '.join(names)}"
            )
    by_name = {one.name: one for one in found}
    return [by_name[name] for name in chosen] if chosen else found


class LiveModels:
    """Answers as any of the models; a request for one that is not loaded loads it in their place.

    Base and tuned are one loaded model; `original` is, too, if the base is not quantized.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {one.name: one for one in models}
        self._loaded: ServedModel | None = None
        self._live: LiveModel | None = None
        self._encoder: PromptEncoder | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What `/v1/models` lists; the first answers a request that names none."""
        return tuple(self._models)

    def find(self, name: str | None) -> ServedModel:
        """Return the model that a request names.

        Raises:
            RefusedRequest: there is none of this name.
        """
        return self._models[require_name(name, self.names)]

    def load(self, name: str | None = None) -> LiveModel:
        """Return the model of this name, loaded.

        Raises:
            LlmtuneError: it cannot be loaded.
        """
        wanted = self.find(name)
        if self._live is None or not self._answers(wanted):
            if self._loaded is not None:
                log.info("serve: %s takes the place of %s", wanted.name, self._loaded.name)
            self._live = self._encoder = self._loaded = None
            release_memory()
            self._live = load_target(wanted.target, wanted.arm)
            self._loaded = wanted
            self._encoder = PromptEncoder(self._live.tokenizer)
        return self._live

    def answer(
        self, request: AnswerRequest, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[int | Piece]:
        """Yield the prompt's length in tokens, then the answer as it is written.

        Raises:
            RefusedRequest: the request does not fit the model.
            LlmtuneError: the model cannot be loaded, or computes NaN.
        """
        wanted = self.find(request.model)
        live = self.load(wanted.name)
        ids = self._encode(live, request)
        yield len(ids)
        decoding = _decoding(live, request, len(ids))
        stops = StopTexts(request.stop)
        with as_arm(live, self._arm_of(wanted, live)) as arm:
            for piece in stream_pieces(arm.model, arm.tokenizer, ids, decoding):
                said = _cut(piece, stops)
                yield said
                if said.is_last or is_cancelled():
                    return

    def _answers(self, wanted: ServedModel) -> bool:
        """Whether what is loaded can answer as `wanted`."""
        loaded = self._loaded
        if loaded is None or loaded.target is not wanted.target:
            return False
        is_same_base = loaded.is_live and not wanted.target.model.storage.is_quantized
        return (
            loaded.arm == wanted.arm
            or (loaded.is_live and wanted.is_live)
            or (wanted.arm == ORIGINAL and is_same_base)
        )

    def _arm_of(self, wanted: ServedModel, live: LiveModel) -> str:
        """Return the loaded model's arm of this name: an original that is not quantized is base."""
        return wanted.arm if wanted.arm in live.arms else "base"

    def _encode(self, live: LiveModel, request: AnswerRequest) -> list[int]:
        if request.question is not None:
            assert self._encoder is not None, "set with the loaded model"
            try:
                require_chat_template(live.tokenizer)
                ids = self._encoder.encode(request.question)
            except (RowError, LlmtuneError) as error:
                raise RefusedRequest(400, str(error), param="messages") from None
        elif isinstance(request.prompt, str):
            ids = encode_plain(live.tokenizer, request.prompt)
        else:
            ids = list(request.prompt)
            most = len(live.tokenizer)
            if not all(0 <= id < most for id in ids):
                raise RefusedRequest(
                    400, f"prompt: expected token ids from 0 to {most - 1}", param="prompt"
                )
        limit = position_limit(live.model)
        if limit is not None and len(ids) >= limit:
            raise RefusedRequest(
                400,
                f"the prompt takes {len(ids):,} tokens, and the model has {limit:,} positions; "
                "shorten it",
                param="messages" if request.is_chat else "prompt",
                code="context_length_exceeded",
            )
        return ids


def _decoding(live: LiveModel, request: AnswerRequest, length: int) -> Decoding:
    limit = position_limit(live.model)
    room = MOST_TOKENS if limit is None else limit - length
    seed = secrets.randbits(31) if request.seed is None else request.seed
    return Decoding(
        max_new_tokens=min(request.max_tokens or room, room),
        stop_token_ids=live.stop_token_ids,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=seed,
    )


def _cut(piece: Piece, stops: StopTexts) -> Piece:
    """Cut a piece at the request's own stops, of which the first ends the answer."""
    text = stops.feed(piece.text, is_last=piece.is_last)
    if stops.found:
        return replace(piece, text=text, is_last=True, stopped=True)
    return replace(piece, text=text)
