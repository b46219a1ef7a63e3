"""A new command is its file and its entry in the command line."""

from tests.extension.house import House

COMMAND = '''
"""longest: how long the longest row of a run is."""

import click

from llmtune.commands.options import (
    CONFIG_ARGUMENT,
    OVERRIDES_ARGUMENT,
    print_result,
    with_output_options,
)


@click.command()
@CONFIG_ARGUMENT
@OVERRIDES_ARGUMENT
@with_output_options
def longest(config, overrides, quiet, as_json):
    """Say how many tokens a batch of a run holds at most.

    CONFIG is a YAML file or a run directory.
    """
    from llmtune.runs.targets import require_run

    found = require_run(str(config), overrides).data.max_length
    print_result({"max_length": found}, as_json, lambda: f"{found} tokens")
'''


def test_a_command_is_one_file_and_one_entry(tmp_path):
    house = House(tmp_path / "house")
    house.add("commands/longest.py", COMMAND.lstrip())
    house.enter(
        "cli.py",
        {
            "    launch,\n    look,": "    launch,\n    longest,\n    look,",
            '"Go further": (': '"Go further": (longest.longest, ',
        },
    )
    config = tmp_path / "config.yaml"
    config.write_text(
        "{run_dir: run, model: {base: org/tiny}, data: {train: [{path: rows.jsonl}], "
        "max_length: 77}}"
    )
    assert house.run("longest", str(config), cwd=tmp_path).stdout == "77 tokens\n"
    assert "longest" in house.run("--help", cwd=tmp_path).stdout
