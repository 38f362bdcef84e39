from pathlib import Path

import pytest

from attncc.errors import ArgumentError
from attncc.settings import Debug, read, unknown_variables


def test_nothing_set_means_quiet_auto_and_the_users_cache():
    found = read({})
    assert found.debug is Debug.QUIET
    assert found.backend == "auto"
    assert found.cache_dir == Path.home() / ".cache" / "attncc"


def test_values_are_typed():
    found = read(
        {"ATTNCC_DEBUG": "3", "ATTNCC_BACKEND": "cpu", "ATTNCC_CACHE_DIR": "~/kernels"},
    )
    assert found.debug is Debug.PASSES
    assert found.backend == "cpu"
    assert found.cache_dir == Path.home() / "kernels"


def test_the_cache_follows_xdg_and_ignores_a_relative_path():
    assert read({"XDG_CACHE_HOME": "/fast"}).cache_dir == Path("/fast/attncc")
    assert read({"XDG_CACHE_HOME": "fast"}).cache_dir == Path.home() / ".cache" / "attncc"


@pytest.mark.parametrize("value", ["5", "-1", "yes", "1.0", " 1"])
def test_a_wrong_debug_level_says_what_it_takes(value):
    with pytest.raises(ArgumentError, match=r"ATTNCC_DEBUG is .*\n.*3 passes"):
        read({"ATTNCC_DEBUG": value})


def test_a_wrong_backend_is_corrected():
    with pytest.raises(ArgumentError, match="did you mean 'triton'"):
        read({"ATTNCC_BACKEND": "tritn"})


def test_mistyped_variables_are_found():
    assert unknown_variables({"ATTNCC_DEBGU": "1", "ATTNCC_DEBUG": "1", "HOME": "/"}) == (
        "ATTNCC_DEBGU",
    )
