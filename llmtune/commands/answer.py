"""chat and predict: what a model says."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llmtune.commands.options import (
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    print_result,
    show_progress,
    with_output_options,
)


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
@MAX_NEW_TOKENS_OPTION
@TEMPERATURE_OPTION
@with_output_options
def chat(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    arm: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Talk to a model in the terminal.

    TARGET is a config, a run, an adapter directory or a model.

    /base and /tuned switch who answers, /clear starts over, /quit ends.

    \b
      llmtune chat runs/quickstart
      llmtune chat runs/quickstart/merged --temperature 0.7
    """
    from llmtune.runs.targets import resolve_target
    from llmtune.serving.chat import ChatSettings, run_chat

    show_progress(quiet)
    settings = ChatSettings(arm, system, max_new_tokens, temperature, as_json)
    run_chat(resolve_target(target, overrides), settings)


@click.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option("--input", "input_path", required=True, type=click.Path(path_type=Path))
@click.option("--output", "output_path", required=True, type=click.Path(path_type=Path))
@click.option("--arm", type=click.Choice(["base", "tuned", "merged"]), help="Who answers.")
@MAX_NEW_TOKENS_OPTION
@TEMPERATURE_OPTION
@with_output_options
def predict(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    input_path: Path,
    output_path: Path,
    arm: str | None,
    max_new_tokens: int,
    temperature: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Answer a JSONL of prompts in batches. A row holds `prompt` (text) or `messages`.

    Each output line is the input row with `answer` and `stopped` added, in the same order.

    \b
      llmtune predict runs/quickstart --input prompts.jsonl --output answers.jsonl
      llmtune predict runs/quickstart --arm base --input prompts.jsonl --output base.jsonl
    """
    from llmtune.runs.targets import resolve_target
    from llmtune.serving.predict import PredictSettings, run_predict

    show_progress(quiet)
    settings = PredictSettings(input_path, output_path, arm, max_new_tokens, temperature)
    made = run_predict(resolve_target(target, overrides), settings)
    print_result(
        asdict(made),
        as_json,
        lambda: f"{made.rows} answers by the {made.arm} model in {output_path}",
    )
