"""The command line through click's runner; start-up and exit codes in their own processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from attncc.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKED = str(EXAMPLES / "packed.attn")
STREAMING = str(EXAMPLES / "streaming.attn")

LIGHT = "import sys; from attncc.cli import main; main({args!r}, standalone_mode=False); "
HEAVY = "assert not {'torch', 'triton', 'sympy', 'numpy', 'rich'} & set(sys.modules)"


def invoke(*args: object):
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def succeed(*args: object) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args: object) -> str:
    result = invoke(*args)
    assert result.exit_code != 0, result.output
    return result.stderr


@pytest.fixture
def program(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "program.attn"
        path.write_text(text)
        return path

    return write


# -- start-up


@pytest.mark.parametrize("args", [["--help"], ["bench", "--help"], ["check", PACKED]])
def test_light_commands_import_nothing_heavy(args):
    script = LIGHT.format(args=args) + HEAVY
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("args", [["--help"], ["bench", "--help"], ["check", PACKED]])
def test_light_commands_start_quickly(args):
    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "attncc", *args], check=True, capture_output=True)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])

    # 0.1 and 0.25 s on an idle machine; with importing torch it would be 2 s, on a busy one more.
    assert min(seconds() for _ in range(3)) < 0.7


def test_a_mistake_ends_the_process_with_code_1(tmp_path):
    args = [sys.executable, "-m", "attncc", "explain", str(tmp_path / "none.attn")]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no file")
    assert "Traceback" not in done.stderr


# -- check


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.attn")), ids=lambda path: path.stem)
def test_check_accepts_the_examples(path):
    assert f"{path}: ok, 1 program" in succeed("check", path)


def test_check_points_at_the_mistake(program):
    text = fail("check", program("attention f():\n    mask = q_idx >= kv_idxx\n"))
    assert "program.attn:2:21" in text
    assert "    mask = q_idx >= kv_idxx\n" in text and "^^^^^^^" in text
    assert "kv_idx'" in text, "the close name"


def test_check_goes_on_after_a_mistake(program):
    result = invoke("check", program("attention f(:\n"), PACKED)
    assert result.exit_code == 1
    assert "ok, 1 program (packed)" in result.stdout


def test_check_json_is_one_object_a_file(program):
    result = invoke("check", PACKED, program("attention f():\n    mask = 1\n"), "--json")
    good, bad = map(json.loads, result.stdout.splitlines())
    assert good["ok"] and good["programs"][0]["name"] == "packed"
    assert "window: int = 1024" in good["programs"][0]["parameters"]
    assert not bad["ok"] and bad["error"]["line"] == 2 and bad["error"]["message"]
    assert result.exit_code == 1


# -- explain


def test_explain_says_tier_ranges_counts_and_draws():
    text = succeed("explain", STREAMING, "--q-len", 512, "--tile", "128x128", "--set", "window=200")
    assert "tier 1" in text
    assert "max(0, q_lo - window + 1) <= kv_idx < min(q_last + 1, kv_len)" in text
    # Windows of 200 reach into the two tiles before; the sinks are in the first.
    assert "tiles: 0 full, 10 partial, 6 empty" in text
    assert "▒▒▒▒▒▒··" in text
    assert "as tight as evaluating every pair" in text


@pytest.mark.parametrize(
    ("dim", "line"),
    [
        (64, "gluon's kernels for bf16 and fp16, triton's for fp32 and deterministic backwards"),
        (20, "not gluon's: its output's rows are multiples of 16 bytes, and v has 20"),
        (512, "no kernels for head dims above 256; backend='dense' has no limit"),
    ],
)
def test_explain_says_which_kernels_run(dim, line):
    options = ("--q-len", 128, "--head-dim", dim)
    assert line in succeed("explain", STREAMING, *options)


def test_explain_packs_real_documents():
    text = succeed("explain", PACKED, "--q-len", 1024)
    assert "tier 1" in text
    assert "first_key_0[b, q_idx]: the first kv_idx with doc[b, kv_idx] >= doc[b, q_idx]" in text
    assert "doc[b, kv_idx] (proved in range)" in text


def test_explain_says_what_lists_are_made_from():
    text = succeed("explain", EXAMPLES / "share_question.attn", "--q-len", 1024)
    assert "tier 2" in text
    assert "lowest(doc[b, q_idx])" in text


def test_explain_json_holds_the_same():
    found = json.loads(succeed("explain", STREAMING, "--q-len", 512, "--heads", 3, "--json"))
    assert found["plan"]["tier"] == 1
    assert sum(found["counts"].values()) == 3 * 16
    assert len(found["tiles"]) == 4
    assert found["scalars"] == {"window": 1024, "sinks": 4}
    low, high = found["density"]
    assert low == high == pytest.approx(0.5, abs=0.01)


def test_explain_draws_files(tmp_path):
    pytest.importorskip("matplotlib")
    svg, png = tmp_path / "tiles.svg", tmp_path / "tiles.png"
    succeed("explain", PACKED, "--q-len", 512, "--svg", svg, "--png", png)
    assert svg.read_text().startswith("<svg")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_explain_reads_a_given_tensor(tmp_path):
    doc = np.repeat(np.arange(4), 128)[None]
    np.save(tmp_path / "doc.npy", doc)
    given = f"doc={tmp_path / 'doc.npy'}"
    found = json.loads(succeed("explain", PACKED, "--q-len", 512, "--tensor", given, "--json"))
    assert found["tiles"] == [[int(q == k) for k in range(4)] for q in range(4)]
    assert found["inputs"] == {"doc": "given"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "windw=3"], "has no scalar parameter 'windw'\n    did you mean 'window'?"),
        (["--set", "window=3.5"], "window is '3.5', and is declared int"),
        (["--set", "window"], "--set is 'window'\n    write --set name=value"),
        (["--tile", "128"], "it takes queries x keys, such as 128x64"),
        (["--tensor", "dok=x.npy"], "cannot read 'x.npy' for dok"),
        (["--name", "pakced"], "did you mean 'packed'?"),
        (["--heads", "4", "--kv-heads", "3"], "does not divide 4"),
    ],
)
def test_explain_says_which_option_is_wrong(options, message):
    assert message in fail("explain", PACKED, *options)


def test_a_scalar_without_a_default_is_asked_for(program):
    path = program("attention f(window: int):\n    mask = q_idx - kv_idx < window\n")
    assert "f needs a value for window\n    --set window=..." in fail("explain", path)


# -- emit


def test_emit_compiles_for_a_gpu_that_is_not_there(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "kernels"
    options = "--target", "sm_90", "--head-dim", 64, "--backend", "triton"
    text = succeed("emit", STREAMING, *options, "-o", out)
    rows = [line.split() for line in text.splitlines() if line.startswith("sm_90")]
    assert [row[1] for row in rows] == ["forward", "delta", "backward_kv", "backward_q"]
    forward = (out / "sm_90" / "streaming_forward.py").read_text()
    assert "attention streaming(window: int = 1024, sinks: int = 4):" in forward
    assert "wgmma" in (out / "sm_90" / "forward.ptx").read_text()


def test_emit_corrects_a_target_and_a_dtype():
    pytest.importorskip("triton")
    assert "did you mean 'sm_90'" in fail("emit", STREAMING, "--target", "sm_9")
    assert "did you mean 'bf16'" in fail("emit", STREAMING, "--dtype", "bf61")


def test_emit_prints_for_another_triton(tmp_path):
    pytest.importorskip("triton")
    for version, name in (("3.6.0", "tma.async_copy_shared_to_global"), ("3.9", "tma.async_store")):
        options = ("--target", "sm_90", "--triton", version)
        succeed("emit", STREAMING, *options, "-o", tmp_path / version)
        assert name in (tmp_path / version / "sm_90/streaming_gluon_forward.py").read_text()
    assert "kernels need Triton 3.6 or later, not 3.5" in fail(
        "emit", STREAMING, "--triton", "3.5", "-o", tmp_path
    )
    assert "say where to, with -o" in fail("emit", STREAMING, "--triton", "3.9")


def test_emit_compiles_the_backend_asked_for(tmp_path):
    pytest.importorskip("triton")
    options = ("--target", "sm_90", "--head-dim", 64)
    text = succeed("emit", STREAMING, *options, "--backend", "gluon", "-o", tmp_path)
    rows = [line.split() for line in text.splitlines() if line.startswith("sm_90")]
    assert [row[1] for row in rows] == ["gluon_forward", "delta", "gluon_backward", "round_dq"]
    assert "@gluon.jit" in (tmp_path / "sm_90" / "streaming_gluon_forward.py").read_text()
    assert "did you mean 'gluon'" in fail("emit", STREAMING, "--backend", "gluno")
    wrong = ("--dtype", "fp32"), ("--target", "sm_80"), ("--value-dim", 20)
    reasons = "q is float32", "it is for sm_90, not sm_80", "v has 20 columns"
    for option, reason in zip(wrong, reasons, strict=True):
        given = ("--backend", "gluon", "--target", "sm_90", *option)
        assert reason in fail("emit", STREAMING, *given)


# -- doctor


def test_doctor_says_what_there_is():
    text = succeed("doctor")
    for topic in ("python", "torch", "triton", "gpu", "backends", "cache"):
        assert topic in text


def test_doctor_finds_a_mistyped_variable(monkeypatch):
    monkeypatch.setenv("ATTNCC_DEBGU", "1")
    assert "ATTNCC_DEBGU" in succeed("doctor")


# -- run, tune, bench


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.attn")), ids=lambda path: path.stem)
def test_run_checks_every_example(path):
    text = succeed("run", path, "--q-len", 200, "--device", "cpu", "--no-peers")
    assert "  ok\n" in text
    assert "attncc  " in text and " ms" in text


def test_run_names_the_documents_it_packed():
    assert ".py (" in succeed("run", PACKED, "--q-len", 300, "--device", "cpu", "--no-peers")


def test_bench_writes_what_it_finds_of_a_file(tmp_path):
    out = tmp_path / "new" / "b.json"
    asked = ("--lengths", "64,128", "--head-dims", "16,32", "--heads", 2, "--set", "window=32")
    how = ("--device", "cpu", "--peer", "sdpa", "--rounds", 1, "--rep", 1, "--speed-only")
    text = succeed("bench", STREAMING, *asked, *how, "--date", "today", "--json", out)
    found = json.loads(out.read_text())
    sizes = [f"B1 H2 N{n} D{d}" for n in (64, 128) for d in (16, 32)]
    assert [row["shape"] for row in found["rows"]] == sizes
    assert found["date"] == "today" and found["machine"]["torch"]
    for row in found["rows"]:
        assert list(row["results"]) == ["attncc", "sdpa"] and row["row"] == "streaming"
        assert all(of["backward"]["tflops"] > 0 for of in row["results"].values())
    assert "first call" not in text and all(size in text for size in sizes)


def test_bench_rehearses_the_table(tmp_path, monkeypatch):
    """All of a run, tiny: who is absent, who fails, who is wrong, costs, a chart."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("attncc.cli.bench.REHEARSED", 192)
    monkeypatch.setattr("attncc.bench.contestants.sdpa", double_of_attncc)
    out, chart = tmp_path / "b.json", tmp_path / "b.svg"
    rows = ("--rows", "causal documents", "--rows", "softcap", "--tuned", "--rounds", 2, "--rep", 1)
    text = succeed("bench", "--rehearse", *rows, "--cold", "--json", out, "--chart", chart)
    found = json.loads(out.read_text())
    assert [row["row"] for row in found["rows"]] == ["causal documents, 12", "softcap 30, causal"]
    for row in found["rows"]:
        costs = {"plan_ms", "forward_host_us", "backward_host_us", "warm_s", "cold_s"}
        assert costs <= set(row["results"]["attncc"])
        assert len(row["results"]["attncc"]["backward"]["rounds_ms"]) == 2
        assert set(row["results"]["flex"]) == {*costs - {"backward_host_us"}, "forward"}
        assert row["left_out"]["varlen"] == row["left_out"]["cudnn"] == "needs a GPU"
        assert row["left_out"]["fa4"] == "is not here: flash-attn-4 is not installed"
        assert row["failed"]["tuned"].startswith("UnsupportedError: tune times GPU kernels")
        assert row["wrong"]["sdpa"].startswith("out[0, 0] is off by 1 in norm")
    for words in ("causal documents, 12, ", "FlexAttention ", "SDPA, masked WRONG: out[0, 0]"):
        assert words in text
    assert "cold, s" in text and "FA4 is not here: flash-attn-4 is not installed\n" in text
    assert "softcap 30, causal" in chart.read_text()


def double_of_attncc(problem):
    from attncc.bench.contestants import Contestant, own

    right = own(problem)
    return Contestant(lambda q, k, v: 2 * right.call(q, k, v), right.inputs, right.dout)


def test_bench_fails_where_attncc_does(monkeypatch):
    monkeypatch.setattr("attncc.bench.contestants.own", double_of_attncc_itself)
    how = ("--q-len", 64, "--device", "cpu", "--peer", "sdpa", "--quick")
    result = invoke("bench", STREAMING, *how)
    assert result.exit_code == 1
    assert "attncc WRONG: out[0, 0] is off" in result.stdout


def double_of_attncc_itself(problem):
    from attncc.bench.contestants import Contestant, sdpa

    right = sdpa(problem)
    return Contestant(lambda q, k, v: 2 * right.call(q, k, v), right.inputs, right.dout)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--heads", 8), "--heads goes with a FILE"),
        ((STREAMING, "--rows", "main"), "--rows goes with no FILE"),
        (("--rehearse", "--peer", "flexx"), "there is no peer 'flexx'\n    did you mean 'flex'"),
        (("--rehearse", "--rows", "fluff"), "no row is 'fluff'\n    groups are main, d64, wide"),
        ((STREAMING, "--lengths", "64,many"), "--lengths is '64,many'\n    it takes numbers"),
        (("--chart", "c.pdf"), "--chart is 'c.pdf'"),
    ],
)
def test_bench_says_what_it_cannot_take(args, message):
    assert message in fail("bench", *args)


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_the_table_wants_a_gpu():
    assert "the table's rows want a GPU\n    attncc bench FILE runs on a CPU" in fail("bench")


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_tune_and_cuda_say_that_there_is_no_gpu():
    for command in ("tune", "run"):
        args = (command, STREAMING, *(["--device", "cuda"] if command == "run" else []))
        assert "there is no cuda\n    `attncc doctor`" in fail(*args)
