"""Two sizes that are not equal never read the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.io.sizes import GIB, MIB, format_apart, format_bytes, format_in, format_size
from llmtune.io.unfinished import free_bytes, require_space


@pytest.mark.parametrize(
    ("one", "other", "written"),
    [
        (3 * GIB, 85 * GIB, ("3.00 GiB", "85.00 GiB")),
        (150 * MIB, 2 * GIB, ("150 MiB", "2.00 GiB")),
        (8 * GIB, 8 * GIB + 3 * MIB, ("8.000 GiB", "8.003 GiB")),
        (1.2 * MIB, 1.4 * MIB, ("1.2 MiB", "1.4 MiB")),
        (MIB, MIB, ("1 MiB", "1 MiB")),
    ],
)
def test_two_sizes_get_the_digits_that_tell_them_apart(one, other, written):
    assert format_apart(one, other) == written
    assert format_apart(other, one) == written[::-1]


@given(st.integers(0, 2**44), st.integers(-5, 5))
def test_any_two_different_numbers_of_bytes_read_differently(size, step):
    one, other = format_apart(size, max(size + step, 0))
    assert (one == other) == (size == max(size + step, 0))


def test_a_size_alone_is_written_short():
    assert format_size(10 * GIB / 3) == "3.33 GiB"
    assert format_size(500_000) == "0 MiB"


def test_a_disk_that_lacks_a_single_byte_is_refused_with_both_numbers(tmp_path, monkeypatch):
    free = free_bytes(tmp_path)
    monkeypatch.setattr("llmtune.io.unfinished.free_bytes", lambda _: free)
    require_space(tmp_path / "out", free)
    words = rf"the adapter needs {free + 1:,} bytes and its disk has {free:,} free"
    with pytest.raises(Exception, match=words):
        require_space(tmp_path / "out", free + 1, what="the adapter")


def test_a_size_is_written_in_the_unit_and_with_the_digits_that_are_asked_for():
    assert format_in(512 * MIB, "GiB") == "0.5 GiB"
    assert format_in(3 * GIB, "MiB", digits=2) == "3072.00 MiB"
    assert format_bytes(2000) == "2.0 KiB"
