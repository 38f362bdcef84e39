import multiprocessing
import os

import pytest

from attncc import tuned
from attncc.settings import settings

KEY = tuned.Key("NVIDIA H100", "0123abcd", "forward", "bf16", "d128 q8192 kv8192", "3.7.1")


def record(ms: float = 1.5, **config: int) -> tuned.Record:
    return tuned.Record(KEY, config or {"BLOCK_M": 128, "num_warps": 8}, ms)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    yield tmp_path / "cache"
    settings.cache_clear()


def store_many(cache_dir: str, process: int) -> None:
    os.environ["ATTNCC_CACHE_DIR"] = cache_dir
    settings.cache_clear()
    for n in range(50):
        key = tuned.Key("gpu", f"program {process} {n}", "forward", "bf16", "x" * 200, "3.7.1")
        tuned.store(tuned.Record(key, {"BLOCK_M": n}, 1.0))


def test_a_missing_file_holds_nothing():
    assert tuned.load() == {}
    assert tuned.lookup(KEY) is None


def test_a_record_comes_back_and_a_later_one_replaces_it():
    tuned.store(record())
    assert tuned.lookup(KEY) == record()
    tuned.store(record(0.5, BLOCK_M=64))
    assert tuned.lookup(KEY) == record(0.5, BLOCK_M=64)


def test_a_line_reads_back_as_the_record():
    assert tuned.parse(record().line()) == record()


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "null", "[]", "{}", "\x00", "[" * 100_000,
        record().line()[:-3],
        record().line().replace("128", '"128"'),
        record().line().replace("1.5", "true"),
        record().line().replace('"bf16"', "16"),
    ],
)  # fmt: skip
def test_garbage_is_no_record(line):
    assert tuned.parse(line) is None


def test_records_survive_garbage_and_half_a_line():
    tuned.store(record())
    with tuned.path().open("ab") as file:
        file.write(b"\xff\xfe garbage\n" + record().line().encode()[:40])
    tuned.store(record(0.25))
    assert tuned.load() == {KEY: record(0.25)}


def test_many_processes_append(cache_dir):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(store_many, [(str(cache_dir), n) for n in range(4)])
    assert len(tuned.load()) == 200
    assert len(tuned.path().read_text().splitlines()) == 200
