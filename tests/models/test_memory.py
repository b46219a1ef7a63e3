"""Memory is given back, and a Ctrl-C meanwhile is not lost."""

import os
import platform
import signal
import subprocess
import sys
import weakref

import pytest

from llmtune.models.hardware import release_memory


class Cycle:
    """Is freed by a collection alone, and does `at_the_end` then."""

    def __init__(self, at_the_end):
        self.me, self.at_the_end = self, at_the_end

    def __del__(self):
        self.at_the_end()


def test_what_lies_in_cycles_is_freed():
    freed = []
    reference = weakref.ref(Cycle(lambda: freed.append(True)))
    release_memory()
    assert freed and reference() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_finalizer_is_raised_after_the_collection(number):
    before = signal.getsignal(number)
    Cycle(lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        release_memory()
    assert signal.getsignal(number) is before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to return memory")
def test_released_memory_goes_back_to_the_system():
    code = """
import psutil
from llmtune.models.hardware import release_memory

rss = psutil.Process().memory_info
begun = rss().rss
circle = [bytearray(60_000) for _ in range(2_000)]
circle.append(circle)
last = bytearray(60_000)  # above them in the heap, which can therefore not shrink
held = rss().rss
del circle
freed = rss().rss
release_memory()
print(held - begun, freed - begun, rss().rss - begun)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, freed, released = map(int, done.stdout.split())
    assert held > 100e6 and freed > 100e6
    assert released < 20e6
