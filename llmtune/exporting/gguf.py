"""Export one GGUF file, for llama.cpp and the programs built on it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import LlmtuneError
from llmtune.exporting.base import (
    ExportOption,
    ExportSettings,
    FileExporter,
    WritingExporter,
    Written,
)
from llmtune.exporting.gguf_writer.types import (
    DEFAULT_TYPE,
    GGUF_TYPES,
    QUANTIZER_TYPES,
    require_quantizer,
)
from llmtune.io.fingerprint import JsonObject
from llmtune.io.gguf_head import is_gguf
from llmtune.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from llmtune.exporting.export import ExportJob

log = logging.getLogger("llmtune")


class GgufModelExporter(WritingExporter):
    """What the exporters of a whole model in a GGUF file have in common."""

    types = GGUF_TYPES
    default_type = DEFAULT_TYPE
    has_type_of_run = True
    options = (
        ExportOption(
            "runtime",
            "Compare with llama.cpp itself (default: if it is installed).",
            "switch",
        ),
        ExportOption("max_kl", "Largest KL that passes, in nats per token.", "limit"),
        ExportOption(
            "converter",
            "llama.cpp's convert_hf_to_gguf.py or its directory: writes families llmtune does not.",
            "text",
        ),
    )

    def choose_type(self, type: str | None) -> str | None:
        """Return the type to write.

        Raises:
            LlmtuneError: the type is unknown, or llama.cpp's quantizer makes it and is not here.
        """
        chosen = super().choose_type(type)
        if chosen in QUANTIZER_TYPES:
            require_quantizer(chosen)
        return chosen

    def find_route(self, base: Checkpoint, settings: ExportSettings) -> str:
        """Return who writes the file: llmtune its own families, the converter all others.

        Raises:
            LlmtuneError: llama.cpp would not compute this model as transformers does; or llmtune
                does not write its family, and there is no converter that does, or nothing to check
                its file with.
        """
        from llmtune.exporting.gguf_writer.converter import try_converter
        from llmtune.exporting.gguf_writer.vocabulary import check_convertible

        converter = settings.options.get("converter")
        if converter is None or _is_own_family(base):
            check_convertible(base)
            return super().find_route(base, settings)
        _require_check(settings.options)
        type = self.choose_type(settings.type)
        assert type is not None
        return try_converter(base, type, converter)

    def write_model(self, job: "ExportJob", path: Path, out: Path) -> JsonObject:
        """Write the GGUF file `path`, which will be `out`; return the result as JSON."""
        from llmtune.exporting.gguf_writer.write import GgufRequest, write_model

        assert job.type is not None
        converter = job.option("converter")
        if converter is not None:
            family = job.model.model_type
            if not _is_own_family(job.model):
                log.info("export: llmtune does not write %s models, %s does", family, converter)
                return {**self._convert(job, path, converter), "path": str(out)}
            log.info("export: llmtune writes %s models itself, not %s", family, converter)
        result = write_model(
            GgufRequest(job.model, path, job.type, job.name, job.provenance(job.model))
        )
        log.info("export: %s, %d bytes, %.1f s", job.type, result.num_bytes, result.seconds)
        return {**result.to_dict(), "path": str(out)}

    def _convert(self, job: "ExportJob", path: Path, converter: str) -> JsonObject:
        """Let llama.cpp's converter write the file, if llama.cpp is here to check it."""
        from llmtune.exporting.gguf_writer.converter import convert

        assert job.type is not None
        _require_check(job.settings.options)
        return convert(job.model, path, job.type, converter)

    def check_model(self, job: "ExportJob", path: Path, written: Written) -> JsonObject:
        """Compare the file with the model in llama.cpp, if asked for or if it is installed."""
        from llmtune.checks.parity import compare_file, require_parity
        from llmtune.checks.runtime import wants_runtime

        if not wants_runtime(job.option("runtime")):
            return {"parity": None}
        assert job.type is not None
        parity = compare_file(job.model, path, trust_remote_code=job.source.model.trust_remote_code)
        require_parity(parity, job.type, job.out, max_kl=job.option("max_kl"))
        notices = (*written.notices, *parity.notices)
        return {"notices": notices, "parity": parity.to_dict()}


def _is_own_family(model: Checkpoint) -> bool:
    """Whether llmtune writes this family itself: what it refuses of it no converter is given."""
    from llmtune.exporting.gguf_writer.architectures import ARCHITECTURES

    return model.model_type in ARCHITECTURES


def _require_check(options: Mapping[str, Any]) -> None:
    """Check that llama.cpp is here to check what its converter writes, unless that is waived.

    Raises:
        LlmtuneError: it is not installed.
    """
    from llmtune.checks.runtime import is_runtime_installed

    if options.get("runtime") is None and not is_runtime_installed():
        raise LlmtuneError(
            "converter: what it writes is only known to be right once llama.cpp has answered "
            "from it, and llama.cpp is not installed (pip install xllamacpp); or take the file "
            "unchecked: llmtune export RUN --to gguf --converter PATH --no-runtime"
        )


class GgufExporter(GgufModelExporter, FileExporter):
    """A merged model as one GGUF file."""

    name = "gguf"
    product = "GGUF file"

    def output_name(self, stem: str) -> str:
        """Return the name of the file."""
        return f"{stem}.gguf"

    def is_own(self, out: Path) -> bool:
        """Whether a GGUF file is there."""
        return is_gguf(out)

    def write(self, job: "ExportJob", path: Path) -> Written:
        """Write the merged model."""
        return Written(self.write_model(job, path, job.out))

    def check(self, job: "ExportJob", path: Path, written: Written) -> JsonObject:
        """Compare the file with the merged model."""
        return self.check_model(job, path, written)
