"""What every training test shares."""

import gc

import pytest


@pytest.fixture(scope="package", autouse=True)
def imported_libraries_are_no_garbage():
    """accelerate collects garbage before every run; do not let it walk the libraries each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
