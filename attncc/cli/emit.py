"""`attncc emit`: the kernel files, compiled for GPUs that need not be there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from attncc.backends.triton.emit import Row


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Which program, where FILE holds several.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="sm_80, sm_90, sm_100 or gfx942; may be repeated.  [default: all]",
)
@click.option("--dtype", default="bf16", show_default=True, help="bf16, fp16 or fp32.")
@click.option("--head-dim", type=click.IntRange(1, 256), default=128, show_default=True)
@click.option("--value-dim", type=click.IntRange(1, 256), help="[default: as --head-dim]")
@click.option("--backend", help="triton or gluon.  [default: as calls have it]")
@click.option("--group", type=click.IntRange(min=1), default=1, help="Query heads a key head.")
@click.option("--triton", help="Print for this version of Triton; compiles nothing, and needs -o.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the sources and assembly; without it nothing is kept.",
)
def emit(
    file: Path,
    name: str | None,
    targets: tuple[str, ...],
    dtype: str,
    head_dim: int,
    value_dim: int | None,
    backend: str | None,
    group: int,
    triton: str | None,
    output: Path | None,
) -> None:
    """Print FILE's kernels, compile them without a GPU, and report what they take."""
    from rich.console import Console
    from rich.progress import Progress

    from attncc.backends.triton.versions import installed, supported

    installed()  # or an UnsupportedError
    from attncc.backends.gluon.emit import compile_all, sources
    from attncc.backends.triton import aot
    from attncc.backends.triton.emit import Call
    from attncc.frontend import load
    from attncc.passes import analyze

    if triton is not None and output is None:
        raise click.UsageError("--triton only prints: say where to, with -o")
    version = None if triton is None else supported(triton)
    plan = analyze(load(file, name))
    call = Call(dtype, head_dim, value_dim or head_dim, group)
    chosen = [aot.target(target) for target in targets or aot.TARGETS]
    # What is wrong is told before the first kernel is compiled.
    texts = {t.name: sources(plan, call, t, backend, version) for t in chosen}
    rows: list[Row] = []
    if version is None:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for target in progress.track(chosen, description="compiling"):
                rows += compile_all(plan, call, target, asked=backend)
        _table(rows)
    if output is not None:
        for directory, files in texts.items():
            _write_sources(files, output / directory)
        _write_assembly(rows, output)


def _table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("target")
    table.add_column("kernel")
    table.add_column("schedule")
    for title in ("registers", "spills", "shared", "matrix ops"):
        table.add_column(title, justify="right")
    for row in rows:
        found = row.compiled
        shared = f"{found.shared / 1024:.1f} KiB"
        table.add_row(
            found.target.name,
            row.kernel,
            str(row.config),
            str(found.registers),
            f"[yellow]{found.spills} B[/]" if found.spills else "0",
            shared if found.fits else f"[red]{shared}, too much[/]",
            str(found.matrix_ops()),
        )
    console = Console()
    # A file or a pipe has no width that rows should be folded to.
    console.print(table, soft_wrap=not console.is_terminal)


def _write_sources(texts: dict[str, str], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for stem, text in texts.items():
        path = directory / f"{stem}.py"
        path.write_text(text)
        click.echo(f"wrote {path}")


def _write_assembly(rows: list[Row], output: Path) -> None:
    for row in rows:
        found = row.compiled
        suffix = ".ptx" if found.target.gpu.backend == "cuda" else ".s"
        path = output / found.target.name / f"{row.kernel}{suffix}"
        path.write_text(found.assembly)
