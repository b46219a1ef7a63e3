"""What several cards bring: memory on each, bytes between them, and how much faster a step is.

Data parallel training keeps the whole base on every card and adds up the adapter's gradients once a
step. `batch_size` is that of all cards together, so a card's share of a step shrinks. With
`train.shard` each card keeps a part of every layer, and receives the rest twice a micro-batch.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace

from llmtune.io.fingerprint import JsonObject
from llmtune.io.sizes import format_size
from llmtune.models.quantization.config import SMALLEST
from llmtune.planning.estimate import FLOAT32, MemoryEstimate
from llmtune.planning.rows import RowFacts
from llmtune.planning.shape import ModelShape
from llmtune.planning.workload import PlanRequest, count_steps, plan_memory_of

GIGA = 1e9
ASSUMED_LINKS = {False: (20.0, "PCIe 4.0"), True: (10.0, "100 Gbit/s between machines")}
"""By whether there are several machines: usable GB/s of a card's slowest link, and what it is."""
BUFFER = "reduction buffer"
MOST_SHARDS = 64
"""Cards that a base is planned to be sharded over at most, if a step has fewer rows."""


@dataclass(frozen=True)
class Spread:
    """How many cards there are, and what is known of them."""

    gpus: int
    """On each machine."""
    nodes: int = 1
    link: float | None = None
    """GB/s of a card's slowest link to the others; None is assumed."""
    step_seconds: float | None = None
    """Of one card, measured; None is the plan's own estimate."""

    @property
    def cards(self) -> int:
        """Return the cards of all machines."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Scaling:
    """What a number of cards brings to one run."""

    spread: Spread
    batch_size: int
    reduced_bytes: int
    """The adapter's gradients in float32: what all cards add up once a step."""
    sent_bytes: int
    """That each card sends for it, and receives, in a ring."""
    link: float
    link_source: str
    one_card_seconds: float
    """Of a step."""
    step_source: str
    smallest: int | None
    """Cards with which it fits; None if no number is enough."""
    way: str | None
    """What would make it fit if no number of cards does."""
    gathered_bytes: int = 0
    """Of the other cards' parts of a sharded base: what each card receives in a step."""

    @property
    def rows_a_card(self) -> int:
        """Return the rows of a step that the busiest card gets, if rows are alike."""
        return math.ceil(self.batch_size / self.spread.cards)

    @property
    def reduction_seconds(self) -> float:
        """Return how long a step's reduction takes on this link, not overlapped."""
        return self.sent_bytes / (self.link * GIGA)

    @property
    def gather_seconds(self) -> float:
        """Return how long a step's layers take on this link."""
        return self.gathered_bytes / (self.link * GIGA)

    @property
    def step_seconds(self) -> float:
        """Return the time of a step on all cards: a layer is fetched while the one before runs."""
        share = self.rows_a_card / self.batch_size
        return max(self.one_card_seconds * share, self.gather_seconds) + self.reduction_seconds

    @property
    def speedup(self) -> float:
        """Return how many times as fast a step is as on one card."""
        return self.one_card_seconds / self.step_seconds

    def as_json(self) -> JsonObject:
        """Return everything as JSON values; bytes and seconds."""
        return {
            "gpus": self.spread.gpus,
            "nodes": self.spread.nodes,
            "cards": self.spread.cards,
            "rows_a_card": self.rows_a_card,
            "reduced_bytes": self.reduced_bytes,
            "sent_bytes": self.sent_bytes,
            "link_gb_per_second": self.link,
            "link_source": self.link_source,
            "one_card_step_seconds": self.one_card_seconds,
            "step_source": self.step_source,
            "step_seconds": self.step_seconds,
            "reduction_seconds": self.reduction_seconds,
            "gathered_bytes": self.gathered_bytes,
            "gather_seconds": self.gather_seconds,
            "speedup": self.speedup,
            "efficiency": self.speedup / self.spread.cards,
            "smallest_cards": self.smallest,
            "way": self.way,
        }

    def lines(self) -> list[str]:
        """Return what is said of it, a line each."""
        cards, rows = self.spread.cards, self.rows_a_card
        machines = f" on {self.spread.nodes} machines" if self.spread.nodes > 1 else ""
        kept = f"1/{cards} of the base's layers" if self.gathered_bytes else "the whole base"
        said = [
            f"cards        {cards}{machines}, each with {kept} and {rows} of the "
            f"{self.batch_size} rows of a step; memory above is one card's",
            f"traffic      {format_size(self.reduced_bytes)} of gradients are added up once a "
            f"step: {format_size(self.sent_bytes)} sent by each card, "
            f"{1000 * self.reduction_seconds:.3g} ms at {self.link:g} GB/s ({self.link_source})",
            f"scaling      {self.speedup:.3g} times one card "
            f"({self.speedup / cards:.0%} of {cards}): a step {self.one_card_seconds:.3g} -> "
            f"{self.step_seconds:.3g} s ({self.step_source}); computed, not measured",
        ]
        if self.gathered_bytes:
            said.insert(
                2,
                f"layers       {format_size(self.gathered_bytes)} of the others' parts are "
                f"received by each card in a step, {self.gather_seconds:.3g} s, while it computes",
            )
        if cards > self.batch_size:
            said.append(f"             {cards - self.batch_size} cards have no row in a step")
        if self.smallest is None:
            said.append(f"smallest     no number of cards fits: {self.way}")
        else:
            said.append(f"smallest     fits on {self.smallest} card{'s'[: self.smallest > 1]}")
        return said


def plan_card(
    request: PlanRequest, shape: ModelShape, rows: RowFacts, cards: int, *, parameters: int
) -> MemoryEstimate:
    """Return the memory of one of `cards` cards.

    Args:
        parameters: of the adapter; with several cards their gradients are in one buffer, too.
    """
    if cards == 1:
        return plan_memory_of(request, shape, rows)
    share = math.ceil(request.train.batch_size / cards)
    steps, _ = count_steps(request.train, rows)  # those of all cards, with the whole batch
    train = request.train.model_copy(update={"batch_size": share, "max_steps": steps})
    step = max(math.ceil(rows.largest_step / cards), rows.longest)
    buffer = FLOAT32 * parameters
    device = replace(request.device, memory_bytes=max(request.device.memory_bytes - buffer, 0))
    smaller = replace(request, train=train, device=device, cards=cards)
    found = plan_memory_of(smaller, shape, replace(rows, largest_step=step))
    return replace(
        found,
        components={**found.components, BUFFER: buffer},
        memory_bytes=request.device.memory_bytes,
    )


def plan_scaling(
    request: PlanRequest,
    shape: ModelShape,
    rows: RowFacts,
    spread: Spread,
    *,
    parameters: int,
    estimated: tuple[float, str],
) -> Scaling:
    """Say what the cards bring.

    Args:
        parameters: of the adapter.
        estimated: seconds of a step on one card, and where they are from.
    """
    reduced = FLOAT32 * parameters
    link, link_source = ASSUMED_LINKS[spread.nodes > 1]
    if spread.link is not None:
        link, link_source = spread.link, "given"
    else:
        link_source = f"assumed: {link_source}"
    seconds, step_source = estimated
    if spread.step_seconds is not None:
        seconds, step_source = spread.step_seconds, "given"
    smallest = _smallest(request, shape, rows, parameters)
    gathered = 0.0
    if request.train.shard == "full" and spread.cards > 1:
        rows_a_card = math.ceil(request.train.batch_size / spread.cards)
        tokens = plan_card(request, shape, rows, spread.cards, parameters=parameters).tokens
        micro_batches = math.ceil(rows_a_card * rows.mean / tokens)
        element_bytes = 4 if request.model.dtype == "float32" else 2
        received = element_bytes * shape.layer_parameters * (spread.cards - 1) / spread.cards
        gathered = 2 * micro_batches * received
    return Scaling(
        spread=spread,
        batch_size=request.train.batch_size,
        reduced_bytes=reduced,
        sent_bytes=round(2 * (spread.cards - 1) / spread.cards * reduced),
        link=link,
        link_source=link_source,
        one_card_seconds=seconds,
        step_source=step_source,
        smallest=smallest,
        way=None if smallest else _other_way(request, shape, rows, spread.cards, parameters),
        gathered_bytes=round(gathered),
    )


def _smallest(
    request: PlanRequest, shape: ModelShape, rows: RowFacts, parameters: int
) -> int | None:
    """Return the fewest cards that fit: from two on, each has less to hold the more there are."""
    most = request.train.batch_size
    if request.train.shard == "full":
        most = max(most, MOST_SHARDS)

    def fits(cards: int) -> bool:
        return plan_card(request, shape, rows, cards, parameters=parameters).fits

    if fits(1):
        return 1
    several = range(2, most + 1)
    found = bisect_left(several, True, key=fits)
    return several[found] if found < len(several) else None


def _other_way(
    request: PlanRequest, shape: ModelShape, rows: RowFacts, cards: int, parameters: int
) -> str:
    memory = plan_card(request, shape, rows, cards, parameters=parameters)
    base = memory.components["base"]
    if request.train.shard == "full":
        most = max(MOST_SHARDS, request.train.batch_size)
        return (
            f"even over {most} cards a part of the base and what is computed with it take more "
            "than one has; shorten rows, or lower the rank"
        )
    said = f"the base takes {format_size(base)}, and each card holds all of it"
    quantized = replace(request, model=request.model.model_copy(update={"quantization": SMALLEST}))
    is_larger = request.model.storage.bits > SMALLEST.bits
    if is_larger and plan_card(quantized, shape, rows, 1, parameters=parameters).fits:
        return f"{said}; with model.quantization='{{method: {SMALLEST.method}}}' one card is enough"
    keys = "train.shard=full" + (
        " model.quantization=null" if request.model.storage.is_quantized else ""
    )
    dense = request.model.model_copy(update={"quantization": None})
    sharded = replace(
        request, model=dense, train=request.train.model_copy(update={"shard": "full"})
    )
    needed = _smallest(sharded, shape, rows, parameters)
    if needed is None:
        return f"{said}, and without it there is no room either; shorten rows or lower the rank"
    return f"{said}; with {keys} each holds a part, which fits on {needed} cards"
