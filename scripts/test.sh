#!/usr/bin/env bash
# Set up everything and pass the tests. `scripts/test.sh --slow` adds the checks on the real small model.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh dev
if [ "${1:-}" = "--slow" ]; then
    .venv/bin/python scripts/fetch_quickstart.py
fi
exec scripts/check.sh "$@"
