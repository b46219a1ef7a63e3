"""oneDNN keeps as many compiled products as llmtune says, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

from llmtune.io.kernel_cache import (
    CAPACITY,
    ONEDNN_CAPACITY,
    VARIABLES,
    limit_kernel_cache,
    read_capacity,
)

FIRST_AGAIN = """
import {package}
import torch
weight = torch.ones(32, 16, dtype=torch.bfloat16)
for tokens in (*range(40, 40 + {others}), 40):
    torch.ones(tokens, 32, dtype=torch.bfloat16) @ weight
"""


def run_python(code, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
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
