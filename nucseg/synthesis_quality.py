"""Table II before any segmenter is trained: how good are the images of its six systems themselves?

Each system paints the same label maps for the same annotated patches, except the naive augmentation, which moves and
recolours the patches. Their images are measured (`nucseg.gan.quality`) against real patches of the same slide that
nobody annotated. Two references stand beside them: other real patches of that slide, measured in the same way, which
is as good as it gets, and what the judge of mask adherence (the fully supervised segmenter of Table III) reaches on
them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from nucseg import gan
from nucseg.augment import augment
from nucseg.encoders import Encoder
from nucseg.experiments import Experiment, experiments_of
from nucseg.figures.synthesis import figure_systems
from nucseg.gan.quality import assess, colour_contrast
from nucseg.masks import holds_nucleus
from nucseg.paper import row, rows
from nucseg.patches import Patch
from nucseg.pipeline import Pair, Pipeline
from nucseg.progress import task
from nucseg.stages import MASK_CODE
from nucseg.store import Result
from nucseg.tables.formats import Cell, markdown
from nucseg.tables.publish import publish

REAL = "real"
SYSTEMS = {REAL: "real patches", **{each.key: each.label for each in rows("II")}}
# The modules whose code makes what `measured` keeps, beside its inputs; the stages' test sees that none is left out.
CODE = ("nucseg.synthesis_quality", "nucseg.gan.quality", "nucseg.augment", *MASK_CODE)
HELD_OUT = 8  # real patches for each annotated one: half to compare with, half as the system "real"

# measure -> heading and the better end: "low", "high", "one" (nearest to 1), or None
MEASURES = {
    "darker_and_bluer": ("nuclei darker and bluer", "high"),
    "contrast": ("contrast, of real", "one"),
    "colour_nuclei": ("colour distance, nuclei", "low"),
    "colour_background": ("colour distance, background", "low"),
    "frechet_nuclei": ("Frechet distance, nuclei", "low"),
    "frechet_background": ("Frechet distance, background", "low"),
    "sharpness_ratio": ("outline sharpness, of real", "one"),
    "adherence": ("mask adherence, Dice", "high"),
    "memorisation": ("memorisation, 1 none", "one"),
}
NOTES = (
    "Mean over the annotated patches that hold nuclei. Colour distance: earth mover's, in grey levels. Frechet "
    "distance: between features of 32 px windows, each on one kind of pixel. Contrast: background minus nuclei in mean "
    "grey, over the same of held-out patches. Darker and bluer: share of patches in whose synthetic images the nuclei "
    "are both. Memorisation: distance to the nearest crop of the annotated patch, over that of held-out real patches.",
    "Real patches: other patches of the same slide, measured like a system. NaiveAug: the annotated patch itself, "
    "moved, turned and recoloured; its memorisation says little, since a turned copy is not looked for.",
)


@dataclass(frozen=True)
class Source:
    """An annotated patch, and real patches of the same slide that were not annotated.

    Attributes
    ----------
    image, labels
        The annotated patch.
    held_out
        What every system is compared with.
    others
        More of the same, measured as if a system had made them.
    """

    image: np.ndarray
    labels: np.ndarray
    held_out: list[Pair]
    others: list[Pair]


def held_out_patches(
    image: np.ndarray, labels: np.ndarray, taken: list[Patch], size: int, count: int, seed: int
) -> list[Pair]:
    """Cut up to `count` patches with nuclei out of an image that overlap neither `taken` ones nor each other."""
    rng, step, free = np.random.default_rng(seed), max(1, size // 4), []
    places = [
        (r, c) for r in range(0, image.shape[0] - size + 1, step) for c in range(0, image.shape[1] - size + 1, step)
    ]
    taken = [(patch.row, patch.col, patch.size) for patch in taken]
    for k in rng.permutation(len(places)):
        r, c = places[k]
        if any(r < y + s and y < r + size and c < x + s and x < c + size for y, x, s in taken):
            continue
        where = slice(r, r + size), slice(c, c + size)
        if labels[where].any():
            free.append((image[where], labels[where].astype(np.int32)))
            taken.append((r, c, size))
        if len(free) == count:
            break
    return free


def sources(run: Pipeline, experiment: Experiment) -> list[Source]:
    """Return the annotated patches that hold nuclei, in the order of `Pipeline.sources`, with their held-out ones."""
    patches, result = run.selection(experiment).patches, []
    for k, (patch, pair) in enumerate(zip(patches, run.annotated(experiment), strict=True)):
        if not holds_nucleus(pair[1], run.profile.masks.min_area):
            continue
        sample = run.dataset.sample(patch.image_id)
        taken = [each for each in patches if each.image_id == patch.image_id]
        free = held_out_patches(sample.image, sample.labels, taken, patch.size, HELD_OUT, experiment.seed + k)
        result.append(Source(*pair, free[::2], free[1::2]))
    if not any(source.held_out for source in result):
        raise ValueError(f"{run.dataset.name}: no image has room for a patch beside the annotated ones to compare with")
    return result


def judge(run: Pipeline) -> Experiment:
    """Return the experiment whose segmenter judges mask adherence: full supervision, real patches only."""
    return experiments_of(row("III.full"), run.dataset.name, run.profile.grid)[0]


def painted(run: Pipeline, system: str, source: list[Source]) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """Return images and label maps of a system for each annotated patch; None where it has none."""
    if system == REAL:
        return [tuple(map(np.stack, zip(*s.others, strict=True))) if s.others else None for s in source]
    ours = run.experiment(augmentation=system)
    if system in gan.REGISTRY:
        left_out = run.synthesised(ours).meta["left_out"]
        with np.load(run.synthesised(ours).path / "images.npz", allow_pickle=False) as arrays:
            images = arrays["images"]
        return [None if i in left_out else both for i, both in enumerate(zip(images, run.masks(ours), strict=True))]
    draw, result = torch.Generator().manual_seed(ours.seed), []
    for s in source:
        images = torch.from_numpy(s.image).movedim(-1, 0).float().div(255).repeat(run.profile.mask_count, 1, 1, 1)
        labels = torch.from_numpy(s.labels).repeat(run.profile.mask_count, 1, 1)
        images, labels = augment(images, labels, run.profile.augment, draw, None)
        result.append(((images.movedim(1, -1) * 255).round().to(torch.uint8).numpy(), labels.numpy().clip(min=0)))
    return result


def measured(run: Pipeline, system: str) -> Result:
    """Measure one system of Table II, or ``"real"``: ``measures.json``, by annotated patch, and ``images.npz``."""
    ours, against = run.experiment(augmentation="csingan"), judge(run)
    inputs = [run.selected(ours).key, run.trained(against).key]
    if system in gan.REGISTRY:
        inputs.append(run.synthesised(run.experiment(augmentation=system)).key)

    def make(folder: Path) -> None:
        real = sources(run, ours)
        images = painted(run, system, real)
        model = run.model(against)
        net = Encoder(run.profile.encoder, run.profile.weights.get(run.profile.encoder)).to(run.device).eval()
        lines, shown = [], {}
        with task(f"measures of {SYSTEMS[system]}", len(real)) as progress:
            for i, (s, made) in enumerate(zip(real, images, strict=True)):
                if made is not None and s.held_out:
                    line = assess(
                        *made, s.held_out, s.image, lambda x: net(x.to(run.device)), model.predict, seed=ours.seed
                    )
                    reference = colour_contrast(*map(np.stack, zip(*s.held_out, strict=True)))
                    contrast = colour_contrast(*made)
                    line["darker_and_bluer"] = float(min(contrast) > 0)
                    line["contrast"] = contrast[0] / reference[0]
                    lines.append({"patch": i, **line})
                    shown |= {f"image{i}": made[0][0], f"labels{i}": made[1][0].astype(np.uint16)}
                progress.update(i + 1)
        np.savez_compressed(folder / "images.npz", **shown)
        (folder / "measures.json").write_text(json.dumps(lines))

    what = (system, run.profile.mask_count, run.profile.augment if system == "naive" else None, HELD_OUT, ours.seed)
    what = (*what, run.profile.masks.min_area, run.device.type)
    return run.store.get("synthesis-quality", what, make, inputs, CODE)


def compare(run: Pipeline) -> pd.DataFrame:
    """Measure all systems; one line for each system and annotated patch, every number unrounded."""
    frames = []
    with task("systems of Table II", len(SYSTEMS)) as progress:
        for k, system in enumerate(SYSTEMS):
            result = measured(run, system)
            lines = pd.DataFrame(json.loads((result.path / "measures.json").read_text()))
            frames.append(lines.assign(system=system, run_id=result.run_id, profile=run.profile.name))
            progress.update(k + 1)
    return pd.concat(frames, ignore_index=True)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Average over patches: one line for each system, in the order of Table II."""
    present = [system for system in SYSTEMS if system in set(frame["system"])]
    return frame.groupby("system")[list(MEASURES)].mean().loc[present]


def as_markdown(frame: pd.DataFrame, caption: str) -> str:
    """Return the table of `summary` as Markdown, the best synthesiser in each column bold, the second in italics."""
    table = summary(frame)
    ranks = {}
    for name, (_, better) in MEASURES.items():
        values = table.loc[[s for s in table.index if s in gan.REGISTRY], name]
        badness = {"low": values, "high": -values, "one": (values - 1).abs()}[better]
        ranks[name] = badness.rank(method="min")
    marks = {1.0: "best", 2.0: "second"}
    body = [
        [Cell(SYSTEMS[system])]
        + [Cell("" if np.isnan(line[m]) else f"{line[m]:.2f}", marks.get(ranks[m].get(system), "")) for m in MEASURES]
        for system, line in table.iterrows()
    ]
    return markdown(caption, ["system", *(heading for heading, _ in MEASURES.values())], body, NOTES)


def write(run: Pipeline) -> tuple[Path, ...]:
    """Measure all systems; write ``synthesis_<dataset>.csv`` and ``.md`` beside the tables, and the figure."""
    frame = compare(run)
    caption = f"The images of Table II's systems ({run.dataset.name}, {run.profile.name})"
    return publish(run, "synthesis", frame, as_markdown(frame, caption), figure(run), dpi=90, colours=256)


def figure(run: Pipeline, patches: int = 4):
    """Draw annotated patches, densest and sparsest first and last, with one image of each system beside them."""
    real = sources(run, run.experiment(augmentation="csingan"))
    order = sorted((i for i, s in enumerate(real) if s.held_out), key=lambda i: -(real[i].labels > 0).mean())
    order = [order[k] for k in np.linspace(0, len(order) - 1, min(patches, len(order))).round().astype(int)]
    columns = {}
    for system in SYSTEMS:
        with np.load(measured(run, system).path / "images.npz", allow_pickle=False) as arrays:
            columns[SYSTEMS[system]] = [
                (arrays[f"image{i}"], arrays[f"labels{i}"]) if f"image{i}" in arrays else None for i in order
            ]
    return figure_systems([(real[i].image, real[i].labels) for i in order], columns)
