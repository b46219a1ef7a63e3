"""An export that fills its disk ends in one sentence, and leaves nothing there."""

import subprocess

import pytest

from llmtune.errors import LlmtuneError
from llmtune.exporting.nf4_checkpoint import SMALL_FILES_BYTES, needed_bytes, write_nf4
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.quantization.nf4 import Nf4Quantization
from llmtune.models.resolve import resolve_base
from tests.exporting.exports import export_model
from tests.tiny import make_model


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("to", ["gguf", "ollama", "nf4"])
def test_a_disk_that_is_too_small_is_refused_before_a_model_is_loaded(to, tmp_path, monkeypatch):
    make_model("llama", tmp_path / "model")
    monkeypatch.setattr("llmtune.io.unfinished.free_bytes", lambda _: 5000)
    monkeypatch.setattr(
        "llmtune.exporting.nf4_checkpoint.load_model", lambda *_: pytest.fail("was loaded")
    )
    with pytest.raises(LlmtuneError, match=r"needs [\d,]+ bytes and its disk has 5,000 free"):
        export_model(tmp_path / "model", to, tmp_path / "small" / "out", runtime=False)
    assert list((tmp_path / "small").iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_nf4_is_said_to_need_is_what_it_writes(family, tmp_path):
    base = tmp_path / "model"
    make_model(family, base)
    config = ModelConfig(base=str(base), quantization=Nf4Quantization())
    needed = needed_bytes(config, resolve_base(config))
    (tmp_path / "out").mkdir()
    written = write_nf4(Checkpoint.open(base), tmp_path / "out").num_bytes
    assert written <= needed < written + SMALL_FILES_BYTES + 50_000


@pytest.mark.parametrize("to", ["gguf", "ollama", "nf4"])
def test_a_disk_that_fills_on_the_way_is_an_error_and_stays_empty(
    to, small_disk, tmp_path, monkeypatch
):
    make_model("llama", tmp_path / "model")
    # as if another program took the space after the check
    monkeypatch.setattr("llmtune.io.unfinished.free_bytes", lambda _: 1 << 40)
    with pytest.raises(LlmtuneError, match="ran full while out was written.*nothing was left"):
        export_model(tmp_path / "model", to, small_disk / "out", runtime=False)
    assert list(small_disk.iterdir()) == []
