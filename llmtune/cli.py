"""The command line: verbs as sub-commands, a YAML file first, dotted overrides after it."""

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

import click
from rich.console import Console

from llmtune.commands import (
    answer,
    config,
    data,
    experiments,
    export,
    judge,
    launch,
    look,
    merge,
    plan,
    report,
    run,
    serve,
    suite,
)
from llmtune.commands.options import Chapters
from llmtune.errors import INTERRUPTED, LlmtuneError, RunInterrupted
from llmtune.io.processes import join_processes, joined_processes
from llmtune.version import __version__

EXIT_BUG = 70

OS_ADVICE = {
    errno.ENOSPC: "; free some space, and give the same command again",
    errno.EDQUOT: "; free some space, and give the same command again",
    errno.EFBIG: "; it passes the largest size of a file here (ulimit -f): raise it, or choose a "
    "different disk",
    errno.EACCES: "; choose a place you may write to, or change its permissions",
    errno.EROFS: "; choose a place that can be written to",
}

HELP_ERROR = "NoArgsIsHelpError"
"""The class of click's error that is a command's help; click 8.1 has none."""

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> None:
    """Run the command line and end the process with its exit code; SIGTERM is like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = run_command(sys.argv[1:])
    if code and joined_processes().are_many:
        # what a GPU still has to send to a process that is gone would hold up an orderly exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 1, 2, 3, or 70 for a bug of ours."""
    _prepare_process()
    output = sys.stdout
    try:
        # A command that asks click to exit makes this call return its exit code.
        with _interruptions_seen():
            code = _run_with_others(list(arguments))
    except click.ClickException as error:
        if type(error).__name__ == HELP_ERROR:
            click.echo(error.format_message(), err=True)
            return LlmtuneError.exit_code
        return _fail(_plain_usage(error), LlmtuneError.exit_code)
    except LlmtuneError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # click makes an Abort of it, like of a Ctrl-C
            traceback.print_exception(error.__cause__)
            return _fail(
                "a file ended too early; if none is damaged, this is a bug: report it", EXIT_BUG
            )
        return _fail(INTERRUPTED, RunInterrupted.exit_code)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the last place before the user)
        if _has_left(error, output):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (the reader left: silence)
            return 0
        if isinstance(error, OSError):
            return _fail(_plain_failure(error), LlmtuneError.exit_code)
        traceback.print_exc()
        return _fail("this is a bug in llmtune; please report it with the lines above", EXIT_BUG)
    return code if isinstance(code, int) else 0


def _run_with_others(arguments: list[str]) -> object:
    """Run the command; of several processes the first one does, and the others follow its orders.

    Raises:
        LlmtuneError: several processes were started for a command that trains nothing.
    """
    processes = join_processes()
    if not processes.is_first:
        from llmtune.runs.pipeline import follow_orders

        logging.getLogger("llmtune").setLevel(logging.ERROR)
        follow_orders(processes)
        return 0
    name = arguments[0] if arguments else ""
    if processes.are_many and name in cli.commands and name not in TRAINING:
        raise LlmtuneError(
            f"llmtune {name} works in one process, and {processes.world_size} were started: start "
            f"it without torchrun or accelerate launch (several can {', '.join(TRAINING)})"
        )
    code = cli(arguments, prog_name="llmtune", standalone_mode=False)
    processes.end()
    return code


@click.group(cls=Chapters, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="llmtune")
def cli() -> None:
    """Adapt a pretrained LLM to your task on one GPU, and know whether it worked.

    \b
      llmtune init train.jsonl --out mine.yaml       a config for your rows
      llmtune run mine.yaml                          train, merge, evaluate, report
      llmtune train mine.yaml adapter.rank=8         override any key of the config
      llmtune chat runs/mine                         talk to base and tuned model
    """


COMMANDS = {
    "Start": (
        data.init,
        data.data_group,
        suite.suite_group,
        plan.plan,
        config.config_group,
        look.doctor,
    ),
    "Train and judge": (
        run.run_all,
        run.train,
        merge.merge,
        run.evaluate,
        report.report,
        judge.judge,
        look.runs,
    ),
    "Go further": (
        experiments.sweep,
        experiments.learning_curve,
        experiments.sequence,
        launch.launch,
    ),
    "Use the model": (answer.chat, answer.predict, serve.serve, export.export, export.verify),
}
TRAINING = ("run", "train", "sweep", "learning-curve", "sequence")
"""Commands that several processes can share."""
for commands in COMMANDS.values():
    for command in commands:
        cli.add_command(command)
cli.chapters = {
    title: [str(command.name) for command in commands] for title, commands in COMMANDS.items()
}


@contextlib.contextmanager
def _interruptions_seen() -> Iterator[None]:
    """Take for a Ctrl-C what a library made of one: a lazy import that it broke off, mostly."""
    try:
        yield
    except Exception as error:
        origin: BaseException | None = error
        while origin is not None:
            if isinstance(origin, KeyboardInterrupt):
                raise origin from None
            origin = origin.__cause__ or origin.__context__
        raise


def _has_left(error: BaseException, output: object) -> bool:
    """Whether the reader of our output left.

    Two libraries make an exit of that: click, which replaces the output, and rich.
    """
    if isinstance(error, SystemExit):
        return sys.stdout is not output or isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError)


def _plain_usage(error: click.ClickException) -> str:
    """Return click's message on one line, and for a wrong call which help says how."""
    message = " ".join(error.format_message().split())
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{message} (see {context.command_path} --help)" if context else message


def _plain_failure(error: OSError) -> str:
    """Return what the operating system refused, at which path, and what helps."""
    place = f"{error.filename}: " if error.filename else ""
    advice = OS_ADVICE.get(error.errno or 0, "")
    return f"{place}{error.strerror or error}{advice}"


def _fail(message: str, code: int) -> int:
    """Print why the command fails and return its exit code; one of several processes prints."""
    shown, code = joined_processes().report_failure(message, code)
    if shown is not None:
        _print_error(shown)
    return code


def _print_error(message: str) -> None:
    console = Console(stderr=True, highlight=False)
    console.print("error: ", style="bold red", end="")
    console.print(message, style="red", markup=False, soft_wrap=True)


def _prepare_process() -> None:
    """Set what is needed before the big libraries are imported: no telemetry, no noise."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
