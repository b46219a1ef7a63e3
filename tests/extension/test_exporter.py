"""A new exporter is one new file and one entry in the tuple of exporters."""

import json

from safetensors import safe_open

from tests.extension.house import House
from tests.project import make_project

EXPORTER = '''
"""Export a merged model as one safetensors file in a chosen type."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import CheckFailed
from llmtune.exporting.base import ExportOption, FileExporter, Written

if TYPE_CHECKING:
    from llmtune.exporting.export import ExportJob


class SafetensorsExporter(FileExporter):
    """A merged model as one file of tensors."""

    name = "safetensors"
    types = ("float16", "float32")
    default_type = "float32"
    has_type_of_run = True
    product = "safetensors file"
    options = (ExportOption("max_rounding", "Largest error of a number.", "limit"),)

    def output_name(self, stem: str) -> str:
        """Return the name of the file."""
        return f"{stem}.safetensors"

    def is_own(self, out: Path) -> bool:
        """Whether such a file is there."""
        return out.suffix == ".safetensors"

    def write(self, job: "ExportJob", path: Path) -> Written:
        """Convert every tensor and save it."""
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(job.model.directory / "model.safetensors")
        dtype = getattr(torch, job.type)
        save_file({name: one.to(dtype) for name, one in tensors.items()}, path)
        return Written({"num_bytes": path.stat().st_size, "path": str(job.out)})

    def check(self, job: "ExportJob", path: Path, written: Written) -> Mapping[str, Any]:
        """Compare every number with the merged model's."""
        from safetensors.torch import load_file

        found, expected = load_file(path), load_file(job.model.directory / "model.safetensors")
        largest = max(
            (found[name].float() - one.float()).abs().max().item()
            for name, one in expected.items()
        )
        limit = job.option("max_rounding")
        if largest > (0.01 if limit is None else limit):
            raise CheckFailed(f"{job.out}: a number is off by {largest}; the file was removed")
        return {"largest_error": largest}
'''


PROGRAM = """
from pathlib import Path

import llmtune
from llmtune.cli import run_command

config = llmtune.load_config(Path({config!r}))
llmtune.train(config)
llmtune.merge(config)
llmtune.export(config)
command = ["export", {run!r}, "--to", "safetensors"]
assert run_command(command) == 0
command += ["--type", "float16", "--out", {rounded!r}]
assert run_command([*command, "--max-rounding", "0"]) == 1
"""


def dtypes(path):
    with safe_open(path, "np") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_a_new_exporter_is_made_by_runs_and_by_the_command(tmp_path):
    house = House(tmp_path / "house")
    house.add("exporting/safetensors.py", EXPORTER)
    house.enter(
        "exporting/config.py",
        {
            "from llmtune.schema import": (
                "from llmtune.exporting.safetensors import SafetensorsExporter\n"
                "from llmtune.schema import"
            ),
            "    HubExporter(),\n": "    HubExporter(),\n    SafetensorsExporter(),\n",
        },
    )
    config = make_project(tmp_path / "project", export={"to": ["safetensors"], "type": "float16"})
    run = tmp_path / "project" / "run"
    rounded = tmp_path / "rounded.safetensors"
    house.execute(PROGRAM.format(config=str(config), run=str(run), rounded=str(rounded)), tmp_path)

    of_run = run / "exports" / "run-float16.safetensors"
    assert dtypes(of_run) == {"F16"}
    record = json.loads((run / "manifest.json").read_text())["stages"]["export safetensors"]
    assert record["result"]["out"] == str(of_run.relative_to(run))
    assert record["result"]["largest_error"] < 0.01
    assert dtypes(run / "exports" / "run-float32.safetensors") == {"F32"}
    assert not rounded.exists()
