"""`python -m llmtune`: the command line without its script."""

from llmtune.cli import main

main()
