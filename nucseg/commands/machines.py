"""To machines without a network, and results back home."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nucseg.commands.options import DatasetOption, OutOption, ProfileOption, RootOption, app

results_app = typer.Typer(help="Bring results home from another machine.", no_args_is_help=True)
app.add_typer(results_app, name="results")
LimitOption = Annotated[float, typer.Option(help="Largest size in MB.")]


@app.command()
def bundle(
    out: OutOption,
    profile: ProfileOption = "h100",
    dataset: DatasetOption = "",
    data_root: RootOption = "",
    wheel: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, NAME==VERSION, a file, or none; repeatable. Default: all that runs and notebooks need."
        ),
    ] = None,
    python: Annotated[str, typer.Option(help="Python of the other machine (linux, x86-64).")] = "3.12",
    limit_mb: LimitOption = 60.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run all again: leave the results so far at home.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Weights in full precision, not in 16 bits: larger.")] = False,
) -> None:
    """Write one folder that runs everything on a machine without a network."""
    from nucseg.bundle import wheels
    from nucseg.bundle.make import make_bundle

    names = wheels.DEFAULT if wheel is None else tuple(name for name in wheel if name != "none")
    made = make_bundle(out, profile, dataset, data_root, names, python, limit_mb, fresh, exact)
    typer.echo(made.describe())
    typer.echo(f"There: bash {out.name}/start.sh --minutes 8   (or: bash {out.name}/start.sh notebooks)")
    typer.echo(f"Then bring {out.name}/results.zip back, and: nucseg results add results.zip")


@results_app.command("pack")
def pack_results(
    out: Annotated[Path, typer.Option("--out", "-o", help="The new .zip file.")] = Path("results.zip"),
    profile: Annotated[str, typer.Option(help="Only this profile; empty: all.")] = "",
    dataset: Annotated[str, typer.Option(help="Only this dataset; empty: all.")] = "",
    data_root: RootOption = "",
    limit_mb: LimitOption = 10.0,
) -> None:
    """Pack results, configurations, learning curves and a few label maps into one small file."""
    from nucseg.results import pack as results_pack

    typer.echo(results_pack.pack(out, profile, dataset, data_root, limit_mb).describe())


@results_app.command("add")
def add_results(
    files: Annotated[list[Path], typer.Argument(help="Files of 'results pack', or folders with results.csv.")],
    replace: Annotated[bool, typer.Option("--replace", help="Take the file's numbers where they differ.")] = False,
) -> None:
    """Add results of another machine to tables/; either all are added, or nothing is changed."""
    from nucseg.results import add as results_add

    for added in results_add.add(files, replace):
        typer.echo(added.describe())
