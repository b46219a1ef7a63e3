"""The models of one target by name, one loaded at a time, answering requests of the protocol."""

import json
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence

from llmtune.data.pieces import HALF_CHARACTER
from llmtune.data.problems import RowError
from llmtune.data.prompts import PromptEncoder
from llmtune.data.render import encode_plain
from llmtune.data.written_calls import find_call_form
from llmtune.errors import LlmtuneError
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel
from llmtune.models.turns import require_chat_template
from llmtune.scoring.batches import choose_token_budget, position_limit
from llmtune.scoring.generate import Decoding, Piece, stream_pieces
from llmtune.scoring.live import as_arm, load_target
from llmtune.scoring.prefix import rows_at_once
from llmtune.serving.names import ORIGINAL, ServedModel
from llmtune.serving.openai_api import AnswerRequest, RefusedRequest, StopTexts, require_name
from llmtune.serving.shapes import Said, SaidCall, ShownToken

log = logging.getLogger("llmtune")

MOST_TOKENS = 1 << 20
"""An answer's length if neither the request nor the model has a limit."""


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
    ) -> Iterator[int | Said]:
        """Yield the prompt's length in tokens, then the answers as they are written.

        As many are written at once as memory allows.

        Raises:
            RefusedRequest: the request does not fit the model.
            LlmtuneError: the model cannot be loaded, or computes NaN.
        """
        wanted = self.find(request.model)
        live = self.load(wanted.name)
        ids = self._encode(live, request)
        if request.question and request.question.tools and not find_call_form(live.tokenizer):
            log.warning(
                "WARNING: the chat template of %s writes calls in a form that is not read back "
                "here; an answer that calls a tool is sent as its text",
                wanted.name,
            )
        yield len(ids)
        decoding = _decoding(live, request, len(ids))
        slots = len(ids) + decoding.max_new_tokens
        with as_arm(live, self._arm_of(wanted, live)) as arm:
            budget = choose_token_budget(arm.model)
            most = rows_at_once(arm.model, slots=slots, kept=1, token_budget=budget)
            most = min(most, max(1, budget // len(ids)))  # the prompt runs once for each
            for start in range(0, request.num_answers, most):
                places = range(start, min(start + most, request.num_answers))
                tellers = {place: _Teller(request, live, ids) for place in places}
                for piece in stream_pieces(
                    arm.model,
                    arm.tokenizer,
                    ids,
                    decoding,
                    places=places,
                    num_likeliest=request.num_likeliest,
                    is_ended=lambda place, tellers=tellers: tellers[place].has_ended,  # type: ignore[misc]
                ):
                    yield tellers[piece.place].tell(piece)
                    if is_cancelled():
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


class _Teller:
    """Says one answer: cut at the request's own stops, of which the first ends it.

    If there are tools, what may be a call is held back until the answer's end.
    """

    def __init__(self, request: AnswerRequest, live: LiveModel, prompt: Sequence[int]) -> None:
        self.has_ended = False
        self._stops = StopTexts(request.stop)
        self._live = live
        self._before = prompt[-1]
        self._written = ""
        """What the answer is so far, cut."""
        self._heard = self._told = 0
        self._held: list[tuple[int, tuple[ShownToken, ...]]] = []
        """Tokens whose text is held back, with the characters before them."""
        tools = (request.question.tools if request.question else None) or []
        self._names = [str(tool.get("function", tool)["name"]) for tool in tools]
        self._form = find_call_form(live.tokenizer) if tools else None
        self._is_marked = self._form is not None and _is_visible(self._form.mark, live)

    def tell(self, piece: Piece) -> Said:
        """Return what may be shown of the answer now."""
        self._written += self._stops.feed(piece.text, is_last=piece.is_last)
        self._held.append((self._heard, self._show(piece)))
        self._heard += len(piece.text)
        self.has_ended = piece.is_last or self._stops.found
        finish, calls = None, tuple[SaidCall, ...]()
        whole = self._written if self._form is None else self._before_calls(self._form.mark)
        if self.has_ended:
            finish = "stop" if piece.stopped or self._stops.found else "length"
            whole, calls = self._read_calls(piece)
            finish = "tool_calls" if calls and finish == "stop" else finish
        text = whole[self._told :]
        self._told += len(text)
        is_whole = piece.is_last and not self._stops.found
        tokens: tuple[ShownToken, ...] = ()
        while self._held and (is_whole or self._held[0][0] < self._told):
            tokens += self._held.pop(0)[1]
        return Said(text, piece.num_tokens, piece.place, finish, tokens, calls)

    def _before_calls(self, mark: str) -> str:
        """Return what cannot be a part of a call, whatever follows."""
        if not self._is_marked:
            return ""
        return StopTexts([mark]).feed(self._written).rstrip()

    def _read_calls(self, piece: Piece) -> tuple[str, tuple[SaidCall, ...]]:
        """Return the answer's text and its calls, now that it is at its end."""
        if self._form is None:
            return self._written, ()
        written: str = self._written
        if not self._is_marked and not self._stops.found:
            written = str(self._live.tokenizer.decode(piece.token_ids))
        content, calls = self._form.read(written, self._names)
        if not calls:
            return self._written, ()
        shown = [
            SaidCall(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in calls
        ]
        return content, tuple(shown)

    def _show(self, piece: Piece) -> tuple[ShownToken, ...]:
        shown, offset = [], self._heard
        for share in piece.shares:
            likeliest = [(self._text(token), log) for token, log in share.likeliest]
            text = self._text(share.token_id)
            place = piece.text.find(text, offset - self._heard)
            if HALF_CHARACTER not in text and place >= 0:
                offset = self._heard + place  # behind parts that make up nothing
            shown.append(ShownToken(text, share.log_probability, tuple(likeliest), offset))
            self._before = share.token_id
            offset += len(text.replace(HALF_CHARACTER, ""))  # what parts make up ends the piece
        return tuple(shown)

    def _text(self, token: int) -> str:
        """Return a token's text behind the one before it, whose space may depend on it."""
        decode = self._live.tokenizer.decode
        before = str(decode([self._before]))
        if before.endswith(HALF_CHARACTER):
            return str(decode([token]))
        return str(decode([self._before, token]))[len(before) :]


def _is_visible(mark: str, live: LiveModel) -> bool:
    """Whether a text holds a mark that was written: control tokens are left out of it."""
    ids = live.tokenizer(mark, add_special_tokens=False)["input_ids"]
    return bool(mark) and mark in str(live.tokenizer.decode(ids, skip_special_tokens=True))
