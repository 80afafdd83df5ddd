"""From one's own slides to label maps, and the public datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nucseg.commands.options import STRATEGY_HELP, DeviceOption, OutOption, ProfileOption, SeedOption, app


@contextmanager
def stoppable(kept: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """End a command that its user stops with one line and exit code 130; `kept` tells whether it can go on."""
    try:
        yield
    except KeyboardInterrupt:
        on = "goes on where it was" if kept() else "begins anew"
        typer.echo(f"\nnucseg: stopped; the same command {on}", err=True)
        raise typer.Exit(130) from None


@app.command()
def select(
    images: Annotated[Path, typer.Argument(help="A folder of images; no labels needed.")],
    out: OutOption,
    k1: Annotated[int, typer.Option("--k1", "-k", help="How many patches to outline.")] = 9,
    strategy: Annotated[
        str,
        typer.Option(help=f"{STRATEGY_HELP} cps is the paper's; on dense tissue kmeans and k-center did better here."),
    ] = "cps",
    size: Annotated[int, typer.Option(help="Side of a patch in pixels, 256 as in the paper; 0: the profile's.")] = 256,
    step: Annotated[int, typer.Option(help="Sliding step in pixels; 0: a quarter of the side.")] = 0,
    tissue: Annotated[
        float, typer.Option(help="Leave out windows with less than this share of tissue; 0 keeps bare glass.")
    ] = 0.5,
    nuclei: Annotated[
        float,
        typer.Option(help="Leave out this share of the windows, those with the least haematoxylin; 0.5 drops half."),
    ] = 0.0,
    encoder: Annotated[str, typer.Option(help="Pretrained encoder; empty: the profile's.")] = "",
    profile: ProfileOption = "sample",
    seed: SeedOption = 0,
    device: DeviceOption = "",
) -> None:
    """Choose the few patches of your images that are worth outlining, as PNG and QuPath rectangles."""
    with stoppable():
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
    for note in workflow.notes_for_reading(selection):
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
    typer.echo(f"{table['nuclei'].sum()} nuclei. Then: nucseg train {out} --out MODEL --unlabelled SLIDES")


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(help="A folder of imported patches or of images/ with labels/.")],
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

    def kept() -> bool:
        return any(any(out.expanduser().glob(name)) for name in (".*.state", ".*.first.safetensors"))

    with stoppable(kept):  # once a minute
        from nucseg import workflow
        from nucseg.profiles import load_profile

        settings = load_profile(profile or workflow.default_profile(device))
        typer.echo(f"Profile {settings.name}.")
        result = workflow.train_folder(dataset, out, segmenter, settings, seed, device, unlabelled)
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
    with stoppable(lambda: (out.expanduser() / "images.csv").is_file()):  # written with the first that is done
        from nucseg import workflow

        table = workflow.predict_folder(model, images, out, device)
    typer.echo(table.to_string(index=False))
    typer.echo(f"Label maps: {out / 'labels'}   outlines for QuPath: {out / 'geojson'}")


@app.command()
def evaluate(
    truth: Annotated[
        Path, typer.Argument(help="A folder of images with outlines, as for 'train', or of true label maps.")
    ],
    predicted: Annotated[Path, typer.Argument(help="What 'predict' wrote, or label maps by the same names.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Also write the table to this CSV file.")] = "",
) -> None:
    """Print AJI, AJI+, Dice, PQ and F1 per image and their mean."""
    from nucseg import workflow

    table = workflow.evaluate_folders(truth, predicted, out)
    typer.echo(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


@app.command()
def fetch(
    dataset: Annotated[str, typer.Argument(help="tnbc, kumar or monuseg.")],
    data_root: Annotated[
        str, typer.Option(help="Folder to put it in; empty: the environment variable NUCSEG_DATA, else data here.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Accept the licence without being asked.")] = False,
) -> None:
    """Download a public dataset, or say step by step how to get it."""
    from nucseg.data import data_root as folder_of
    from nucseg.data.fetch import fetch_dataset

    def ask(licence: str) -> bool:
        typer.echo(licence)
        return yes or typer.confirm("Do you accept this licence?")

    typer.echo(fetch_dataset(dataset, folder_of(data_root), accept_licence=ask))
