import os

import torch

from attncc.bench import run
from attncc.bench.cases import Asked, Options
from attncc.bench.first_call import CACHES, Job, empty_caches, first_calls
from attncc.bench.rows import ROWS, Row
from attncc.frontend import load
from attncc.inputs import Lengths
from attncc.settings import settings

OPTIONS = Options("cpu", torch.float32, ("attncc", "flash"), eager=True)
SMALL = Lengths(1, 2, 1, 128, 128, 16)


def test_first_calls_are_timed_in_processes_of_their_own():
    """Rows and programs travel; a contestant that is left out is an error, and no more."""
    text = "attention x(w: int, s: float[heads]):\n    mask = q_idx - kv_idx < w\n    sink = s[h]\n"
    asked = Asked(load(text), SMALL, {"w": 4}, {"s": torch.zeros(2)})
    jobs = [
        Job(ROWS[4].shaped(SMALL), "attncc", OPTIONS, cold=True),
        Job(asked, "attncc", OPTIONS),
        Job(asked, "flash", OPTIONS),
    ]
    found = {outcome.task: outcome for outcome in first_calls(jobs)}
    assert 0 < found[0].value < 60 > found[1].value > 0
    assert "LeftOut" in found[2].error and "needs a GPU" in found[2].error


def test_caches_are_empty_for_a_while(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    monkeypatch.delenv("CUDA_CACHE_PATH", raising=False)
    old = settings().cache_dir
    with empty_caches():
        places = [os.environ[name] for name in CACHES]
        assert len(set(places)) == len(CACHES) and not any(map(os.path.exists, places))
        assert str(settings().cache_dir) == os.environ["ATTNCC_CACHE_DIR"]
    assert os.environ["TRITON_CACHE_DIR"] == "before" and "CUDA_CACHE_PATH" not in os.environ
    assert settings().cache_dir == old


def test_rows_are_compiled_ahead_in_processes_and_failures_told():
    rows = [ROWS[1].shaped(SMALL), Row("no such row", SMALL, "main")]
    told = list(run.compile_ahead(rows, OPTIONS, workers=1))
    assert [line.split(" at ")[0] for line in told] == ["no such row: KeyError"]
