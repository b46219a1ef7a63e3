"""Cutting a tensor into tiles: a few rows at a time, whatever the model's size."""

from collections.abc import Iterator

from llmtune.merging.changes import Block, PlannedTensor

# 512 Ki numbers: 2 MiB in float32, which a core's own cache holds from step to step. A thread then
# keeps about 7 MiB, whatever the model's size.
TILE_ELEMENTS = 1 << 19

# A matrix product's rows come out bit-equal to those of the whole product as long as a tile begins
# at a multiple of the BLAS kernel's height and no tile is thinner than it (16 rows on every x86
# kernel of MKL that was tried; a tile of 1 to 15 rows takes another kernel and differs). And a
# tile's first number then begins a block of 64 that is quantized with one scale.
ROW_ALIGNMENT = 64


def iter_tiles(tensor: PlannedTensor) -> Iterator[tuple[Block, int, int]]:
    """Yield (block, first row, number of rows) over the table; the last tile of a block is longest.

    A block is one stretch of rows that share their deltas; a tensor without one is a single block.
    """
    height = max(1, TILE_ELEMENTS // max(1, tensor.num_columns) // ROW_ALIGNMENT) * ROW_ALIGNMENT
    for block in tensor.blocks or (Block(0, tensor.num_rows),):
        num_tiles = max(1, block.num_rows // height)
        for index in range(num_tiles):
            first = index * height
            last = block.num_rows if index == num_tiles - 1 else first + height
            yield block, block.first_row + first, last - first
