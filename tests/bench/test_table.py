import builtins
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from attncc.bench import chart, run, table
from attncc.bench.cases import Options
from attncc.bench.rows import ROWS
from attncc.errors import ArgumentError, UnsupportedError

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "h100.json"


def timing(ms: float) -> dict:
    return {"ms": ms, "tflops": 500 / ms, "rounds_ms": [ms]}


def row(title: str, results: dict, **reasons: dict) -> dict:
    shown = {"row": title, "group": "main", "shape": "B1 H2 N64 D64", "dtype": "bfloat16"}
    found = {"left_out": {}, "failed": {}, "wrong": {}, **reasons}
    return {**shown, "density": 0.25, "results": results, **found}


RESULTS = {
    "machine": {"device": "A GPU", "torch": "2.11", "triton": "3.6"},
    "rounds": 3,
    "rows": [
        row(
            "causal",
            {
                "flex": {"forward": timing(2.0), "peak_MiB": 48.0},
                "attncc": {"forward": timing(1.0), "backward": timing(4.0), "plan_ms": 0.0123},
            },
            left_out={"fa4": "is not here"},
            failed={"cudnn": "RuntimeError: no"},
        ),
        row(
            "softcap",
            {"attncc": {"forward": timing(1.0), "cold_s": 2.0}},
            left_out={"fa4": "is not here", "cudnn": "has no score"},
            wrong={"flex": "out[0, 0] is off by 1"},
        ),
    ],
}


def text() -> list[str]:
    file = io.StringIO()
    Console(file=file, width=150, no_color=True).print(table.rendered(RESULTS))
    return file.getvalue().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]


def test_a_line_holds_what_is_known_of_a_contestant():
    lines = text()
    assert "A GPU, torch 2.11, triton 3.6; TFLOP/s over kept pairs, median of 3" in lines[0]
    heads = [line for line in lines if "┃" in line and "forward" in line]
    assert cells(heads[0])[1:] == [
        *("forward", "backward", "forward", "backward"),
        *("first call", "plan", "peak"),
    ]
    own = cells(next(line for line in lines if "  attncc " in line))
    flex = cells(next(line for line in lines if "  FlexAttention " in line))
    assert own == ["attncc", "500", "125", "1.00", "4.00", "", "0.0123", ""]
    assert flex == ["FlexAttention", "250", "", "2.00", "", "", "", "48.0"]


def test_the_best_of_a_row_is_bold():
    file = io.StringIO()
    Console(file=file, width=150, force_terminal=True).print(table.rendered(RESULTS))
    bold = re.findall(r"\x1b\[1m *([\d.]+) *\x1b", file.getvalue())
    assert bold == ["500", "125", "500"]


def test_notes_say_each_reason_once():
    assert list(table.notes(RESULTS["rows"])) == [
        "cuDNN failed: RuntimeError: no (causal, B1 H2 N64 D64)",
        "FA4 is not here",
        "FlexAttention WRONG: out[0, 0] is off by 1 (softcap, B1 H2 N64 D64)",
        "cuDNN has no score (softcap, B1 H2 N64 D64)",
    ]


def test_a_row_in_one_line_has_the_ratio_to_flex():
    line, note = run.line(RESULTS["rows"][0]).splitlines()
    assert line.split("N64 D64")[1].split() == [
        *("FlexAttention", "250", "attncc", "500", "/", "125", "=", "2.00x")
    ]
    assert note.strip() == "cuDNN failed: RuntimeError: no"


def test_attncc_alone_decides_whether_a_run_is_sound():
    assert run.is_sound(RESULTS)
    failed = row("full", {}, failed={"attncc": "ValueError"})
    tuned = row("full", {"attncc": {}}, wrong={"tuned": "out is not finite"})
    for bad in (failed, tuned):
        assert not run.is_sound({**RESULTS, "rows": [*RESULTS["rows"], bad]})


def test_a_row_that_breaks_ends_the_run_and_keeps_the_others(monkeypatch):
    def measure(row, options):
        if row.title != "full":
            raise RuntimeError("an illegal memory access")
        return RESULTS["rows"][0]

    monkeypatch.setattr(run, "_row", measure)
    told, kept = [], []
    options = Options("cpu", torch.float32, ("attncc",))
    results = run.measured(ROWS[:3], options, told.append, kept.append)
    assert results["rows"] == [RESULTS["rows"][0]] and len(kept) == 1
    expected = "stopped at causal, B2 H16 N8192 D128: RuntimeError: an illegal memory access"
    assert results["stopped"] == told[-1] == expected
    assert not run.is_sound(results)


def test_a_spent_budget_leaves_rows():
    options = Options("cpu", torch.float32, ("attncc",), time_budget=0.0)
    told = []
    assert run.measured(ROWS, options, told.append, lambda results: None)["rows"] == []
    assert told == ["stopped: the time budget of 0 s is spent"]


@pytest.mark.parametrize("results", [RESULTS, json.loads(RECORDED.read_text())])
def test_a_chart_has_a_bar_for_each_speed(results, tmp_path):
    pytest.importorskip("matplotlib")
    chart.save(results, tmp_path / "c.svg")
    chart.save(results, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    drawn = ElementTree.parse(tmp_path / "c.svg").getroot()
    texts = [node.text for node in drawn.iter() if node.tag.endswith("text")]
    for shown in results["rows"]:
        assert shown["row"] in texts
        for name, found in shown["results"].items():
            assert table.TITLES[name] in texts
            for way in table.DIRECTIONS:
                if way in found:
                    assert table.digits(found[way]["tflops"]) in texts


def test_a_chart_is_svg_or_png():
    with pytest.raises(ArgumentError, match=r"--chart is 'c.pdf'\n.*a .svg or a .png"):
        chart.check(Path("c.pdf"))


def test_a_chart_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"pip install 'attncc\[plot\]'"):
        chart.check(Path("c.svg"))
