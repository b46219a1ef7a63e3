"""Export a directory for Ollama: a GGUF file, a Modelfile and a model card."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.exporting.base import DirectoryExporter, Written
from llmtune.exporting.gguf import GgufModelExporter
from llmtune.io.fingerprint import JsonObject

if TYPE_CHECKING:
    from llmtune.exporting.export import ExportJob

MODELFILE_NAME = "Modelfile"


class OllamaExporter(GgufModelExporter, DirectoryExporter):
    """A merged model as a GGUF file with its chat template in Ollama's language."""

    name = "ollama"
    product = "directory that --to ollama made"

    def output_name(self, stem: str) -> str:
        """Return the name of the directory."""
        return stem

    def write(self, job: "ExportJob", path: Path) -> Written:
        """Write the model and the Modelfile; a template that cannot be repeated is seen first."""
        from llmtune.exporting.modelfile import modelfile_of

        file_name = _file_name(job)
        modelfile = modelfile_of(job.model, file_name)
        details = self.write_model(job, path / file_name, job.out / file_name)
        (path / MODELFILE_NAME).write_text(modelfile, encoding="utf-8")
        files = {file_name: f"the model in {job.type}", MODELFILE_NAME: "for `ollama create`"}
        return Written(details, files)

    def check(self, job: "ExportJob", path: Path, written: Written) -> JsonObject:
        """Compare the file with the merged model."""
        return self.check_model(job, path / _file_name(job), written)


def _file_name(job: "ExportJob") -> str:
    return f"{job.name}-{job.type}.gguf"
