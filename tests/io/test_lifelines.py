"""The other processes find the first one by any of its names, and strangers hold nobody up."""

import queue
import socket
import threading

from llmtune.io import lifelines


def test_a_name_that_leads_nowhere_and_a_silent_stranger_keep_nobody_apart(monkeypatch):
    monkeypatch.setattr(lifelines, "TOKEN_SECONDS", 0.1)
    first, other, addresses = lifelines.Lifelines(), lifelines.Lifelines(), queue.Queue()
    waiting = threading.Thread(
        target=first.accept, args=(1, addresses.put, "", ["nowhere.invalid", "127.0.0.1"])
    )
    waiting.start()
    address = addresses.get()
    with socket.create_connection(("127.0.0.1", address["port"])):
        other.connect(**address)
        waiting.join()
    assert not first.is_cut and not other.is_cut
