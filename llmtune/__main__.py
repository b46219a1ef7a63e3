"""The command line's door: `python -m llmtune`, and what the script `llmtune` calls."""

import sys

from llmtune.errors import INTERRUPTED, RunInterrupted


def main() -> None:
    """Run the command line; a Ctrl-C while its modules are still being read gives no traceback."""
    try:
        from llmtune import cli
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {INTERRUPTED}\n")
        sys.exit(RunInterrupted.exit_code)
    cli.main()


if __name__ == "__main__":
    main()
