"""An export that fills its disk ends in one sentence, and leaves nothing there."""

import subprocess

import pytest

from llmtune.errors import LlmtuneError
from llmtune.exporting.config import ExportSettings
from llmtune.stages.export import export_target
from tests.tiny import make_model


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("to", ["gguf", "ollama", "nf4"])
def test_a_disk_that_fills_on_the_way_is_an_error_and_stays_empty(
    to, small_disk, tmp_path, monkeypatch
):
    make_model("llama", tmp_path / "model")
    # as if another program took the space after the check
    monkeypatch.setattr("llmtune.unfinished.free_bytes", lambda _: 1 << 40)
    settings = ExportSettings(to, out=small_disk / "out", runtime=False)
    with pytest.raises(LlmtuneError, match="ran full while out was written.*nothing was left"):
        export_target(str(tmp_path / "model"), [], settings)
    assert list(small_disk.iterdir()) == []
