"""A directory's links do not take files of this machine along."""

import click
import pytest

from llmtune import cli
from llmtune.errors import LlmtuneError
from llmtune.io.own_files import copy_own
from tests.merging.adapters import make_adapter, make_base


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text("PRIVATE")
    return path


def test_a_link_out_of_the_directory_is_refused(tmp_path, secret):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "vocab.txt").symlink_to(secret)
    with pytest.raises(LlmtuneError, match="is a link to .*id_rsa, outside of"):
        copy_own(adapter / "vocab.txt", tmp_path / "out", root=adapter)
    assert not (tmp_path / "out").exists()


def test_a_link_inside_a_copied_directory_is_refused(tmp_path, secret):
    templates = tmp_path / "adapter" / "additional_chat_templates"
    templates.mkdir(parents=True)
    (templates / "a.jinja").write_text("{{ messages }}")
    (templates / "b.jinja").symlink_to(secret)
    with pytest.raises(LlmtuneError, match="outside of"):
        copy_own(templates, tmp_path / "out", root=templates.parent)
    assert not (tmp_path / "out").exists()


def test_links_within_the_directory_and_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blob = tmp_path / "models--org--name" / "blobs" / "123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "again.json").symlink_to("config.json")
    for name in ("config.json", "again.json"):
        copy_own(snapshot / name, tmp_path / name, root=snapshot)
        assert (tmp_path / name).read_text() == "{}" and not (tmp_path / name).is_symlink()


def test_merge_does_not_take_a_linked_file_along(tmp_path, secret, capsys):
    base, adapter = make_base(tmp_path / "base"), tmp_path / "adapter"
    make_adapter(base, adapter)
    (adapter / "special_tokens_map.json").symlink_to(secret)
    out = tmp_path / "out"
    assert cli.run_command(["merge", str(adapter), "--out", str(out)]) == 2
    assert "id_rsa, outside of" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_that_ends_too_early_is_not_told_as_ctrl_c(monkeypatch, capsys):
    @click.command()
    def broken():
        raise EOFError("compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setitem(cli.cli.commands, "doctor", broken)
    assert cli.run_command(["doctor"]) == cli.EXIT_BUG
    said = capsys.readouterr().err
    assert "ended too early" in said and "interrupted" not in said
