"""oneDNN's cache and OpenMP's waiting are as llmtune says, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

from llmtune.io.native_libraries import (
    CAPACITY,
    ONEDNN_CAPACITY,
    SPIN_ROUNDS,
    VARIABLES,
    WAITING_VARIABLES,
    limit_kernel_cache,
    limit_spinning,
    read_capacity,
    threads_sleep,
)

FIRST_AGAIN = """
import {package}
import torch
weight = torch.ones(32, 16, dtype=torch.bfloat16)
for tokens in (*range(40, 40 + {others}), 40):
    torch.ones(tokens, 32, dtype=torch.bfloat16) @ weight
"""


def run_python(code, **variables):
    unset = (*VARIABLES, *WAITING_VARIABLES)
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_importing_llmtune_sets_it_before_torch_is_there():
    code = f"import llmtune, os, sys; print(os.environ['{VARIABLES[0]}'], 'torch' in sys.modules)"
    assert run_python(code).split() == [str(CAPACITY), "False"]


def test_a_process_started_by_llmtune_has_it_too():
    child = f"import os; print(os.environ['{VARIABLES[0]}'])"
    code = f"import llmtune, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_python(code).strip() == str(CAPACITY)


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["0", "64", "4096"])
def test_the_users_own_number_stays(name, value):
    environ = {name: value}
    limit_kernel_cache(environ)
    assert environ == {name: value}
    assert read_capacity(environ) == int(value)


def test_the_name_that_onednn_reads_first_wins():
    assert read_capacity({VARIABLES[1]: "5", VARIABLES[0]: "7"}) == 7


def test_without_llmtunes_number_it_is_onednns_own():
    assert read_capacity({}) == ONEDNN_CAPACITY > CAPACITY


@pytest.mark.parametrize(
    ("package", "others", "found_again"),
    [("llmtune", CAPACITY - 8, True), ("llmtune", CAPACITY + 8, False), ("os", CAPACITY + 8, True)],
)
def test_onednn_forgets_what_is_more(package, others, found_again):
    """The first of so many products is computed again: kept, or compiled once more?"""
    code = FIRST_AGAIN.format(package=package, others=others)
    shown = run_python(code, ONEDNN_VERBOSE="profile_create")
    products = [line for line in shown.splitlines() if ",matmul," in line]
    if not products:
        pytest.skip("this CPU's 16-bit products do not go through oneDNN")
    assert all("create:cache_miss" in line for line in products[:-1])
    assert ("create:cache_hit" in products[-1]) is found_again


SHOWN = "; print(os.environ.get('GOMP_SPINCOUNT'), torch.get_num_threads())"


@pytest.mark.parametrize(
    ("code", "variables", "spins"),
    [
        ("import llmtune, os, torch", {}, str(SPIN_ROUNDS)),
        # OpenMP has read its environment by then: what cannot hold any more is not claimed.
        ("import torch, llmtune, os", {}, "None"),
        ("import llmtune, os, torch", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import llmtune, os, torch", {"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_are_told_to_sleep_before_torch_is_there(code, variables, spins):
    assert run_python(code + SHOWN, **variables).split()[0] == spins


def test_openmp_reads_what_llmtune_sets():
    """GNU OpenMP prints what it runs with when PyTorch loads it."""
    rest = {name: value for name, value in os.environ.items() if name not in WAITING_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", "import llmtune, torch"],
        env={**rest, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch does not run on GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{SPIN_ROUNDS}'" in done.stderr


@pytest.mark.parametrize(
    ("environ", "sleeps"),
    [
        ({}, False),
        ({"GOMP_SPINCOUNT": str(SPIN_ROUNDS)}, True),
        ({"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": "passive"}, False),
        ({"GOMP_SPINCOUNT": "infinity"}, False),
        ({"OMP_WAIT_POLICY": " Passive "}, True),
        ({"OMP_WAIT_POLICY": "active"}, False),
    ],
)
def test_whether_threads_sleep_is_read_as_openmp_does(environ, sleeps):
    assert threads_sleep(environ) is sleeps
    before = dict(environ)
    limit_spinning(environ)
    assert environ == (before or {"GOMP_SPINCOUNT": str(SPIN_ROUNDS)})
