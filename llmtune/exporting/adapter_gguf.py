"""Export an adapter alone as a GGUF file, for llama.cpp to apply on a GGUF of the base."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.exporting.base import ExportSettings, FileExporter, Written
from llmtune.exporting.gguf_writer.types import ADAPTER_TYPES, DEFAULT_ADAPTER_TYPE
from llmtune.io.fingerprint import JsonObject
from llmtune.io.gguf_head import is_gguf
from llmtune.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from llmtune.exporting.export import ExportJob


class AdapterGgufExporter(FileExporter):
    """A LoRA adapter as one GGUF file."""

    name = "adapter-gguf"
    made_from = "adapter"
    types = ADAPTER_TYPES
    default_type = DEFAULT_ADAPTER_TYPE
    product = "GGUF file"

    def find_route(self, base: Checkpoint, settings: ExportSettings) -> str:
        """Check that llama.cpp computes this base, and has its tokenizer."""
        from llmtune.exporting.gguf_writer.vocabulary import check_convertible

        check_convertible(base)
        return super().find_route(base, settings)

    def output_name(self, stem: str) -> str:
        """Return the name of the file."""
        return f"{stem}-adapter.gguf"

    def is_own(self, out: Path) -> bool:
        """Whether a GGUF file is there."""
        return is_gguf(out)

    def write(self, job: "ExportJob", path: Path) -> Written:
        """Write the adapter, if it was trained on this base."""
        from llmtune.adapters.manifest import adapter_fingerprint, check_adapter
        from llmtune.exporting.gguf_writer.adapter import write_adapter_gguf

        assert job.type is not None
        adapter_dir, base = job.adapter_dir, job.base
        self.find_route(base, job.settings)
        check_adapter(adapter_dir, base_fingerprint=base.fingerprint)
        provenance = {
            **job.provenance(base),
            "llmtune.adapter": adapter_fingerprint(adapter_dir),
        }
        result = write_adapter_gguf(adapter_dir, base, path, type=job.type, provenance=provenance)
        return Written({**result.to_dict(), "path": str(job.out)})

    def check(self, job: "ExportJob", path: Path, written: Written) -> JsonObject:
        """Add nothing: the head was read back when it was written, and no model is compared."""
        return {"parity": None}
