"""How the help of the whole command line and of its groups is laid out."""

from collections.abc import Mapping, Sequence

import click


class Chapters(click.Group):
    """A group whose help lists its commands in chapters, in the order of use and uncut."""

    chapters: Mapping[str, Sequence[str]]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list a chapter."""
        for title, names in self.chapters.items():
            with formatter.section(title):
                formatter.write_dl([(name, _first_sentence(self.commands[name])) for name in names])


class Uncut(click.Group):
    """A group whose help cuts no sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of all commands."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, _first_sentence(self.commands[name])) for name in self.list_commands(ctx)]
            )


def _first_sentence(command: click.Command) -> str:
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "."
