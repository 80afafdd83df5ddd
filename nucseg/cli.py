"""The ``nucseg`` command: rerun the paper, or find out which patches of your own images to outline."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from nucseg import messages
from nucseg.config import ConfigError

app = typer.Typer(
    help=__doc__.replace("``", ""),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ProfileOption = Annotated[
    str, typer.Option(help="sample, h100, paper or another that comes along, or a YAML file's path.")
]
DatasetOption = Annotated[str, typer.Option(help="tissue, kumar, tnbc, monuseg or a folder; empty: the profile's own.")]
RootOption = Annotated[str, typer.Option(help="Where the data lie; empty: the environment variable NUCSEG_DATA.")]
MinutesOption = Annotated[
    float, typer.Option(min=0, help="Stop after so many minutes; the next start goes on there. 0: no limit.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda; empty: cuda where there is one.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result on the same machine.")]
STRATEGY_HELP = (
    "cps, cps-standardised, cps-no-2nd, cps-no-3rd, kmeans, typiclust, probcover, k-center, random-crop or "
    "random-centre-crop."
)
TableOption = Annotated[
    list[str] | None,
    typer.Option(
        "--table", "-t", help="I to VI or 1 to 6, one or more; S: all selection strategies; B: on more budgets."
    ),
]


# -- the paper -------------------------------------------------------------------------------------------------


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
    from nucseg.runs.plan import Plan

    plan = Plan(profile, dataset, data_root, _tables(table), device)
    if dry_run:
        typer.echo(plan.describe())
        return
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

    typer.echo(Plan(profile, dataset, data_root, _tables(table)).describe())


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
    from nucseg.pipeline import Pipeline

    for path in choices.write(Pipeline(profile, dataset, data_root, device)):
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
    from nucseg.pipeline import Pipeline

    run = Pipeline(profile, dataset, data_root, device)
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
    from nucseg.pipeline import Pipeline

    for path in synthesis_quality.write(Pipeline(profile, dataset, data_root, device)):
        typer.echo(path)


# -- your own slides -------------------------------------------------------------------------------------------


@app.command()
def select(
    images: Annotated[Path, typer.Argument(help="A folder of images; no labels needed.")],
    out: OutOption,
    k1: Annotated[int, typer.Option("--k1", "-k", help="How many patches to outline.")] = 9,
    strategy: Annotated[str, typer.Option(help=STRATEGY_HELP)] = "cps",
    size: Annotated[int, typer.Option(help="Side of a patch in pixels; 0: the profile's.")] = 0,
    step: Annotated[int, typer.Option(help="Sliding step in pixels; 0: a quarter of the side.")] = 0,
    tissue: Annotated[float, typer.Option(help="Least share of tissue in a patch; 0 looks at bare glass too.")] = 0.5,
    nuclei: Annotated[
        float, typer.Option(help="Share of the windows to leave out, those with least nuclei by their colour.")
    ] = 0.0,
    encoder: Annotated[str, typer.Option(help="Pretrained encoder; empty: the profile's.")] = "",
    profile: ProfileOption = "sample",
    seed: SeedOption = 0,
    device: DeviceOption = "",
) -> None:
    """Choose the few patches of your images that are worth outlining, as PNG and QuPath rectangles."""
    from dataclasses import replace

    from nucseg import workflow
    from nucseg.profiles import load_profile

    settings = load_profile(profile)
    size = size or settings.selection.size
    config = replace(settings.selection, size=size, step=step or max(1, size // 4), tissue=tissue, nuclei=nuclei)
    settings = replace(settings, selection=config, encoder=encoder or settings.encoder)
    selection = workflow.select_patches(images, out, k1, strategy, settings, seed, device)
    for rank, patch in enumerate(selection.patches, 1):
        typer.echo(f"{rank:3d}  {patch.image_id}  row {patch.row}  column {patch.col}  {patch.size} px")
    for note in selection.notes:
        typer.echo(f"     {note}")
    typer.echo(
        f"{100 * selection.label_share:.2f} % of all pixels. Outline the nuclei in these patches: {out / 'geojson'}"
    )
    typer.echo(f"Then: nucseg import-annotations {out} FOLDER_OF_OUTLINES --out DATASET")


@app.command("import-annotations")
def import_annotations(
    selection: Annotated[Path, typer.Argument(help="The folder that 'nucseg select' wrote.")],
    outlines: Annotated[Path, typer.Argument(help="A folder with one .geojson, .xml or label map per image.")],
    out: OutOption,
    partial: Annotated[bool, typer.Option("--partial", help="Leave out images and patches without outlines.")] = False,
    empty: Annotated[bool, typer.Option("--empty", help="Patches without an outline hold no nucleus.")] = False,
    images: Annotated[str, typer.Option(help="Where the images are now; empty: where 'select' found them.")] = "",
) -> None:
    """Bring the outlines back: cut the chosen patches out as a training set."""
    from nucseg import workflow

    table = workflow.import_annotations(selection, outlines, out, partial, empty, images)
    typer.echo(table[["rank", "file", "nuclei"]].to_string(index=False))
    typer.echo(f"{table['nuclei'].sum()} nuclei. Then: nucseg train {out} --out MODEL")


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(help="A folder of images/ with labels/.")],
    out: OutOption,
    segmenter: Annotated[
        str, typer.Option(help="hoverlite, hovernet, maskrcnn, pffnet, dpmsff, mdcnet, dist or micronet.")
    ] = "hoverlite",
    profile: Annotated[
        str, typer.Option(help="A profile's name or YAML file; empty: slides on a GPU, slides-cpu elsewhere.")
    ] = "",
    seed: SeedOption = 0,
    device: DeviceOption = "",
    unlabelled: Annotated[
        str, typer.Option(help="A folder of images without outlines to learn from too: slower, mostly better.")
    ] = "",
) -> None:
    """Train a segmenter on outlined patches; what was stopped goes on where it was, by the same command."""
    from nucseg import workflow
    from nucseg.profiles import load_profile

    settings = load_profile(profile or workflow.default_profile(device))
    typer.echo(f"Profile {settings.name}.")
    try:
        result = workflow.train_folder(dataset, out, segmenter, settings, seed, device, unlabelled)
    except KeyboardInterrupt:
        kept = any(out.glob(".*.state")) or any(out.glob(".*.first.safetensors"))
        what = "The same command goes on from what was kept, once a minute" if kept else "Nothing was worth keeping yet"
        typer.echo(f"\nStopped. {what}.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{result.seconds:.0f} s, last loss {result.curve[-1]['total']:.3f}")
    typer.echo(f"Then: nucseg predict {out} IMAGES --out DIR")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="The folder that 'nucseg train' wrote.")],
    images: Annotated[Path, typer.Argument(help="A folder of images.")],
    out: OutOption,
    device: DeviceOption = "",
) -> None:
    """Segment images: a label map and a QuPath GeoJSON each."""
    from nucseg import workflow

    typer.echo(workflow.predict_folder(model, images, out, device).to_string(index=False))
    typer.echo(f"Label maps: {out / 'labels'}   outlines for QuPath: {out / 'geojson'}")


@app.command()
def evaluate(
    truth: Annotated[Path, typer.Argument(help="A folder of true label maps.")],
    predicted: Annotated[Path, typer.Argument(help="A folder of predicted ones, by the same names.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the table to this CSV file.")] = None,
) -> None:
    """Print AJI, AJI+, Dice, PQ and F1 per image and their mean."""
    from nucseg import workflow

    table = workflow.evaluate_folders(truth, predicted)
    typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(out, index=False)


@app.command()
def fetch(
    dataset: Annotated[str, typer.Argument(help="tnbc, kumar or monuseg.")],
    data_root: Annotated[Path, typer.Option(help="Folder to put it in.")] = Path("data"),
    yes: Annotated[bool, typer.Option("--yes", help="Accept the licence without being asked.")] = False,
) -> None:
    """Download a public dataset, or say step by step how to get it."""
    from nucseg.data.fetch import fetch_dataset

    def ask(licence: str) -> bool:
        typer.echo(licence)
        return yes or typer.confirm("Do you accept this licence?")

    typer.echo(fetch_dataset(dataset, data_root, accept_licence=ask))


# -- other machines --------------------------------------------------------------------------------------------

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


# -- helpers ---------------------------------------------------------------------------------------------------

ROMAN = ("I", "II", "III", "IV", "V", "VI")


def _tables(names: list[str] | None) -> tuple[str, ...]:
    """Turn 1 or i into I, and nothing into all six; S is the comparison beyond the paper."""
    chosen = []
    for name in re.split(r"[,\s]+", " ".join(names or ROMAN)):
        roman = ROMAN[int(name) - 1] if name in {"1", "2", "3", "4", "5", "6"} else name.upper()
        if roman not in (*ROMAN, "S", "B"):
            raise ConfigError(f"no table {name!r}; the paper has I to VI, S compares all strategies, B their budgets")
        chosen.append(roman)
    return tuple(dict.fromkeys(chosen))


def _spread(words: list[str]) -> list[str]:
    """Read ``--table 1 2`` as ``--table 1 --table 2``; no other option has a table's number behind its value."""
    spread: list[str] = []
    for word in words:
        after_table = len(spread) > 1 and spread[-2] in ("--table", "-t")
        spread += (
            [spread[-2], word] if after_table and (word in "123456" or word.upper() in (*ROMAN, "S", "B")) else [word]
        )
    return spread


def _require_data(dataset: str, root: str) -> None:
    """Say that data are missing before the first kernel starts."""
    from nucseg.data import load_dataset

    found = load_dataset(dataset, root or None)
    found.measurable("train"), found.measurable("test")


def main() -> None:
    """Run the command; an expected error or a warning of ours is one message, anything else as Python prints it."""
    warnings.formatwarning = messages.one_line(warnings.formatwarning)
    sys.argv[1:] = _spread(sys.argv[1:])
    try:
        app()
    except Exception as error:
        if messages.is_expected(error):
            sys.exit(f"nucseg: {error}")
        raise


if __name__ == "__main__":
    main()
