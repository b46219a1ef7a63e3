"""chat and predict: what a model says."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from llmtune.commands.options import (
    COLUMNS_OPTION,
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)
from llmtune.errors import LlmtuneError
from llmtune.io.json_files import parse_json


class _Temperature(click.FloatRange):
    """A finite number from 0 on; click's own range lets nan through."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


MAX_NEW_TOKENS_OPTION = click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Longest answer, in tokens.",
)
TEMPERATURE_OPTION = click.option(
    "--temperature",
    type=_Temperature(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)


@click.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--arm", type=click.Choice(["base", "tuned", "merged"]), help="Who answers first.")
@click.option("--system", help="A system prompt.")
@click.option(
    "--tools", type=click.Path(path_type=Path), help="A JSON file with a list of tool schemas."
)
@MAX_NEW_TOKENS_OPTION
@TEMPERATURE_OPTION
@with_output_options
def chat(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    arm: str | None,
    system: str | None,
    tools: Path | None,
    max_new_tokens: int,
    temperature: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Talk to a model in the terminal.

    TARGET is a config, a run, an adapter directory or a model.

    /base and /tuned switch who answers, each with a history of its own, and /compare lets both
    answer; /system sets a system prompt, /save writes rows to train on, /help lists the rest.
    Ctrl-C stops an answer, and leaves where you type.

    \b
      llmtune chat runs/quickstart
      llmtune chat runs/quickstart/merged --temperature 0.7
    """
    from llmtune.runs.targets import resolve_target
    from llmtune.serving.chat import ChatSettings, run_chat

    show_progress(quiet)
    settings = ChatSettings(arm, system, max_new_tokens, temperature, as_json, tools)
    run_chat(resolve_target(target, overrides), settings)


@click.command()
@click.argument("target", required=False)
@OVERRIDES_ARGUMENT
@click.option("--input", "input_path", required=True, type=click.Path(path_type=Path))
@click.option("--output", "output_path", required=True, type=click.Path(path_type=Path))
@click.option("--arm", type=click.Choice(["base", "tuned", "merged"]), help="Who answers.")
@MAX_NEW_TOKENS_OPTION
@TEMPERATURE_OPTION
@click.option("--format", help="How the rows ask: messages, instruction, ...; else they say it.")
@COLUMNS_OPTION
@click.option(
    "--ignore", multiple=True, metavar="COLUMN", help="A column that is left out on purpose."
)
@click.option(
    "--answer-column", default="answer", show_default=True, help="What the answers' column is."
)
@click.option(
    "--too-long",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What happens if a row is too long for the model, or --server refuses it.",
)
@click.option("--choices", metavar="A,B,...", help="Choose one of these labels; write nothing.")
@click.option("--suite", help="Choose one of a suite's labels, asked by the suite's prompt.")
@click.option("--server", metavar="URL", help="Ask an OpenAI-compatible endpoint (http://HOST/v1).")
@click.option("--model", metavar="NAME", help="The model's name at --server.")
@click.option("--api-key-env", metavar="NAME", help="Environment variable with its key.")
@with_output_options
def predict(  # noqa: PLR0913 (one argument an option)
    target: str | None,
    overrides: tuple[str, ...],
    input_path: Path,
    output_path: Path,
    arm: str | None,
    max_new_tokens: int,
    temperature: float,
    format: str | None,
    columns: dict[str, str],
    ignore: tuple[str, ...],
    answer_column: str,
    too_long: Literal["error", "skip"],
    choices: str | None,
    suite: str | None,
    server: str | None,
    model: str | None,
    api_key_env: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Answer a file of prompts in batches.

    Rows are read as training reads them, without their answers: `prompt` or `instruction` (text),
    `messages` or `conversations` (turns), with `system` and `tools`; `text` is continued as it is.
    A file with the columns of a run's training rows is asked as those were, with its instruction.
    Each output line is the input row with `answer` and `stopped` added, in the same order; an
    OUTPUT that ends in .csv is a table. With --choices or --suite the answer is the likeliest
    label, as the report scores it, and `probabilities` has that of each one.

    The answers so far are kept in OUTPUT.partial; after Ctrl-C the same command continues.

    \b
      llmtune predict runs/quickstart --input prompts.jsonl --output answers.jsonl
      llmtune predict runs/quickstart --arm base --input prompts.jsonl --output base.jsonl
      llmtune predict runs/quickstart --input q.csv --columns prompt=question --output answers.csv
      llmtune predict runs/mine --input new.csv --suite mine_suite.yaml --output labels.csv
      llmtune predict --server http://127.0.0.1:8000/v1 --model tuned \\
        --input q.jsonl --output answers.jsonl
    """
    from llmtune.data.prompts import PromptChoice
    from llmtune.runs.targets import resolve_target
    from llmtune.serving.predict import PredictSettings, ask_server, run_predict

    show_progress(quiet)
    resolved = None if target is None else resolve_target(target, overrides)
    is_free = format is None and not columns
    settings = PredictSettings(
        input_path,
        output_path,
        arm,
        max_new_tokens,
        temperature,
        PromptChoice(
            format, columns, ignore, resolved.trained_rows if resolved and is_free else None
        ),
        answer_column,
        too_long,
        _read_labels(choices),
        suite,
    )
    if choices is not None and suite is not None:
        raise LlmtuneError("--choices and --suite both name the labels; give one")
    if server is None:
        if resolved is None:
            raise LlmtuneError("nobody to answer: give a TARGET (a run), or --server URL")
        if model is not None or api_key_env is not None:
            raise LlmtuneError("--model and --api-key-env are for --server; choose with --arm")
        made = run_predict(resolved, settings)
    else:
        if target is not None or arm is not None or settings.labels or suite is not None:
            raise LlmtuneError(
                "--server: a model behind an endpoint is asked by --model alone; take out TARGET, "
                "--arm, --choices and --suite"
            )
        if model is None:
            raise LlmtuneError(f"--server {server}: name who answers there with --model")
        made = ask_server(server, model, api_key_env, settings)
    why = settings.columns[2]
    rows_have = "row has" if made.skipped == 1 else "rows have"
    skipped = f"; {made.skipped} {rows_have} none, and column {why} says why" * bool(made.skipped)
    print_result(
        asdict(made),
        as_json,
        lambda: (
            f"{made.rows - made.skipped} answers by the {made.arm} model in {output_path}{skipped}"
        ),
    )


def _read_labels(text: str | None) -> tuple[str, ...]:
    """Return the labels of `a,b,c`, or of a JSON list if one holds a comma."""
    if text is None:
        return ()
    if text.lstrip().startswith("["):
        try:
            labels = parse_json(text)
        except ValueError as error:
            raise LlmtuneError(f"--choices {text}: not a JSON list: {error}") from None
        if not all(isinstance(label, str) for label in labels):
            raise LlmtuneError(f"--choices {text}: expected a list of texts")
        return tuple(labels) or ("",)
    return tuple(label.strip() for label in text.split(","))
