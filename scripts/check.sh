#!/usr/bin/env bash
# The one gate: format, lint, types, import contracts, tests. `--slow` runs the real-model tests too,
# `--lint` everything but the tests.
# Where there are two cores, two processes share the tests, a file at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/lint-imports"
if [ "${1:-}" = "--lint" ]; then
    exit 0
fi

workers=2
if [ "$(getconf _NPROCESSORS_ONLN)" -lt 2 ]; then
    workers=0
fi
# One thread each: two processes with threads of their own would fight for the cores.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    "$bin/python" -m pytest -m "not slow" --numprocesses "$workers" --dist loadfile
if [ "${1:-}" = "--slow" ]; then
    # The quickstart takes one process, all the others together the second one.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
        "$bin/python" -m pytest -m slow --numprocesses "$workers" --dist loadfile
fi
