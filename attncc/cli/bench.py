"""`attncc bench`: forward and backward beside everybody else, in turns."""

from __future__ import annotations

import json
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from attncc.cli.request import DTYPES, dtype_of, options, place, request
from attncc.errors import ArgumentError, UnsupportedError, suggest

if TYPE_CHECKING:
    from attncc.bench.cases import Case, Options

OF_FILE = (
    *("name", "q_len", "kv_len", "batch", "heads", "kv_heads", "head_dim", "settings", "files"),
    *("lengths", "head_dims", "seed"),
)
"""Options that say how a FILE is called, which the table's rows say themselves."""

REHEARSED = 2560
"""Tokens of a row in a rehearsal: more than its windows and blocks."""

WIDE = 150
"""Characters a line where the table goes to a file."""


@click.command()
@options(q_len=4096, heads=4, required=False)
@click.option("--lengths", metavar="N,N,...", help="Several numbers of queries and keys.")
@click.option("--head-dims", metavar="D,D,...", help="Several head dims.")
@click.option(
    "--rows",
    multiple=True,
    metavar="WORD",
    help="Rows of the table: a group (main, d64, wide, longca) or a word of them; may be repeated.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME",
    help="Beside attncc, only: flex, flex_flash, cudnn, flash, sdpa, varlen, fa4; may be repeated.",
)
@click.option("--tuned", is_flag=True, help="attncc a second time, tuned before.")
@click.option(
    "--tune-budget", type=click.FloatRange(min=1), default=60.0, show_default=True, metavar="S"
)
@click.option("--backward/--no-backward", default=True, help="Time the backward too.")
@click.option("--speed-only", is_flag=True, help="No planning, host times and first calls.")
@click.option("--cold", is_flag=True, help="First calls with empty caches too, which is slow.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--rep", type=click.IntRange(min=1), default=40, show_default=True, metavar="MS")
@click.option("--quick", is_flag=True, help="--speed-only --rounds 1 --rep 15")
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: by device]")
@click.option("--device", help="cuda or cpu.  [default: the best there is]")
@click.option("--workers", type=click.IntRange(min=0), help="That compile ahead.  [default: many]")
@click.option(
    "--time-budget", type=float, default=1e9, metavar="S", help="Rows that come later are left."
)
@click.option("--rehearse", is_flag=True, help="Tiny rows without torch.compile; no real times.")
@click.option("--date", help="Kept with the results.  [default: today]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="All that is found out.")
@click.option("--chart", type=click.Path(path_type=Path), help="A bar chart, .svg or .png.")
@click.pass_context
def bench(ctx: click.Context, /, file: Path | None, **asked: Any) -> None:
    """Time FILE's program beside what else computes it here; without FILE, the table's rows.

    Beside attncc run FlexAttention with its own kernels and with FlashAttention 4's, SDPA by cuDNN
    and by FlashAttention 2, torch's varlen_attn and flash-attn-4, each on rows that it can
    express; a FILE also under SDPA with the whole mask. Whoever is wrong against float64 is told,
    not timed.

    A time is the median over rounds in which all take turns; a turn is the median of calls over
    --rep milliseconds, by the GPU's clock, its L2 flushed before each. TFLOP/s count kept pairs
    alone, five products a backward. plan: for new captured tensors, until the device is done.
    peak: memory of forward and backward beyond inputs and plan. host: of a queued tiny call. First
    calls, forward and backward, are each in a fresh process.
    """
    if asked["chart"]:
        from attncc.bench import chart

        chart.check(asked["chart"])
    _check_pairing(ctx, file)
    options = _options(asked, of_file=file is not None)
    cases = _rows(asked) if file is None else _asked(file, asked)
    if asked["rehearse"]:
        from attncc.bench.cases import shrunk

        cases = [case.shaped(shrunk(case.shape, REHEARSED)) for case in cases]
    _measure(cases, options, asked)


def _check_pairing(ctx: click.Context, file: Path | None) -> None:
    """Options of a FILE go with one, and --rows without."""
    given = [n for n in (*OF_FILE, "rows") if _is_given(ctx, n)]
    for name in given:
        if (name == "rows") == (file is not None):
            option = next(p.opts[0] for p in ctx.command.params if p.name == name)
            how = "no FILE" if name == "rows" else "a FILE"
            raise ArgumentError(f"{option} goes with {how}", hint="attncc bench --help")


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _rows(asked: dict[str, Any]) -> list[Case]:
    import torch

    from attncc.bench.rows import chosen

    rows: list[Case] = [*chosen(asked["rows"])]
    if asked["rehearse"] or (asked["device"] or "cuda") != "cuda" or torch.cuda.is_available():
        return rows
    raise UnsupportedError(
        "the table's rows want a GPU",
        hint="attncc bench FILE runs on a CPU, and --rehearse runs tiny rows",
    )


def _asked(file: Path, asked: dict[str, Any]) -> list[Case]:
    """FILE's program at every length and head dim."""
    from attncc.bench.cases import Asked

    names = "name", "q_len", "kv_len", "batch", "heads", "kv_heads", "head_dim"
    call = {name: asked[name] for name in (*names, "settings", "files", "seed")}
    lengths = _numbers("--lengths", asked["lengths"])
    found: list[Case] = []
    for length, dim in product(lengths, _numbers("--head-dims", asked["head_dims"])):
        own = {} if length is None else {"q_len": length, "kv_len": length}
        own |= {} if dim is None else {"head_dim": dim}
        made = request(file, **(call | own))
        given = made.captured.given
        found.append(Asked(made.program, made.lengths, made.scalars, given, asked["seed"]))
    return found


def _numbers(option: str, text: str | None) -> list[int | None]:
    """[None], the option's other spelling, where nothing is given."""
    if text is None:
        return [None]
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(f"{option} is {text!r}", hint="it takes numbers, such as 1024,4096")
    return [int(part) for part in parts]


def _options(asked: dict[str, Any], of_file: bool) -> Options:
    import torch

    from attncc.bench.cases import Options

    rehearse, quick = asked["rehearse"], asked["quick"]
    device = torch.device("cpu") if rehearse else place(asked["device"])
    return Options(
        device=str(device),
        dtype=dtype_of(asked["dtype"], device),
        names=_names(asked["peers"], of_file or device.type == "cpu"),
        rounds=1 if quick else asked["rounds"],
        rep=15 if quick else asked["rep"],
        backward=asked["backward"],
        tuned=asked["tune_budget"] if asked["tuned"] else None,
        costs=not (quick or asked["speed_only"]),
        cold=asked["cold"],
        eager=rehearse,
        time_budget=asked["time_budget"],
        date=asked["date"] or date.today().isoformat(),
    )


def _names(peers: tuple[str, ...], masked: bool) -> tuple[str, ...]:
    """Who is asked for; SDPA under a whole mask takes seconds on the table's long rows."""
    from attncc.bench.contestants import makers

    known = tuple(makers())
    for name in peers:
        if name not in known:
            hint = suggest(name, known) or f"there is {', '.join(known[1:])}"
            raise ArgumentError(f"there is no peer {name!r}", hint=hint)
    return ("attncc", *peers) if peers else tuple(n for n in known if masked or n != "sdpa")


def _measure(cases: list[Case], options: Options, asked: dict[str, Any]) -> None:
    """Measures, prints and writes; exit code 1 where attncc failed or was wrong."""
    from rich.console import Console

    from attncc.bench import chart, run, table
    from attncc.bench.pool import workers_here

    workers = workers_here() if asked["workers"] is None else asked["workers"]
    if options.device == "cpu":
        workers = 0  # which would disturb each other

    def keep(results: dict[str, Any]) -> None:
        if asked["json_file"]:
            asked["json_file"].parent.mkdir(parents=True, exist_ok=True)
            asked["json_file"].write_text(json.dumps(results, indent=1) + "\n")

    results = run.measured(cases, options, partial(click.echo, err=True), keep, workers)
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table.rendered(results))
    if asked["chart"]:
        chart.save(results, asked["chart"])
    if not run.is_sound(results):
        raise click.exceptions.Exit(1)
