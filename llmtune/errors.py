"""The errors a user can cause or ask for; each carries the exit code its message ends with."""

INTERRUPTED = "interrupted; the same command continues from what is saved"


class LlmtuneError(Exception):
    """The input is wrong: the message says what was given, what was expected and what to do."""

    exit_code = 2


class CheckFailed(LlmtuneError):
    """A check or a budget that the user asked for did not hold."""

    exit_code = 1


class RunInterrupted(LlmtuneError):
    """The run was stopped from outside; what was done is saved, and rerunning continues it."""

    exit_code = 3


class ProcessLost(RunInterrupted):
    """One of the processes of a run ended, so that all of them do, with its message and code."""

    def __init__(self, message: str, exit_code: int = RunInterrupted.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MergeRefused(LlmtuneError):
    """What would be trained could not be merged afterwards."""
