"""torchrun that ends with the exit code of the run it started; its own is 1 whatever that was.

An engine tries again what was interrupted, and not what cannot succeed: it knows them by the code.
"""

import sys
from collections.abc import Sequence
from signal import Signals
from socket import gaierror

from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.launching.base import TEMPORARY_OPTION

PERMANENT = (0, LlmtuneError.exit_code)
WRONG_COMMAND = (FileNotFoundError, NotADirectoryError, PermissionError)


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with its own arguments; return the exit code of the run.

    Before them may be `--temporary-code N`: what to end with where trying again may help.
    """
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    given, temporary_code = list(arguments), None
    if given[:1] == [TEMPORARY_OPTION]:
        temporary_code, given = int(given[1]), given[2:]
    code = 0
    try:
        torchrun.run(torchrun.parse_args(given))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        code = exit_code([failure.exitcode for failure in failures])
    except SignalException as error:
        _say(f"stopped by {error.sigval.name}")
        code = RunInterrupted.exit_code
    except WRONG_COMMAND as error:
        _say(f"could not start the processes: {error}")
        code = LlmtuneError.exit_code
    except (RendezvousError, DistError, ConnectionError, TimeoutError, gaierror) as error:
        _say(f"the machines could not meet: {error}")
        code = RunInterrupted.exit_code
    except (RuntimeError, OSError) as error:
        _say(f"could not start the processes, or lost sight of them: {error}")
        code = RunInterrupted.exit_code
    if temporary_code is not None and code not in PERMANENT:
        return temporary_code
    return code


def exit_code(codes: Sequence[int]) -> int:
    """Return what a run ended with, from its processes' codes in the order of their failures.

    A process that was killed has a negative one; the others end because of it and say so.
    """
    own = [code for code in codes if code > 0]
    if own:
        return own[0]
    _say(f"a process was ended by {Signals(-codes[0]).name}")
    return 128 - codes[0]


def _say(text: str) -> None:
    sys.stderr.write(f"torchrun: {text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
