"""One step's gradients, loss and decisions, added up over the processes that shared its rows."""

import hashlib
import signal
import struct
from collections.abc import Iterable, Iterator

import torch
from peft import PeftModel
from torch import Tensor

from llmtune.errors import LlmtuneError
from llmtune.io.processes import Processes
from llmtune.io.stopping import Interruption
from llmtune.training.objectives.base import OpenSums


class Stopping:
    """The signal that one process has heard, and the one that all of them have agreed on.

    What is agreed on stops the run in all of them at the same step; alone, the two are the same.
    """

    def __init__(self, processes: Processes, heard: Interruption) -> None:
        self.processes = processes
        self.heard = heard
        self.agreed = Interruption() if processes.are_many else heard

    @property
    def is_heard(self) -> bool:
        """Whether this process has heard a signal."""
        return self.heard.signal_name is not None

    def agree(self) -> None:
        """Let all processes know of a signal that one of them has heard."""
        self.note(self.processes.largest([self.number])[0])

    @property
    def number(self) -> int:
        """The number of the signal that this process has heard, or 0."""
        name = self.heard.signal_name
        return 0 if name is None else int(signal.Signals[name])

    def note(self, number: int) -> None:
        """Take the largest of all processes' numbers for what is agreed on."""
        if number:
            self.agreed.signal_name = signal.Signals(number).name


class Reduction:
    """Adds up what the processes of a run have computed of one step.

    A step costs one reduction of a flat buffer (the gradients of everything trained, and the loss),
    and two of a few numbers between the CPUs. No process waits for its GPU here.
    """

    def __init__(self, model: PeftModel, stopping: Stopping) -> None:
        """Take the model whose trained parameters count, and what is agreed on in each step."""
        self._processes = stopping.processes
        self._stopping = stopping
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._sizes = [parameter.numel() for parameter in self._trained]
        self._buffer: Tensor | None = None

    @torch.no_grad()
    def start_equal(self) -> None:
        """Give every process the first one's weights."""
        flat = torch.cat([parameter.flatten() for parameter in self._trained])
        self._processes.copy_first(flat)
        pieces = flat.split(self._sizes)
        for parameter, piece in zip(self._trained, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))  # as `data` a fused layer would not notice

    def add_up(self, loss: Tensor) -> Tensor:
        """Replace every gradient by the sum of all processes' ones; return the summed loss.

        A parameter that has a gradient nowhere keeps none: an optimizer passes it over.
        """
        reported = [self._stopping.number, *(p.grad is not None for p in self._trained)]
        number, *has_gradient = self._processes.largest(reported)
        self._stopping.note(number)
        if self._buffer is None:
            total = sum(self._sizes) + 1
            self._buffer = torch.empty(total, dtype=torch.float32, device=loss.device)
        *pieces, last = self._buffer.split([*self._sizes, 1])
        for parameter, piece in zip(self._trained, pieces, strict=True):
            if parameter.grad is None:
                piece.zero_()
            else:
                piece.copy_(parameter.grad.flatten())
        last.copy_(loss.detach().float().reshape(1))
        self._processes.add_up(self._buffer)
        for parameter, piece, is_there in zip(self._trained, pieces, has_gradient, strict=True):
            if is_there and parameter.grad is None:
                parameter.grad = piece.view_as(parameter).clone()
            elif is_there:
                parameter.grad.copy_(piece.view_as(parameter))
        return last.clone().reshape(())

    def add_up_sums(self, sums: OpenSums) -> OpenSums:
        """Return sums as `Tally.open_sums` has them, added up over the processes."""
        numbers = iter(self._processes.total(list(_flatten(sums))))
        return _fill(sums, numbers)

    def require_equal(self, step: int) -> None:
        """Check that every process has the same weights, bit for bit.

        Raises:
            LlmtuneError: they have drifted apart, so that none of them is the run's.
        """
        found = _hash_words(self._trained)
        highest = self._processes.largest(found)
        lowest = self._processes.largest([-word for word in found])
        if highest != [-word for word in lowest]:
            raise LlmtuneError(
                f"after step {step} the processes have different weights, so nothing was saved; "
                "earlier checkpoints are kept. All must run on devices of the same kind, with the "
                "same versions of the libraries"
            )


def _hash_words(tensors: Iterable[Tensor]) -> list[int]:
    """Return the SHA-256 of the tensors' bytes as numbers of 32 bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy())
    return list(struct.unpack("<8I", digest.digest()))


def _flatten(sums: OpenSums) -> Iterator[float]:
    for each in sums:
        if isinstance(each, list):
            yield from _flatten(each)
        else:
            yield float(each)


def _fill(sums: OpenSums, numbers: Iterator[float]) -> OpenSums:
    return [_fill(each, numbers) if isinstance(each, list) else next(numbers) for each in sums]
