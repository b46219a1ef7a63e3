#!/usr/bin/env bash
# Take the README's picture of a run's report: scripts/report_picture.sh [RUN] [PICTURE]
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/quickstart}
picture=${2:-docs/report.png}

browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
    echo "error: no chromium to take the picture with (Debian: apt-get install chromium)" >&2
    exit 2
fi
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
"$browser" --headless=new --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" \
    --blink-settings=preferredColorScheme=1 --window-size=1080,1500 \
    --screenshot="$PWD/$picture" "file://$(realpath "$run/report.html")" 2>/dev/null
.venv/bin/python - "$picture" <<'PYTHON'
import sys
from PIL import Image

# 256 colors are enough for text and lines, and keep the file small.
Image.open(sys.argv[1]).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(sys.argv[1], optimize=True)
PYTHON
echo "$picture: $(stat -c %s "$picture") bytes"
