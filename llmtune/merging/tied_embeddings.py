"""Tied embeddings in a merge: keep the tie, or write both tensors and say so in the config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import CheckpointIndex
from llmtune.merging.adapter_files import have_same_bytes
from llmtune.merging.changes import ConfigChanges, PlannedTensor
from llmtune.merging.names import BaseNames


@dataclass(frozen=True)
class _Vocabulary:
    """The base's input embedding and output head."""

    embedding: str
    head: str
    is_tied: bool
    is_head_stored: bool


def settle_ties(
    base: CheckpointIndex,
    config: Mapping[str, Any],
    changed: Mapping[str, PlannedTensor],
    names: BaseNames,
) -> tuple[dict[str, PlannedTensor], ConfigChanges]:
    """Return the changed tensors with the head settled, and the changes of `config.json`.

    In a model whose head is the embedding, an adapter on one of the two does not touch the other:
    both are then written and `tie_word_embeddings` becomes false. Trained token rows belong to
    both (so PEFT trains them), and two equal replacements stay one tensor.

    Raises:
        LlmtuneError: the head or the embedding cannot be identified in the base, or the vocabulary
            grew in one of the two only.
    """
    planned = dict(changed)
    if not any(names.is_embedding(name) or names.is_head(name) for name in planned):
        return planned, {}
    vocabulary = _find_vocabulary(base, config, names)
    changes: ConfigChanges = {}
    if vocabulary.is_tied and _settle_tied(base, vocabulary, planned, names):
        changes["tie_word_embeddings"] = False
    grown = _grown_vocabulary(base, vocabulary, planned)
    if grown is not None:
        changes["vocab_size"] = grown
    return planned, changes


def _find_vocabulary(
    base: CheckpointIndex, config: Mapping[str, Any], names: BaseNames
) -> _Vocabulary:
    embedding = names.find_embedding()
    heads = names.find_heads()
    if embedding is None or len(heads) > 1:
        raise LlmtuneError(
            f"{base.directory}: the adapter changes the embedding or the head, and which tensors "
            "these are in the base cannot be determined; such an adapter cannot be merged here"
        )
    if not heads:
        head = names.new_head(str(config.get("model_type", "")))
        return _Vocabulary(embedding, head, is_tied=True, is_head_stored=False)
    is_same = have_same_bytes(base.tensors[embedding], base.tensors[heads[0]])
    if config.get("tie_word_embeddings") and not is_same:
        raise LlmtuneError(
            f"{base.directory}: config.json ties {heads[0]!r} to {embedding!r}, yet they differ in "
            "the checkpoint, and the adapter changes them: correct tie_word_embeddings first"
        )
    is_tied = is_same and config.get("tie_word_embeddings") is not False
    return _Vocabulary(embedding, heads[0], is_tied=is_tied, is_head_stored=True)


def _settle_tied(
    base: CheckpointIndex,
    vocabulary: _Vocabulary,
    planned: dict[str, PlannedTensor],
    names: BaseNames,
) -> bool:
    """Give the tied head its place in `planned`; return whether the tie is cut."""
    embedding = planned.get(vocabulary.embedding)
    planned_head = next((name for name in planned if names.is_head(name)), None)
    head = planned.pop(planned_head) if planned_head is not None else None
    if head is None and embedding is not None and embedding.token_rows is not None:
        if vocabulary.is_head_stored:
            entry = base.tensors[vocabulary.head]
            planned[vocabulary.head] = replace(embedding, name=vocabulary.head, source=entry)
        return False
    if head is not None and embedding is not None and _are_one(head, embedding):
        if vocabulary.is_head_stored:
            planned[vocabulary.head] = replace(head, name=vocabulary.head)
        return False
    if head is None:
        entry = base.tensors[vocabulary.embedding]
        if embedding is not None and (embedding.blocks or embedding.token_rows):
            entry = embedding.source  # the base's own, or its grown copy that PEFT saved
        dtype = base.tensors[vocabulary.embedding].dtype
        head = PlannedTensor(vocabulary.head, dtype, entry.shape, entry)
    if embedding is not None and embedding.token_rows is not None and head.token_rows is None:
        head = _with_token_rows(head, embedding)
    planned[vocabulary.head] = replace(head, name=vocabulary.head)
    return True


def _with_token_rows(head: PlannedTensor, embedding: PlannedTensor) -> PlannedTensor:
    """Set the trained token rows in the head too, below its own adapter, as PEFT computes."""
    if not head.is_additive:
        raise LlmtuneError(
            f"the adapter trains single token rows of the tied embedding and changes the head "
            f"{head.name!r} not as a plain delta ({head.change}), which merging does not combine"
        )
    return replace(head, token_rows=embedding.token_rows, token_indices=embedding.token_indices)


def _are_one(head: PlannedTensor, embedding: PlannedTensor) -> bool:
    if head.blocks or embedding.blocks or head.token_indices != embedding.token_indices:
        return False
    pairs = [(head.source, embedding.source)]
    if head.token_rows is not None and embedding.token_rows is not None:
        pairs.append((head.token_rows, embedding.token_rows))
    return all(have_same_bytes(one, other) for one, other in pairs)


def _grown_vocabulary(
    base: CheckpointIndex, vocabulary: _Vocabulary, planned: Mapping[str, PlannedTensor]
) -> int | None:
    """Return the rows of a vocabulary that the adapter grew; None if it did not."""
    rows = {
        name: planned[name].shape[0] if name in planned else base.tensors[name].shape[0]
        for name in (vocabulary.embedding, vocabulary.head)
        if name in planned or name in base.tensors
    }
    if len(set(rows.values())) > 1:
        raise LlmtuneError(
            "the adapter grew the vocabulary in one of two tensors only: "
            + ", ".join(f"{name!r} would have {number} rows" for name, number in rows.items())
            + "; save the adapter with both (`save_embedding_layers=True`)"
        )
    num_rows = rows[vocabulary.embedding]
    if num_rows == base.tensors[vocabulary.embedding].shape[0]:
        return None
    return num_rows
