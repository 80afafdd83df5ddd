"""Rerun the paper, in whole or in part, and compare what came out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nucseg.commands.options import (
    DatasetOption,
    DeviceOption,
    MinutesOption,
    ProfileOption,
    RootOption,
    TableOption,
    app,
    chosen_tables,
)

if TYPE_CHECKING:
    from nucseg.pipeline import Pipeline


@app.command()
def reproduce(
    profile: ProfileOption = "sample",
    dataset: DatasetOption = "",
    data_root: RootOption = "",
    first: Annotated[str, typer.Option("--from", help="Start at this notebook, for example 03.")] = "01",
) -> None:
    """Run the five notebooks by papermill: selection, masks, CSinGAN, segmentation, tables and figures."""
    from nucseg import notebooks
    from nucseg.profiles import absolute_arguments, load_profile
    from nucseg.store import home, published

    settings = load_profile(profile)
    data = dataset or settings.dataset
    start = notebooks.find(first).stem
    _require_data(data, data_root)
    folder = home() / "runs" / settings.name / "notebooks" / Path(data).name
    options = {"--profile": profile, "--dataset": dataset, "--data-root": data_root, "--from": first}
    given = [word for name, value in options.items() if value for word in (name, value)]
    resume = shlex.join(["nucseg", "reproduce", *given])
    # A notebook runs in a folder of its own.
    found = absolute_arguments(profile, dataset, data_root)
    pages = notebooks.reproduce(
        dict(zip(("profile", "dataset", "data_root"), found, strict=True)),
        folder,
        settings.minutes,
        [name for name in notebooks.NOTEBOOKS if name >= start],
        resume,
    )
    typer.echo(f"Executed notebooks: {folder}")
    typer.echo(f"Tables: {published('tables', settings.name)}")
    typer.echo(f"Figures: {published('figures', settings.name)}")
    typer.echo(f"Start here: {pages[-1]}")


@app.command()
def run(
    profile: ProfileOption = "h100",
    dataset: DatasetOption = "",
    data_root: RootOption = "",
    table: TableOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be run, and how long it would take.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=0, help="Experiments at a time; 0: one, or as many as the cluster has workers.")
    ] = 0,
    minutes: MinutesOption = 0.0,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed experiments once more.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure those with results anew, on this machine.")] = False,
    device: DeviceOption = "",
    backend: Annotated[str, typer.Option(help="loky: processes here; ray or dask: a running cluster.")] = "loky",
    address: Annotated[str, typer.Option(help="Of the cluster: HOST:6379 or auto (ray), tcp://HOST:8786 (dask).")] = "",
) -> None:
    """Run the experiments of tables that have no result yet, and add theirs to results.csv."""
    from nucseg.runs import backends

    backends.check(backend, address, jobs)  # before anything large is imported
    from nucseg.devices import pick_device
    from nucseg.runs.plan import Plan

    plan = Plan(profile, dataset, data_root, chosen_tables(table), device)
    if dry_run:
        typer.echo(plan.describe())
        return
    if backend == "loky":  # the machine that a cluster is asked from may have no GPU
        pick_device(device)
    failed = plan.run(jobs, minutes, retry, backend, address, again)
    typer.echo(plan.describe())
    if failed:
        raise typer.Exit(1)


@app.command()
def status(
    profile: ProfileOption = "sample",
    dataset: DatasetOption = "",
    data_root: RootOption = "",
    table: TableOption = None,
) -> None:
    """Show which experiments are done, running, failed or missing, the minutes spent and the minutes to go."""
    from nucseg.runs.plan import Plan

    typer.echo(Plan(profile, dataset, data_root, chosen_tables(table)).describe())


@app.command()
def tables(profile: ProfileOption = "sample", dataset: DatasetOption = "") -> None:
    """Make Tables I to VI, S and B and their figures from results.csv alone: CSV, Markdown, LaTeX, HTML and PNG."""
    from nucseg.profiles import load_profile
    from nucseg.tables.report import make_report

    for path in make_report(load_profile(profile), dataset).write():
        typer.echo(path)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A profile with results.")],
    second: Annotated[str, typer.Argument(help="The profile that it is compared with.")],
    dataset: Annotated[str, typer.Option(help="tissue, kumar, tnbc, monuseg or a folder.")] = "kumar",
    reference: Annotated[
        str, typer.Option(help="A row of the second, such as III.full, to compare every row of the first with.")
    ] = "",
) -> None:
    """Compare two profiles, row by row, from their results.csv alone: a table beside those of the first."""
    from nucseg.tables import between

    for path in between.write(first, second, dataset, reference):
        typer.echo(path)


@app.command("compare-choices")
def compare_choices(
    profile: ProfileOption = "sample-choices",
    dataset: DatasetOption = "",
    data_root: RootOption = "",
    device: DeviceOption = "",
) -> None:
    """Ask what the better choices of patches have in common, from the results of Table S: a table and a figure."""
    from nucseg import choices

    for path in choices.write(_pipeline(profile, dataset, data_root, device)):
        typer.echo(path)


@app.command("compare-schedules")
def compare_schedules(
    profile: ProfileOption = "sample",
    dataset: DatasetOption = "",
    data_root: RootOption = "",
    row: Annotated[
        list[str] | None,
        typer.Option("--row", help="Such as III.full; repeatable. Default: III.rndcrop-naive, III.full."),
    ] = None,
    part: Annotated[
        list[float] | None,
        typer.Option("--part", help="Length in parts of the profile's; repeatable. Default: ¼ to 2."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many of each row's seeds.")] = 1,
    minutes: MinutesOption = 0.0,
    device: DeviceOption = "",
) -> None:
    """Train shorter and longer than the profile says and compare AJI on validation images: a table and a figure."""
    from nucseg import schedule_lengths

    run = _pipeline(profile, dataset, data_root, device)
    rows, parts = row or schedule_lengths.ROWS, part or schedule_lengths.PARTS
    for path in schedule_lengths.write(run, rows, parts, seeds, minutes):
        typer.echo(path)


@app.command("compare-synthesis")
def compare_synthesis(
    profile: ProfileOption = "sample",
    dataset: DatasetOption = "",
    data_root: RootOption = "",
    device: DeviceOption = "",
) -> None:
    """Measure the images of Table II's six systems against held-out real patches: a table and a figure."""
    from nucseg import synthesis_quality

    for path in synthesis_quality.write(_pipeline(profile, dataset, data_root, device)):
        typer.echo(path)


def _pipeline(profile: str, dataset: str, root: str, device: str) -> Pipeline:
    """Open profile and data for work on this machine, where the device that is asked for must be."""
    from nucseg.devices import pick_device
    from nucseg.pipeline import Pipeline

    pick_device(device)
    return Pipeline(profile, dataset, root, device)


def _require_data(dataset: str, root: str) -> None:
    """Say that data are missing before the first kernel starts."""
    from nucseg.data import load_dataset

    load_dataset(dataset, root or None).check_experiments()
