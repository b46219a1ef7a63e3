"""The recipes and suites that ship: inside the wheel, or beside the package in a clone."""

from pathlib import Path


def shipped_files(folder: str, pattern: str = "*.yaml") -> dict[str, Path]:
    """Return name -> file of what ships in `folder` (`configs` or `evals`), by bare name."""
    package_dir = Path(__file__).parent.parent
    found: dict[str, Path] = {}
    for place in (package_dir.parent / folder, package_dir / folder):
        found |= {path.stem: path for path in sorted(place.glob(pattern))}
    return found
