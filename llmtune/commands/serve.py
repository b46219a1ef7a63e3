"""serve: a model behind an OpenAI-compatible endpoint."""

import click

from llmtune.commands.options import (
    OVERRIDES_ARGUMENT,
    TARGET_ARGUMENT,
    show_progress,
    with_output_options,
)


@click.command()
@TARGET_ARGUMENT
@OVERRIDES_ARGUMENT
@click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "llama.cpp", "vllm"]),
    default="auto",
    show_default=True,
    help="What computes; auto: llama.cpp for a GGUF file, else transformers.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key-env", metavar="NAME", help="Environment variable with the key requests must carry."
)
@click.option(
    "--model",
    "names",
    multiple=True,
    metavar="NAME",
    help="Serve only this one (repeatable); the first answers requests that name none.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=1.0,
    show_default=True,
    help="Of requests that name none; 0 takes the likeliest token.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    help="Requests that may wait for the one that is answered (16; transformers only).",
)
@click.option(
    "--check",
    "num_checked",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Answers that are compared with the report's at the start.",
)
@with_output_options
def serve(  # noqa: PLR0913 (one argument an option)
    target: str,
    overrides: tuple[str, ...],
    engine: str,
    host: str,
    port: int,
    api_key_env: str | None,
    names: tuple[str, ...],
    temperature: float,
    max_waiting: int | None,
    num_checked: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Answer requests of the OpenAI protocol, on this machine alone unless you open it.

    TARGET is a config, a run, an adapter directory, a model or a GGUF file. A request names who
    answers: tuned, base, merged, original, or an export of the run.

    Ctrl-C ends it, with exit code 0.

    \b
      llmtune serve runs/quickstart
      llmtune serve runs/quickstart/merged --temperature 0
      llmtune serve runs/quickstart --engine llama.cpp
    """
    from llmtune.runs.serve import find_servable
    from llmtune.serving.listening import ServeSettings
    from llmtune.serving.serve import serve as start

    show_progress(quiet)
    settings = ServeSettings(
        engine, host, port, api_key_env, names, temperature, max_waiting, num_checked, as_json
    )
    start(find_servable(target, overrides), settings)
