"""The doctor names what would make a run faster, with the line to type, and changes nothing."""

import os
import subprocess
import sys

import pytest

from llmtune.runs.doctor import check_allocator, check_threads, examine, library_dirs


@pytest.fixture
def maps(tmp_path):
    path = tmp_path / "maps"
    path.write_text("7f00-7f01 r-xp 0 00:00 1 /usr/lib/libc.so.6\n")
    return path


@pytest.mark.parametrize("name", ["libtcmalloc_minimal.so.4", "libtcmalloc.so.4.5.9"])
def test_a_tcmalloc_that_could_be_preloaded_is_named_with_its_line(maps, tmp_path, name):
    (tmp_path / name).touch()
    finding = check_allocator(maps, [tmp_path / "absent", tmp_path])
    assert finding.state == "note"
    assert "1.2 times" in finding.found
    assert "measured once" in finding.found
    assert finding.fix == f"export LD_PRELOAD={tmp_path / name}"


def test_the_minimal_library_is_preferred(maps, tmp_path):
    for name in ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4"):
        (tmp_path / name).touch()
    assert check_allocator(maps, [tmp_path]).fix.endswith("libtcmalloc_minimal.so.4")


def test_a_preloaded_tcmalloc_is_fine(maps, tmp_path):
    (tmp_path / "libtcmalloc.so.4").touch()
    maps.write_text("7f00-7f01 r-xp 0 00:00 1 /usr/lib/libtcmalloc_minimal.so.4.5.9\n")
    finding = check_allocator(maps, [tmp_path])
    assert (finding.state, finding.fix) == ("ok", None)


def test_a_machine_without_tcmalloc_hears_what_it_would_give(maps, tmp_path):
    finding = check_allocator(maps, [tmp_path])
    assert finding.state == "ok"
    assert "no tcmalloc is installed" in finding.found


def test_the_environments_own_libraries_come_first(tmp_path):
    assert library_dirs({"LD_LIBRARY_PATH": f"{tmp_path}:"})[0] == tmp_path
    assert library_dirs({})[0].name == "lib"


def test_the_line_to_type_is_seen_by_the_next_process(tmp_path):
    """What the doctor advises it also recognizes: an empty library of that name, really loaded."""
    library = tmp_path / "libtcmalloc_minimal.so.4"
    compiler = next((c for c in ("cc", "gcc") if _runs(c)), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    subprocess.run([compiler, "-shared", "-o", str(library), "-x", "c", "/dev/null"], check=True)
    program = (
        "from pathlib import Path\n"
        "from llmtune.runs.doctor import check_allocator\n"
        "print(check_allocator(Path('/proc/self/maps'), []).found)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "tcmalloc is preloaded"


def _runs(command: str) -> bool:
    try:
        return subprocess.run([command, "--version"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_a_busy_machine_and_spinning_threads_are_a_note():
    finding = check_threads(0.9, {"OMP_NUM_THREADS": "2"})
    assert finding.state == "note"
    assert "OMP_WAIT_POLICY=passive" in finding.fix
    assert finding.found.startswith("2; 90%")


@pytest.mark.parametrize(
    ("busy", "environ"),
    [(0.9, {"OMP_WAIT_POLICY": "PASSIVE"}), (0.9, {"GOMP_SPINCOUNT": "1000"}), (0.05, {})],
)
def test_sleeping_threads_or_an_idle_machine_are_fine(busy, environ):
    assert check_threads(busy, environ).state == "ok"


def test_examining_leaves_the_environment_alone():
    names = ("LD_PRELOAD", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    before = {name: os.environ.get(name) for name in names}
    subjects = {finding.subject for finding in examine()}
    assert {"memory allocator", "OpenMP threads"} <= subjects
    assert {name: os.environ.get(name) for name in names} == before
