import multiprocessing
import os

import pytest

from attncc import cache
from attncc.errors import ArgumentError
from attncc.settings import settings

SOURCE = "LINES = '''" + "x\n" * 20_000 + "'''\nANSWER = 42\n"


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield tmp_path / "cache"
    settings.cache_clear()


def write_and_load(cache_dir: str, times: int) -> int:
    os.environ["ATTNCC_CACHE_DIR"] = cache_dir
    settings.cache_clear()
    for _ in range(times):
        path = cache.write_source("shared", SOURCE)
        assert path.read_text() == SOURCE
    return cache.load_module(path).ANSWER


def test_equal_text_is_one_file_with_a_readable_name(cache_dir):
    path = cache.write_source("packed: forward", SOURCE)
    assert path == cache.write_source("packed: forward", SOURCE)
    assert path.name.startswith("packed_forward_") and path.suffix == ".py"
    assert cache.write_source("packed: forward", SOURCE + "#").name != path.name
    assert cache_dir.stat().st_mode & 0o777 == 0o700


def test_a_damaged_file_is_written_anew(cache_dir):
    path = cache.write_source("kernel", SOURCE)
    path.write_text(SOURCE[:100])
    assert cache.write_source("kernel", SOURCE).read_text() == SOURCE


def test_a_module_is_loaded_once_and_leaves_no_bytecode(cache_dir):
    path = cache.write_source("kernel", "def f():\n    return __file__\n")
    module = cache.load_module(path)
    assert module.f() == str(path)
    assert cache.load_module(path) is module
    assert [p.name for p in cache_dir.iterdir()] == [path.name]


def test_a_directory_open_to_others_is_refused(cache_dir):
    cache_dir.mkdir()
    cache_dir.chmod(0o755)
    with pytest.raises(ArgumentError, match=r"open to other users \(mode 0755\)\n.*chmod 700"):
        cache.directory()


def test_another_users_directory_is_refused(cache_dir, monkeypatch):
    cache_dir.mkdir(0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ArgumentError, match="belongs to another user"):
        cache.directory()


def test_a_file_in_the_way_is_an_error(cache_dir):
    cache_dir.write_text("")
    with pytest.raises(ArgumentError, match="cannot be made"):
        cache.directory()


def test_many_processes_write_one_source(cache_dir):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        answers = pool.starmap(write_and_load, [(str(cache_dir), 20)] * 8)
    assert answers == [42] * 8
    assert len(list(cache_dir.iterdir())) == 1, "no temporary file stays"
