"""Memory is given back, and a Ctrl-C meanwhile is not lost."""

import os
import signal
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
