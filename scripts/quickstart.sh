#!/usr/bin/env bash
# The main job on a real model and real data: set up, fetch, then tune, merge, evaluate and report.
# A second call skips what is finished. Arguments are overrides, such as: adapter.rank=8 run_dir=runs/rank8
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
.venv/bin/python scripts/fetch_quickstart.py
started=$SECONDS
.venv/bin/llmtune run configs/quickstart.yaml "$@"
echo "The main job took $((SECONDS - started)) s after the downloads." >&2
