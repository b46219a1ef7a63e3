"""A stand-in for an engine that calls functions on its machines."""

import pickle

from llmtune.launching.base import Called
from llmtune.launching.ray import RayEngine


def call_like_an_engine(monkeypatch):
    """Let Ray call here, the last value first, with what can be sent; return what is called."""
    calls = []

    def call_each(self, function, values, *, wants_gpu):
        for number, value in reversed(list(enumerate(values))):
            calls.append(number)
            sent = pickle.loads(pickle.dumps((function, value)))
            yield Called(number, pickle.loads(pickle.dumps(sent[0](sent[1]))))

    monkeypatch.setattr(RayEngine, "call_each", call_each)
    return calls
