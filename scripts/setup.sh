#!/usr/bin/env bash
# Make .venv and install the package by the pinned constraints; a second call finds it done, and a
# call after an interrupted one continues.
# Usage: scripts/setup.sh [dev]
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-}"
# Which versions: the pinned ones, or a different file of constraints.
constraints="${LLMTUNE_CONSTRAINTS:-constraints.txt}"
stamp=".venv/.installed-${extras:-run}"
wanted="$(cat pyproject.toml "$constraints" | cksum)"
for done in "$stamp" .venv/.installed-dev; do # dev has all that the others have
    if [ -f "$done" ] && [ "$(cat "$done")" = "$wanted" ]; then
        exit 0
    fi
done

fail() {
    echo "error: $1" >&2
    exit 2
}

find_python() {
    for name in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer with venv and pip was found: install one (Debian: apt-get install python3 python3-venv) and run this again"
}

# Without pip it is half of an environment: its making was interrupted.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "Making .venv with $("$python" --version) ..." >&2
    "$python" -m venv --clear .venv || fail "$PWD/.venv could not be made; see above"
fi
echo "Installing llmtune${extras:+ with [$extras]} by $constraints ..." >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable ".${extras:+[$extras]}" ||
    fail "the packages could not be installed; check the network and the free disk space, and run this again"
echo "$wanted" >"$stamp"
