#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and run it there, away from this clone.
# Usage: scripts/check_wheel.sh    (LLMTUNE_WHEEL_DIR: where the wheel goes, dist/ by default)
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD"
out="${LLMTUNE_WHEEL_DIR:-dist}"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python="$root/.venv/bin/python"
if [ ! -x "$python" ]; then
    python=python3
fi
"$python" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip --quiet --disable-pip-version-check)
rm -f "$out"/llmtune-*.whl
"${pip[@]}" wheel --no-deps --wheel-dir "$out" "$root"
wheel="$(echo "$out"/llmtune-*.whl)"
"${pip[@]}" install --constraint constraints.txt "$wheel"

cd "$scratch"
llmtune="$scratch/venv/bin/llmtune"
"$llmtune" --version
"$llmtune" --help >/dev/null
"$llmtune" config list
"$llmtune" config copy quickstart mine.yaml
"$llmtune" config show mine.yaml model.base=org/name >/dev/null
"$llmtune" doctor
echo "The wheel installs and runs: $(basename "$wheel")"
