#!/usr/bin/env bash
# The one gate: format, lint, types, import contracts, tests. `--slow` runs the real-model tests too.
# Where there are two cores, two processes share the fast tests, one from each end of the files.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/lint-imports"

if [ "$(getconf _NPROCESSORS_ONLN)" -lt 2 ]; then
    "$bin/python" -m pytest -m "not slow"
else
    claims="$(mktemp -d)"
    other=
    trap '[ -z "$other" ] || kill "$other" 2>/dev/null || true; rm -rf "$claims" "$claims.log"' EXIT
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    "$bin/python" -m pytest -m "not slow" --share "$claims" --backwards >"$claims.log" 2>&1 &
    other=$!
    code=0
    "$bin/python" -m pytest -m "not slow" --share "$claims" || code=$?
    wait "$other" || code=$?
    other=
    echo "The other process:"
    cat "$claims.log"
    unset OMP_NUM_THREADS
    [ "$code" -eq 0 ] || exit "$code"
fi
if [ "${1:-}" = "--slow" ]; then
    "$bin/python" -m pytest -m slow
fi
