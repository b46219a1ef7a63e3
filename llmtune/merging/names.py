"""From the name of a parameter in the model in memory to the tensor in the checkpoint."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (in memory, in the checkpoint): how transformers 5 renames on loading, tried in this order.
RENAMED_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "embed_out."),  # gpt_neox
    ("transformer.", ""),  # GPT-2's own checkpoints hold the bare decoder
    ("model.", ""),
    ("gpt_neox.", ""),
    ("", "transformer."),
    ("", "model."),
    ("", "gpt_neox."),
)
RENAMED_INFIXES = ((".mlp.", ".block_sparse_moe."),)  # mixtral, minimax

EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEAD_NAMES = ("lm_head", "embed_out")


def find_tensor(name: str, checkpoint: Collection[str]) -> str | None:
    """Return the checkpoint's name for the parameter `name`, or None if it has none."""
    candidates = [name]
    candidates += [name.replace(old, new) for old, new in RENAMED_INFIXES if old in name]
    candidates += [
        new + candidate.removeprefix(old)
        for old, new in RENAMED_PREFIXES
        for candidate in tuple(candidates)
        if candidate.startswith(old)
    ]
    return next((candidate for candidate in candidates if candidate in checkpoint), None)


@dataclass(frozen=True)
class BaseNames:
    """What the base calls its parameters, in memory and in its files."""

    checkpoint: Collection[str]
    stored: Mapping[str, str] = field(default_factory=dict)
    """{parameter in memory: tensor in the checkpoint}, as transformers loads the base."""
    converted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """{parameter in memory: the tensors that transformers makes it of}."""
    interleaved: frozenset[str] = frozenset()
    """Those of one tensor in which the two halves take turns, output by output."""
    parameters: tuple[str, ...] = ()
    """All of them in memory, in the model's order."""
    embedding: str | None = None
    """The input embedding's weight, in memory; None if the model was not asked."""
    head: str | None = None
    """The output head's weight, in memory."""
    transposed: frozenset[str] = frozenset()
    """Modules that say of themselves that they hold stacked weights as [experts, in, out]."""
    zeroed: tuple[int, ...] = ()
    """Rows of the input embedding that are zero in memory, whatever the files hold."""

    @classmethod
    def ask(cls, skeleton: "PreTrainedModel | None", checkpoint: Collection[str]) -> "BaseNames":
        """Ask the model itself; without one, names are guessed."""
        if skeleton is None:
            return cls(checkpoint)
        from llmtune.models.skeleton import parameter_of, stored_names, zeroed_rows

        stored = stored_names(skeleton, checkpoint)
        return cls(
            checkpoint,
            stored.renamed,
            stored.converted,
            stored.interleaved,
            tuple(name for name, _ in skeleton.named_parameters(remove_duplicate=False)),
            parameter_of(skeleton, skeleton.get_input_embeddings()),
            parameter_of(skeleton, skeleton.get_output_embeddings()),
            frozenset(
                name
                for name, module in skeleton.named_modules()
                if getattr(module, "is_transposed", False)
            ),
            zeroed_rows(skeleton),
        )

    def find(self, name: str) -> str | None:
        """Return the checkpoint's name for the parameter `name`, or None if it has none."""
        return self.stored.get(name) or find_tensor(name, self.checkpoint)

    def is_embedding(self, name: str) -> bool:
        """Whether a parameter, named as in memory or in the files, is the input embedding."""
        if self.embedding is None:
            return is_embedding(name)
        return name in (self.embedding, self.find(self.embedding))

    def is_head(self, name: str) -> bool:
        """Whether a parameter, named as in memory or in the files, is the output head."""
        if self.embedding is None:
            return is_head(name)
        return self.head is not None and name in (self.head, self.find(self.head))

    def find_embedding(self) -> str | None:
        """Return the name of the input embedding's tensor."""
        if self.embedding is None:
            return find_embedding(self.checkpoint)
        return self.find(self.embedding)

    def find_heads(self) -> list[str]:
        """Return the names of the tensors that are the output head."""
        return [name for name in self.checkpoint if self.is_head(name)]

    def new_head(self, model_type: str) -> str:
        """Return the name under which an untied head is written into a checkpoint without one.

        Files may lack a prefix that the model has, and then they lack it everywhere.
        """
        return self.head or head_name(model_type)


def find_embedding(checkpoint: Collection[str]) -> str | None:
    """Return the name of the input embedding's weight if there is exactly one."""
    found = [name for name in checkpoint if is_embedding(name)]
    return found[0] if len(found) == 1 else None


def is_embedding(name: str) -> bool:
    """Whether a parameter's name is that of an input embedding's weight."""
    return _module(name) in EMBEDDING_NAMES and name.endswith(".weight")


def is_head(name: str) -> bool:
    """Whether a parameter's name is that of the output head's weight."""
    return _module(name) in HEAD_NAMES and name.endswith(".weight")


def head_name(model_type: str) -> str:
    """Return the name under which a checkpoint of this family holds an untied output head."""
    return "embed_out.weight" if model_type == "gpt_neox" else "lm_head.weight"


def near_misses(name: str, checkpoint: Mapping[str, object]) -> str:
    """Return the checkpoint's names nearest to `name`, for an error's end."""
    close = difflib.get_close_matches(name, checkpoint, n=3, cutoff=0.6)
    if not close:
        return f"the base's tensors are named like {next(iter(checkpoint), 'nothing at all')!r}"
    return "nearest in the base: " + ", ".join(repr(other) for other in close)


def _module(name: str) -> str:
    return name.split(".")[-2] if name.count(".") else ""


def safetensors_name(name: str) -> str:
    """Return the file name that a pickled shard's content has as safetensors."""
    if not name.endswith(".bin"):
        return name
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
