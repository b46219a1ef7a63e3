"""A base that comes with its own Python code: trusted in one place, it goes through every stage."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from llmtune.cli import run_command
from tests.project import make_project

CONFIG_CODE = """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tiny_custom"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 0.5 * outputs.logits  # what no class of transformers does
        return outputs
"""
SHORT = ("train.max_steps=2", "evaluate.limit=2")
TRUSTED = "model.trust_remote_code=true"


def make_custom(directory):
    """Write a project whose base is a model type that transformers does not know."""
    path = make_project(directory)
    base = directory / "base"
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "tiny_custom",
        "architectures": ["TinyForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tiny.TinyConfig",
            "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
        },
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "configuration_tiny.py").write_text(CONFIG_CODE)
    (base / "modeling_tiny.py").write_text(MODEL_CODE)
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    directory = tmp_path_factory.mktemp("custom")
    path = make_custom(directory)
    for command in ("train", "merge"):
        assert run_command([command, str(path), *SHORT, TRUSTED, "-q"]) == 0
    return directory


def test_every_stage_of_a_run_trusts_what_its_config_trusts(project):
    manifest = json.loads((project / "run" / "manifest.json").read_text())
    check = manifest["stages"]["merge"]["result"]["check"]
    assert check["base_kl"] > 0
    assert check["kl"] <= 1e-4 * check["base_kl"]


def test_verify_runs_the_code_of_a_trusted_base_alone(project, capsys):
    merged, adapter = str(project / "run" / "merged"), str(project / "run" / "adapter")
    assert run_command(["verify", merged, "--against", str(project / "run")]) == 0
    assert run_command(["verify", merged, "--against", adapter, TRUSTED]) == 0
    capsys.readouterr()
    assert run_command(["verify", merged, "--against", adapter]) == 2
    assert "model.trust_remote_code=true" in capsys.readouterr().err


def test_a_4_bit_export_of_a_trusted_base_is_checked(project):
    out = project / "nf4"
    assert run_command(["export", str(project / "run"), "--to", "nf4", "--out", str(out)]) == 0
    assert run_command(["verify", str(out), "--against", str(project / "run")]) == 0


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_several_adapters_of_a_trusted_base_are_merged(project, tmp_path, capsys, method):
    adapter, other, out = project / "run" / "adapter", tmp_path / "other", tmp_path / "out"
    shutil.copytree(adapter, other)
    weights = other / "adapter_model.safetensors"
    save_file({name: -2 * one for name, one in load_file(weights).items()}, weights)
    (other / "llmtune_adapter.json").unlink()  # as of any other tool: its hash is not known
    both = ["--adapters", f"{adapter}=0.6", "--adapters", f"{other}=0.1"]
    options = ["merge", *both, "--method", method, "--out", str(out)]
    assert run_command(options) == 2
    assert "error: " + str(project / "base") in (said := capsys.readouterr().err)
    assert "set model.trust_remote_code=true" in said
    assert not out.exists()
    assert run_command([*options, TRUSTED]) == 0
