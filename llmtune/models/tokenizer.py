"""Load a base's tokenizer, and check it against the model."""

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import FETCH_AGAIN, blamed_on, read_json_object
from llmtune.io.quiet import native_prints_aside
from llmtune.models.chat_template import set_system
from llmtune.models.config import OWN_TEMPLATE, TemplateArgument, TemplateChoice
from llmtune.models.turns import as_ids, stop_token_ids

TOKENIZER_NAME = "tokenizer.json"
SLOW_NAMES = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
SMALL_NAMES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
READER = "the installed tokenizers"
TOKENIZER_ADVICE = (
    "it may be damaged, or of a newer version of tokenizers: fetch it again, or upgrade tokenizers"
)
NEW_PAD_TOKEN = "<|pad|>"
OWN_ARGUMENTS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
)
"""What a chat template is called with anyway."""
# Tokens that model makers set aside, best first; none of them occurs in a text or a turn.
SPARE_TOKENS = (
    r"<\|?pad\|?>|\[PAD\]",
    r"<\|[a-z_]*_pad(_id)?\|>",
    r"<\|?(reserved|unused|dummy)[\w ]*\|?>|\[(unused|control)_?\d+\]|<extra_id_\d+>",
    r"<\|endoftext\|>",
    r"<\|?unk\|?>|\[UNK\]",
)

logger = logging.getLogger(__name__)


def load_tokenizer(
    base_dir: Path,
    *,
    num_rows: int,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    template: TemplateChoice = OWN_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a checkpoint, with a pad token that is not EOS. Needs no torch.

    If the checkpoint's pad token is missing or is EOS, a token that the vocabulary already
    holds in reserve takes its place, else a new one in a row the embedding already has; EOS and
    the embedding stay as they are. Only if there is neither, EOS pads (as in GPT-2): llmtune
    masks padding by position, so EOS is still learned.

    Args:
        base_dir: a checkpoint directory.
        num_rows: the number of token ids that its embedding has rows for.
        config: the contents of its config.json.
        generation_config: the contents of its generation_config.json.
        template: what replaces the checkpoint's own chat template, if anything.

    Raises:
        LlmtuneError: there is no tokenizer.json, no EOS token, or a token id without a row in the
            embedding.
    """
    _check_files(base_dir)
    with (
        blamed_on(base_dir / TOKENIZER_NAME, READER, advice=TOKENIZER_ADVICE),
        native_prints_aside(),
    ):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(base_dir), local_files_only=True)
    if template.file is not None:
        tokenizer.chat_template = _read_template(template.file)
    if template.arguments:
        tokenizer.chat_template = with_arguments(tokenizer.chat_template, template.arguments)
    if template.system is not None:
        set_system(tokenizer, template.system)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise LlmtuneError(
            f"{base_dir / SMALL_NAMES[0]}: model_max_length is {tokenizer.model_max_length!r:.80}; "
            "expected a number"
        )
    _check_ids(tokenizer, num_rows, base_dir)
    _set_eos(tokenizer, config, base_dir)
    _set_pad(tokenizer, num_rows, generation_config, base_dir)
    return tokenizer


def _check_files(base_dir: Path) -> None:
    for name in SMALL_NAMES:
        if (base_dir / name).is_file():
            read_json_object(base_dir / name)
    if (base_dir / TOKENIZER_NAME).is_file():
        _check_tokenizer(read_json_object(base_dir / TOKENIZER_NAME), base_dir / TOKENIZER_NAME)
        return
    slow = [name for name in SLOW_NAMES if (base_dir / name).is_file()]
    if slow:
        raise LlmtuneError(
            f"{base_dir}: only a slow tokenizer ({slow[0]}), no {TOKENIZER_NAME}. Convert it once: "
            f"AutoTokenizer.from_pretrained('{base_dir}').save_pretrained('{base_dir}')"
        )
    raise LlmtuneError(f"{base_dir}: no tokenizer: expected {TOKENIZER_NAME}.")


def _check_tokenizer(content: Mapping[str, Any], path: Path) -> None:
    """Check what transformers itself takes for granted of the file."""
    added = content.get("added_tokens") or []
    is_right = isinstance(content.get("model"), dict) and isinstance(added, list)
    for token in added if is_right else ():
        is_right = is_right and isinstance(token, dict) and type(token.get("id")) is int
    if not is_right:
        raise LlmtuneError(f"{path}: is not a tokenizer's file; {FETCH_AGAIN}")


def _read_template(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlmtuneError(
            f"model.chat_template={path}: cannot be read: {error}. Give a Jinja file."
        ) from error


def with_arguments(template: object, arguments: Sequence[tuple[str, TemplateArgument]]) -> str:
    """Return a chat template that is called with these arguments unless the caller sets them.

    The template itself carries them, so that whatever renders it later (transformers, llama.cpp,
    a server) renders what was trained.

    Raises:
        LlmtuneError: there is no template, or it does not read an argument.
    """
    names = ", ".join(name for name, _ in arguments)
    if not isinstance(template, str) or not template:
        raise LlmtuneError(
            f"model.template_arguments sets {names}, but the base has no single chat template to "
            "set them in: take them out, or give model.chat_template=FILE.jinja"
        )
    words = set(re.findall(r"[A-Za-z_]\w*", template))
    for name, _ in arguments:
        if name in OWN_ARGUMENTS:
            raise LlmtuneError(
                f"model.template_arguments: {name} is set by what is rendered; take it out"
            )
        if name not in words:
            near = difflib.get_close_matches(name, words, n=1)
            raise LlmtuneError(
                f"model.template_arguments: the chat template does not read {name}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_jinja(value)} %}}{{% endif %}}"
        for name, value in arguments
    )
    if template.startswith(defaults):  # one that was saved with them
        return template
    # the empty expression keeps a line break at the beginning of the template
    return f"{defaults}{{{{ '' }}}}{template}"


def _jinja(value: TemplateArgument) -> str:
    """Return a value as Jinja writes it, which is JSON but for the words of Python."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _check_ids(tokenizer: PreTrainedTokenizerFast, rows: int, base_dir: Path) -> None:
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows)
    if beyond:
        id, token = beyond[0]
        raise LlmtuneError(
            f"{base_dir}: the tokenizer knows {len(beyond)} tokens for which the model has no "
            f"embedding row ({rows} rows); the first is {token!r} with id {id}. Use the tokenizer "
            "the model was trained with."
        )


def _set_eos(tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any], base_dir: Path) -> None:
    if tokenizer.eos_token_id is not None:
        return
    named = as_ids(config.get("eos_token_id"))
    if not named:
        raise LlmtuneError(
            f"{base_dir}: the tokenizer has no EOS token and config.json names none, so a tuned "
            "model would never learn to stop. Set `eos_token` in tokenizer_config.json."
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(named[0])


def _set_pad(
    tokenizer: PreTrainedTokenizerFast,
    rows: int,
    generation_config: Mapping[str, Any],
    base_dir: Path,
) -> None:
    if tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}:
        return
    stops = stop_token_ids(tokenizer, generation_config)
    spare = _spare_token(tokenizer, {*stops, tokenizer.bos_token_id})
    if spare is not None:
        tokenizer.pad_token = spare
    elif len(tokenizer) < rows and max(tokenizer.get_vocab().values()) < len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})
    else:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(
            "%s: no token to spare for padding, EOS %r pads; it is masked by position, so EOS is "
            "still learned",
            base_dir,
            tokenizer.eos_token,
        )


def _spare_token(tokenizer: PreTrainedTokenizerFast, taken: set[int | None]) -> str | None:
    template = str(tokenizer.chat_template or "")
    special = [
        added.content
        for id, added in sorted(tokenizer.added_tokens_decoder.items())
        if id not in taken and added.content not in template
    ]
    for pattern in SPARE_TOKENS:
        for token in special:
            if re.fullmatch(pattern, token, re.IGNORECASE):
                return str(token)
    return None
