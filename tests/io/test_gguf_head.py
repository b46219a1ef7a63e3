"""A GGUF head is read as the official reader does, and a damaged or hostile one is refused."""

import random
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.types import read_file_type
from llmtune.io.gguf_head import MAX_TENSORS, read_gguf_head
from llmtune.models.gguf import dense_checkpoint
from llmtune.planning.base import read_gguf_config


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file with a value of every type and tensors of three types."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_uint64("test.long", 1 << 40)
    writer.add_int8("test.small", -3)
    writer.add_float32("test.share", 0.5)
    writer.add_bool("test.flag", True)
    writer.add_chat_template("{{ messages }} ü")
    writer.add_token_list(["a", "b", "longer"])
    writer.add_token_scores([0.5, 1.5, 2.5])
    writer.add_tensor("one", np.zeros((3, 4), np.float32))
    writer.add_tensor("two", np.zeros((2, 32), np.float16))
    block = np.zeros((2, 34), np.uint8)
    writer.add_tensor("three", block, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(key, type, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", type) + value


def write_head(path, *pairs, num_tensors=0, num_pairs=None, rest=b""):
    count = len(pairs) if num_pairs is None else num_pairs
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, count) + b"".join(pairs) + rest)
    return path


def test_values_and_tensors_are_those_of_the_official_reader(small):
    head, expected = read_gguf_head(small), GGUFReader(small)
    for key, field in expected.fields.items():
        if key.startswith("GGUF."):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            assert head.lengths[key] == len(field.contents())
        else:
            assert head.values[key] == field.contents()
    assert [(one.name, one.shape, one.type) for one in head.tensors] == [
        (one.name, tuple(one.shape.tolist()), one.tensor_type) for one in expected.tensors
    ]


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        ([pair(b"a", 9, struct.pack("<IQ", 8, 1 << 40))], {}, "cut short"),
        ([pair(b"a", 9, struct.pack("<IQ", 4, 1 << 60))], {}, "cut short"),
        ([pair(b"a", 9, struct.pack("<IQ", 9, 1))], {}, "unknown type 9"),
        ([pair(b"a", 8, struct.pack("<Q", 1 << 62))], {}, "bytes, more than"),
        ([pair(b"a", 99, b"")], {}, "unknown type 99"),
        ([pair(b"a", 4, b"1234"), pair(b"a", 4, b"1234")], {}, "is there twice"),
        ([pair(b"general.alignment", 4, struct.pack("<I", 0))], {}, "alignment is 0"),
        ([], {"num_pairs": 1 << 60}, "more than"),
        ([], {"num_tensors": MAX_TENSORS + 1}, "more than"),
        ([], {"num_tensors": 1, "rest": struct.pack("<Q", 1 << 50)}, "more than"),
        (
            [],
            {"num_tensors": 1, "rest": struct.pack("<QBIQQIQ", 1, 97, 2, 1 << 62, 1 << 62, 0, 0)},
            "cut short",
        ),
    ],
)
def test_a_head_that_promises_too_much_is_refused_at_once(pairs, settings, message, tmp_path):
    path = write_head(tmp_path / "hostile.gguf", *pairs, **settings)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(LlmtuneError, match=message):
        read_gguf_head(path)
    assert time.monotonic() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_file_cut_at_any_byte_is_refused(small, tmp_path):
    content = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, len(content) - gguf.GGUF_DEFAULT_ALIGNMENT, 7):
        cut.write_bytes(content[:length])
        with pytest.raises(LlmtuneError, match="cannot be read as a GGUF file"):
            read_gguf_head(cut)


def test_damaged_bytes_end_in_a_head_or_in_a_message(small, tmp_path):
    content, damaged = small.read_bytes(), tmp_path / "damaged.gguf"
    chance = random.Random(0)
    for _ in range(1000):
        changed = bytearray(content)
        for _ in range(chance.randint(1, 6)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        damaged.write_bytes(changed)
        try:
            read_gguf_head(damaged)
        except LlmtuneError as error:
            assert "cannot be read as a GGUF file" in str(error)


@pytest.mark.parametrize("read", [read_file_type, read_gguf_config, dense_checkpoint])
def test_every_reader_of_a_gguf_file_has_the_limits(read, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    endless = pair(b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 1 << 40))
    path = write_head(tmp_path / "endless.gguf", endless)
    with pytest.raises(LlmtuneError, match="cannot be read as a GGUF file: it is cut short"):
        read(path)
