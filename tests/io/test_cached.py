from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir, make_once


def test_what_another_process_makes_meanwhile_is_accepted(tmp_path):
    target = tmp_path / "bases" / "abc"

    def write_while_another_finishes(directory: Path) -> None:
        (directory / "config.json").write_text("ours")
        target.mkdir()
        (target / "config.json").write_text("theirs")

    make_once(target, write_while_another_finishes, marker="config.json", source="a file")

    assert (target / "config.json").read_text() == "theirs"
    assert list(target.parent.iterdir()) == [target]


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMTUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert cache_dir() == tmp_path / "llmtune"


def test_full_disk_names_the_setting_and_leaves_nothing(tmp_path):
    def write(directory: Path) -> None:
        (directory / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(LlmtuneError, match=r"made from a file could not be .* LLMTUNE_CACHE"):
        make_once(tmp_path / "abc", write, marker="config.json", source="a file")
    assert not list(tmp_path.iterdir())


def test_what_is_made_can_be_read_by_all_and_its_folders_entered(tmp_path):
    def write(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        (directory / "code").mkdir(mode=0o700)
        (directory / "code" / "model.py").touch(mode=0o600)

    made = tmp_path / "abc"
    make_once(made, write, marker="config.json", source="a file")
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.rglob("*")}
    assert modes == {"config.json": 0o644, "code": 0o755, "model.py": 0o644}
