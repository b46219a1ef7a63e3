"""Export a directory that stock transformers loads in 4 bits (bitsandbytes NF4)."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.exporting.base import DirectoryExporter, Written
from llmtune.io.fingerprint import JsonObject
from llmtune.models.quantization.config import SMALLEST

if TYPE_CHECKING:
    from llmtune.exporting.export import ExportJob


class Nf4Exporter(DirectoryExporter):
    """A merged model in NF4 with double quantization."""

    name = SMALLEST.method
    product = f"directory that --to {SMALLEST.method} made"

    def output_name(self, stem: str) -> str:
        """Return the name of the directory."""
        return self.name

    def write(self, job: "ExportJob", path: Path) -> Written:
        """Quantize the merged model and save it."""
        from llmtune.exporting.nf4_checkpoint import write_nf4

        result = write_nf4(job.model, path, trust_remote_code=_trusts(job))
        files = {"model.safetensors": "the model in 4 bits (bitsandbytes NF4)"}
        return Written(
            {"num_bytes": result.num_bytes, "quantized_ratio": result.quantized_ratio},
            files,
            live=result.live,
        )

    def check(self, job: "ExportJob", path: Path, written: Written) -> JsonObject:
        """Reload the checkpoint and compare it with the model that was saved."""
        from llmtune.exporting.nf4_checkpoint import check_reloaded

        assert written.live is not None
        reloaded = check_reloaded(written.live, path, trust_remote_code=_trusts(job))
        return {"reloaded": asdict(reloaded)}


def _trusts(job: "ExportJob") -> bool:
    return job.source.model.trust_remote_code
