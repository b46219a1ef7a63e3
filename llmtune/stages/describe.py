"""What was loaded and what was adapted, in lines for the terminal."""

from collections.abc import Iterator

from llmtune.adapters.inject import InjectionTable
from llmtune.io.sizes import MIB
from llmtune.models.load import LoadedModel
from llmtune.models.quantization import QuantizationTable

MILLION = 1e6


def describe_loaded(loaded: LoadedModel) -> Iterator[str]:
    """Yield device, precision, attention, and what was quantized and what was not."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    yield f"base: {loaded.source.origin} on {loaded.device}, {dtype}, attention {loaded.attention}"
    if loaded.quantized.method != "none":
        yield from describe_quantized(loaded.quantized)
    yield from loaded.notices


def describe_quantized(table: QuantizationTable) -> Iterator[str]:
    """Yield one line for each group of like-named weights, largest memory first."""
    yield (
        f"quantized: {table.quantized_ratio:.1%} of {table.num_parameters / MILLION:.1f} million "
        f"weights to {table.method}, {table.bytes / MIB:.1f} MiB in all"
    )
    for row in table.rows:
        yield (
            f"  {row.kind:<9} {row.count:>4} x {row.pattern}, "
            f"{row.num_parameters / MILLION:.1f} million, {row.bytes / MIB:.1f} MiB"
        )


def describe_injected(table: InjectionTable) -> Iterator[str]:
    """Yield what got an adapter of which rank, and the trainable share."""
    yield (
        f"adapter: {table.method}, {table.trainable_parameters:,} trainable parameters, "
        f"{table.trainable_ratio:.2%} of the base; "
        f"{table.adapted_ratio:.0%} of the linear layers' weights are adapted"
    )
    for row in table.rows:
        settings = "".join(f"{name} {value:g}, " for name, value in row.settings.items())
        yield f"  {row.count:>4} x {row.pattern}, {settings}{row.num_parameters:,} parameters"
    yield from (f"  whole: {name}" for name in table.saved_modules)
    yield from table.notices
