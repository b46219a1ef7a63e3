#!/usr/bin/env bash
# Make .venv and install the package by the pinned constraints; a second call finds it done.
# Usage: scripts/setup.sh [dev]
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-}"
stamp=".venv/.installed-${extras:-run}"
wanted="$(cat pyproject.toml constraints.txt | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

find_python() {
    for name in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "No Python 3.11 or newer with the venv module was found: install one and run this again." >&2
    exit 2
}

if [ ! -x .venv/bin/python ]; then
    python="$(find_python)"
    echo "Making .venv with $("$python" --version) ..." >&2
    "$python" -m venv .venv
fi
echo "Installing llmtune${extras:+ with [$extras]} by constraints.txt ..." >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
