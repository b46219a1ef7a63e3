"""What an adapter's tensors do to one weight of the base: planned without weights, done by tiles.

A method describes its change of a weight as a `WeightUpdate`, plain data that is made from headers
alone. Merging reads the base a few rows at a time and hands them to the update.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from llmtune.io.safetensors import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """What one saved tensor is: a named part of one module's adapter."""

    module: str
    """Its path in the model in memory; a wrapped expert parameter keeps `.base_layer`."""
    name: str
    """The method's own word for it, such as A."""


@dataclass(frozen=True)
class ModuleTensors:
    """The saved tensors of one adapted module."""

    module: str
    parts: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def first(self) -> TensorEntry:
        """The first of its tensors in the file: what messages name."""
        return next(iter(self.parts.values()))


class Widths(NamedTuple):
    """The widths of the adapted layer as far as its adapter's tensors show them."""

    num_out: int | None
    num_in: int | None
    is_table: bool = False
    """An embedding, which stores [in, out]: a row for each token."""


@dataclass(frozen=True)
class Place:
    """The base tensor that a module's adapter changes, or the part of a stack that it holds."""

    key: str
    """The adapted module's or parameter's name in memory, which a config's patterns match."""
    num_out: int
    """How many of the layer's outputs this tensor holds."""
    num_in: int
    is_transposed: bool = False
    """The tensor is stored [in, out]."""
    has_bias: bool = False
    """The layer has a bias in the base."""
    expert: int = 0
    num_experts: int = 1
    first_out: int = 0
    """The first of the layer's outputs that this tensor holds."""
    is_interleaved: bool = False
    """The first and the second half of the outputs take turns in the tensor."""


class Factors(NamedTuple):
    """The low-rank form of a module's update: `scaling * B @ A`."""

    a: TensorEntry  # [rank, in]; of an embedding [rank, rows of the table]
    b: TensorEntry  # [out, rank]
    scaling: float
    is_embedding: bool = False


class Workspace(Protocol):
    """Where an update gets its tensors and its memory from."""

    def load(self, entry: TensorEntry) -> "Tensor":
        """Return one of the update's own tensors, whole, in float32."""

    def scratch(self, num_rows: int, num_columns: int) -> "Tensor":
        """Return memory for a float32 table; it is valid until the thread's next call."""


@dataclass(frozen=True)
class WeightUpdate(ABC):
    """One adapter's change of one base tensor (or of one expert's rows of it).

    A tensor is seen as a table [rows, columns]: [out, in], or [in, out] if it is stored so.
    """

    word: ClassVar[str]
    """What happens to the tensor, for the plan's table."""

    @property
    @abstractmethod
    def entries(self) -> tuple[TensorEntry, ...]:
        """The saved tensors that `apply` loads."""

    @property
    def strength(self) -> float:
        """How much of the update is wanted; 1 is all of it."""
        return 1.0

    def describe(self) -> Mapping[str, float | str] | None:
        """Return it as JSON for the plan, or None if its word says all.

        All values but `tensor` are numbers; `weight` is the strength.
        """
        return None

    def survey(self, tiles: "Iterable[Tensor]", work: Workspace) -> "Tensor | None":
        """Return what all rows must be seen for before any is changed; None if nothing.

        Args:
            tiles: the base's rows in float32, in order; each is valid until the next.
            work: where tensors and memory come from.
        """
        return None

    @abstractmethod
    def apply(
        self, rows: "Tensor", first_row: int, work: Workspace, surveyed: "Tensor | None"
    ) -> None:
        """Change some rows of the base in place, in float32, by the full update.

        Args:
            rows: the base's rows [n, columns].
            first_row: the number of the first among those that the update covers.
            work: where tensors and memory come from.
            surveyed: what `survey` returned.
        """

    def merge(
        self, rows: "Tensor", first_row: int, work: Workspace, surveyed: "Tensor | None"
    ) -> None:
        """Change some rows in place to base + strength * (updated - base)."""
        if self.strength == 1:
            self.apply(rows, first_row, work, surveyed)
            return
        base = rows.clone()
        self.apply(rows, first_row, work, surveyed)
        rows.copy_(base + self.strength * (rows - base))


class AdditiveUpdate(WeightUpdate):
    """An update whose result is W + strength * D for a D that does not depend on W.

    Only such updates of several adapters can be combined in one weight.
    """

    @abstractmethod
    def delta(
        self, first_row: int, num_rows: int, work: Workspace, *, strength: float = 1.0
    ) -> "Tensor":
        """Return some rows of strength * D; they are valid until the thread's next call."""

    def apply(
        self, rows: "Tensor", first_row: int, work: Workspace, surveyed: "Tensor | None"
    ) -> None:
        """Add the whole delta."""
        rows += self.delta(first_row, rows.shape[0], work)

    def merge(
        self, rows: "Tensor", first_row: int, work: Workspace, surveyed: "Tensor | None"
    ) -> None:
        """Add strength times the delta."""
        rows += self.delta(first_row, rows.shape[0], work, strength=self.strength)
