"""The cache gives what preparing gives, notices every change, and survives damage and company."""

import fcntl
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from llmtune.data import cache
from llmtune.data.config import DataConfig
from llmtune.data.prepare import prepare_examples
from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from tests.data.shapes import CHATML, SHAPES, make_shape, make_shape_tokenizer, turns, write_jsonl


def rows(count: int) -> list[dict]:
    return [{"messages": turns(f"q {i}", f"answer {i}")} for i in range(count)]


def prepare(path, tokenizer=None, seed=0, **data):
    config = DataConfig.model_validate({"train": [{"path": str(path)}], **data})
    return prepare_examples(config, tokenizer or make_shape("chatml"), split="train", seed=seed)


def entries() -> list:
    directory = cache_dir() / "data"
    return sorted(directory.iterdir()) if directory.is_dir() else []


def assert_same(one, other):
    assert one.fingerprint == other.fingerprint and one.order_hash == other.order_hash
    assert one.report == other.report and one.source_names == other.source_names
    assert list(one.examples) == list(other.examples)
    for name, array in one.examples.columns.items():
        assert np.array_equal(array, other.examples.columns[name])


def test_second_preparation_is_read_back_whole(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(20), {"messages": []}])
    first = prepare(path, on_bad_row="drop")
    monkeypatch.setattr("llmtune.data.prepare._prepare", None)  # it would fail if it were called
    assert_same(prepare(path, on_bad_row="drop"), first)


def test_everything_the_tokens_depend_on_makes_another_entry(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows(20))
    prepare(path)
    other_template = make_shape_tokenizer(SHAPES["chatml"])
    other_template.chat_template = "{# the same, written otherwise #}" + CHATML
    changes = [
        lambda: prepare(path, seed=1),
        lambda: prepare(path, loss_on="last-assistant"),
        lambda: prepare(path, max_length=99),
        lambda: prepare(path, make_shape("chatml-other-eos")),
        lambda: prepare(path, other_template),
        lambda: (write_jsonl(path, rows(21)), prepare(path)),
    ]
    for number, change in enumerate(changes, 2):
        change()
        assert len(entries()) == number
    prepare(path, packing="off")
    assert len(entries()) == len(changes) + 1
    assert len(prepare(path).examples) == 21


def test_refusals_are_not_kept(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*rows(2), {"messages": []}])
    for _ in range(2):
        with pytest.raises(LlmtuneError, match="a.jsonl:3"):
            prepare(path)
    assert entries() == []


@pytest.mark.parametrize("name", ["tokens.i32", "trained.u8", "index.npz", "meta.txt"])
def test_damaged_entry_is_made_again(tmp_path, name):
    path = write_jsonl(tmp_path / "a.jsonl", rows(50))
    first = prepare(path)
    (entry,) = entries()
    content = (entry / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:middle], b"", flipped):
        (entry / name).unlink()  # another file: `first` has mapped the old one
        (entry / name).write_bytes(damaged)
        assert_same(prepare(path), first)
        assert (entry / name).read_bytes() == content or name == "index.npz"
    (entry / name).unlink()
    assert_same(prepare(path), first)
    assert entries() == [entry]


def test_examples_outlive_their_entry(tmp_path):
    """Another process may forget an entry, or make it again, while this one trains on it."""
    path = write_jsonl(tmp_path / "a.jsonl", rows(50))
    prepared = prepare(path)
    read_back = prepare(path)
    before = list(prepared.examples)
    (entry,) = entries()
    shutil.rmtree(entry)
    assert list(prepared.examples) == list(read_back.examples) == before


def test_leavings_of_a_killed_process_are_taken_away(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    prepare(path)
    left, written = (entries()[0].parent / f".writing-{name}" for name in ("left", "written"))
    for directory in (left, written):
        directory.mkdir()
    lock = os.open(written, os.O_RDONLY)  # of a process that runs
    fcntl.flock(lock, fcntl.LOCK_EX)
    prepare(path, seed=1)
    assert not left.exists() and written.exists()
    os.close(lock)
    prepare(path, seed=2)
    assert not written.exists()


def test_without_the_cache_nothing_is_kept(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    prepare(path, cache=False)
    assert entries() == []


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "file" / "below"))
    assert len(prepare(write_jsonl(tmp_path / "a.jsonl", rows(3))).examples) == 3


def test_oldest_entries_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEPT_ENTRIES", 2)
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    for seed in range(4):
        prepare(path, seed=seed)
        for entry in entries():
            os.utime(entry, (entry.stat().st_mtime - 10,) * 2)
    assert len(entries()) == 2


def _prepare_many(path, queue):
    queue.put([prepare(path, seed=seed % 2).fingerprint for seed in range(6)])


def test_two_processes_share_the_cache(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(300))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_prepare_many, args=(path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1] and len(set(found[0])) == 2
    assert len(entries()) == 2
