"""A merged directory appears whole or not at all, whatever happens on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.checks.provenance import PROVENANCE_FILE
from llmtune.errors import LlmtuneError
from llmtune.io.unfinished import remove_leftovers
from llmtune.merging.merge import merge_adapter
from llmtune.merging.sidecar import write_sidecar
from llmtune.models.checkpoint import Checkpoint
from tests.merging.adapters import load_base, make_adapter, make_base
from tests.tiny import make_tokenizer

STUCK_MERGE = """
import sys, time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from llmtune.merging import merge, shards, tiles
real, done = tiles.TensorMerger.merge_tile, []
def stuck(self, *tile):
    done.append(tile)
    if len(done) == 5:
        print("half way", flush=True)
        time.sleep(3600)
    return real(self, *tile)
shards.TensorMerger.merge_tile = stuck
merge.merge_adapter(*map(Path, sys.argv[1:]), num_threads=1)
"""

SMALL_FILES = """
import resource, sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from llmtune.errors import LlmtuneError
from llmtune.merging.merge import merge_adapter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    merge_adapter(*map(Path, sys.argv[1:]))
except LlmtuneError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    make_adapter(make_base(directory / "base"), directory / "adapter")
    return directory


def merge(made: Path, out_dir: Path, **options):
    return merge_adapter(made / "base", made / "adapter", out_dir, **options)


def start(code: str, made: Path, out_dir: Path) -> subprocess.Popen:
    paths = (made / "base", made / "adapter", out_dir)
    command = [sys.executable, "-c", code, *map(str, paths)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_provenance_names_base_adapter_and_changes(made, tmp_path):
    result = merge(made, tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())
    assert provenance["base_fingerprint"] == Checkpoint.open(made / "base").fingerprint
    assert provenance["base_name"] == "base"
    assert str(made) not in json.dumps(provenance)  # no path of this machine
    assert provenance["strength"] == 1.0
    assert provenance["changes"] == {"lora": 14} == result.changes
    assert provenance["versions"]["torch"] == version("torch")
    assert json.loads(json.dumps(result.to_dict()))["num_tensors"] == 21
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_existing_directory_is_refused_and_kept(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(LlmtuneError, match="exists"):
        merge(made, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_existing_directory_is_replaced_when_asked(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("gone")
    merge(made, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    load_base(tmp_path / "out")


def test_failed_overwrite_keeps_the_old_directory(made, tmp_path, monkeypatch):
    merge(made, tmp_path / "out")
    before = Checkpoint.open(tmp_path / "out").fingerprint
    monkeypatch.setattr("llmtune.merging.merge.write_sidecar", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(made, tmp_path / "out", overwrite=True, strength=0.5)
    assert Checkpoint.open(tmp_path / "out").fingerprint == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_full_disk_is_seen_before_anything_is_written(made, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9 - 5000, free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LlmtuneError, match=r"needs [\d,]+ bytes and its disk has 5,000 free"):
        merge(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_disk_that_runs_full_leaves_nothing(made, tmp_path):
    output, _ = start(SMALL_FILES, made, tmp_path / "out").communicate(timeout=600)
    assert "ran full" in output
    assert "nothing was left" in output
    assert not list(tmp_path.iterdir())


def test_killed_merge_leaves_no_finished_directory_and_restarts_clean(made, tmp_path):
    with start(STUCK_MERGE, made, tmp_path / "out") as process:
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".out.tmp-*/out/model.safetensors"))
    assert not (tmp_path / "out").exists()
    merge(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    load_base(tmp_path / "out")


def test_running_merge_is_not_taken_for_a_leftover(made, tmp_path, monkeypatch):
    def write_sidecar_beside_another_start(*arguments):
        remove_leftovers(tmp_path / "out")
        return write_sidecar(*arguments)

    monkeypatch.setattr("llmtune.merging.merge.write_sidecar", write_sidecar_beside_another_start)
    merge(made, tmp_path / "out")
    load_base(tmp_path / "out")


def test_directory_moved_aside_by_a_killed_overwrite_comes_back(tmp_path):
    (tmp_path / ".out.old-x").mkdir()
    (tmp_path / ".out.old-x" / "model").write_text("mine")
    remove_leftovers(tmp_path / "out")
    assert (tmp_path / "out" / "model").read_text() == "mine"


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, float("nan")), (torch.float16, 60_000.0)]
)
def test_number_that_is_not_finite_is_an_error(tmp_path, dtype, value):
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[name][3, 2] = value
    tensors[name.replace("lora_B", "lora_A")][2] = 1.0
    save_file(tensors, path)
    with pytest.raises(LlmtuneError, match=r"layers\.1\.self_attn\.q_proj.*not finite"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_says_what_the_merged_files_hold(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "out")
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged == config | {"dtype": "bfloat16"}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_tokenizer_and_template_of_the_adapter_win(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    (base / "tokenizer.model").write_text("the base's own")
    tokenizer = make_tokenizer(chat_template="{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(adapter)
    merge_adapter(base, adapter, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert (out / "tokenizer.model").read_text() == "the base's own"


def test_template_inside_the_adapters_tokenizer_config_is_not_overruled(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    assert (base / "chat_template.jinja").exists()
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": "mine"}))
    merge_adapter(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_files_are_readable_by_others(made, tmp_path):
    before = os.umask(0o022)
    try:
        merge(made, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o444 == 0o444
