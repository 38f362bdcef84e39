import multiprocessing
import os
from dataclasses import replace

import pytest

from attncc import tuned
from attncc.backends.gluon import configs as gluon
from attncc.backends.triton import configs as triton
from attncc.backends.triton import schedules
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


def read_often(cache_dir: str, ready) -> int:
    """How many records there were at last, none of them lost on the way."""
    os.environ["ATTNCC_CACHE_DIR"] = cache_dir
    settings.cache_clear()
    ready.wait()
    seen = 0
    while seen < 200:
        found = tuned.load()
        assert seen <= len(found)
        assert all(r.key == k and r.ms == 1.0 and len(k.shape) == 200 for k, r in found.items())
        seen = len(found)
    return seen


def test_processes_read_whole_records_while_others_write(cache_dir):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(6) as pool:
        ready = manager.Event()
        readers = [pool.apply_async(read_often, (str(cache_dir), ready)) for _ in range(2)]
        writers = pool.starmap_async(store_many, [(str(cache_dir), n) for n in range(4)])
        ready.set()
        assert [reader.get(timeout=60) for reader in readers] == [200, 200]
        writers.get(timeout=60)


def test_many_processes_append(cache_dir):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(store_many, [(str(cache_dir), n) for n in range(4)])
    assert len(tuned.load()) == 200
    assert len(tuned.path().read_text().splitlines()) == 200


# -- records that come with the package


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    file = tmp_path / "shipped.jsonl"
    monkeypatch.setattr(tuned, "SHIPPED", file)
    return file


def test_own_records_go_before_shipped_ones(shipped):
    other = replace(KEY, program="other")
    lines = record(1.0, BLOCK_M=32).line(), replace(record(2.0), key=other).line()
    shipped.write_text("\n".join(lines) + "\n")
    assert tuned.lookup(KEY) == record(1.0, BLOCK_M=32)
    tuned.store(record(3.0, BLOCK_M=64))
    assert tuned.load() == {KEY: record(3.0, BLOCK_M=64), other: replace(record(2.0), key=other)}
    assert tuned.shipped().keys() == {KEY, other}


def test_records_keep_the_versions_they_were_made_with(shipped):
    shipped.write_text(record(1.0).line())
    for newer in (replace(KEY, triton="9.9"), replace(KEY, attncc="9.9")):
        assert tuned.lookup(newer) is None
        tuned.store(replace(record(2.0), key=newer))
        assert tuned.lookup(newer) == replace(record(2.0), key=newer)
    assert tuned.lookup(KEY) == record(1.0)


def test_shipped_records_hold_where_own_ones_cannot_be_read(shipped, cache_dir):
    shipped.write_text(record(1.0).line())
    cache_dir.mkdir(mode=0o700)
    tuned.path().mkdir()
    schedules.database.cache_clear()
    assert schedules.database() == {KEY: record(1.0)}
    schedules.database.cache_clear()


def test_every_shipped_line_is_a_record_of_a_schedule():
    lines = tuned.SHIPPED.read_text().splitlines()
    found = [tuned.parse(line) for line in lines]
    assert len(tuned.shipped()) == len(lines)
    for one in found:
        assert one is not None
        assert one.key.kernel in (*triton.KERNELS, *gluon.KERNELS)
        assert schedules.config_of(one) is not None
        assert one.ms > 0
