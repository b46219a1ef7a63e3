#!/usr/bin/env bash
# The one gate: format, lint, types, import contracts, tests. `--slow` runs the real-model tests too.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

tests=(-m "not slow")
if [ "${1:-}" = "--slow" ]; then
    tests=()
fi
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/lint-imports"
"$bin/python" -m pytest "${tests[@]}"
