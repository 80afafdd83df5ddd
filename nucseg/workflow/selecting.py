"""Which patches of a folder of images to outline, as QuPath rectangles on them."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from nucseg import annotations
from nucseg.config import to_plain
from nucseg.data import DataError, Sample
from nucseg.devices import pick_device
from nucseg.encoders import Encoder
from nucseg.experiments import RANDOM_STRATEGIES
from nucseg.files import write_text
from nucseg.profiles import Profile
from nucseg.progress import Task, say, task
from nucseg.selection import Selection, SelectionConfig, select
from nucseg.selection.pool import BAND_PIXELS, positions
from nucseg.selection.selection import TWO_LEVELS
from nucseg.workflow.base import (
    SELECTION_FILE,
    WorkflowError,
    keep_apart,
    large_enough,
    new_folder,
    open_images,
    patch_file,
    training_images,
    unique_names,
)

NAMED = 10  # images that a warning names
MANY = 1_000_000  # patches whose comparison takes hours on a CPU, and 5 kB of memory each, or 25 where parts count
MUCH = 0.5  # of a patch's area in another
# What the strategies say in the method's terms, and what it means to whoever outlines; nothing where it means nothing.
PLAIN = {
    r"^candidates=.* would choose (\d+ of \d+) otherwise$": (
        r"\1 have a nearly equal substitute, which a slightly different rule would take; nothing to do"
    ),
    r"^delta = .*, (\S+) of the graph covered$": r"\1 of the windows look like one of these",
    r"^exclusion waived for (\d+ of \d+) picks$": r"\1 overlap others: there is nothing else of their kind",
    r"^0 windows with less than \S+ tissue left out(; |$)": "",
}


def select_patches(
    images: str | Path, out: str | Path, k1: int, strategy: str, profile: Profile, seed: int = 0, device: str = ""
) -> Selection:
    """Choose `k1` patches of a folder of images and write what a pathologist needs to outline them.

    Written to `out`: ``selection.json``; ``patches.csv``, one line per patch in order; ``patches/``, each patch as PNG;
    ``geojson/``, per image the patches as rectangles that QuPath opens on the image. Images that cannot be read, or
    hold no patch of that size, are left out with a warning, and ``selection.json`` says why.

    Raises
    ------
    WorkflowError
        If `out` holds a selection already: rectangles of two selections would be outlined as one; if `out` is the
        folder of the images; if all images are held out in val/ or test/, or unfit to be chosen from; or if a large
        image turns out to be damaged when it is read.
    """
    out = Path(out).expanduser()
    if (out / SELECTION_FILE).exists():
        raise WorkflowError(f"{out} holds a selection already; name another folder, or remove this one first")
    dataset = open_images(images)
    keep_apart(out, images, dataset.samples)
    samples = training_images(dataset)
    new_folder(out)
    config, encoder = profile.selection, profile.encoder
    samples, left_out = _fit(samples, config.size, images)
    if strategy not in RANDOM_STRATEGIES:
        encoder = Encoder(encoder, profile.weights.get(encoder), config.normalise)
    windows = sum(math.prod(len(positions(n, config.size, config.step)) for n in sample.shape) for sample in samples)
    say(f"{windows:,} windows of {config.size} px, {config.step} px apart, in {len(samples)} images")
    try:
        with task(f"choosing {k1} patches of {len(samples)} images") as progress:
            selection = select(
                samples,
                strategy,
                k1,
                profile.grid.k2,
                size=config.size,
                step=config.step,
                encoder=encoder,
                seed=seed,
                config=config,
                device=pick_device(device),
                progress=_counted(progress, 2 if strategy in TWO_LEVELS else 1, config.step),
            )
    except DataError as error:  # of an image that is read in bands
        raise WorkflowError(f"{error}; or take it out of {images} and select again") from error
    by_id = {sample.id: sample for sample in samples}
    names = unique_names(by_id)
    (out / "patches").mkdir(parents=True, exist_ok=True)
    # The cost of Eq. 1 and its terms, where the strategy has them: the lower, the more typical is a patch.
    costs = [{"d1": t[0], "d2": t[1], "d3": t[2], "cost": sum(t)} for t in selection.terms or ()]
    scores = [cost["cost"] for cost in costs] or None
    costs = costs or [{} for _ in selection.patches]
    rows = []
    for rank, patch in enumerate(selection.patches, 1):
        crop = by_id[patch.image_id].region(patch.row, patch.col, patch.size, patch.size)
        name = patch_file(rank, patch, names)
        Image.fromarray(crop).save(out / "patches" / name)
        rows.append({"rank": rank, **to_plain(patch), "file": f"patches/{name}", **costs[rank - 1]})
    chosen = list(dict.fromkeys(patch.image_id for patch in selection.patches))
    for image_id in chosen:
        mine = [(row["rank"], p) for row, p in zip(rows, selection.patches, strict=True) if p.image_id == image_id]
        own = [scores[rank - 1] for rank, _ in mine] if scores else None
        path = out / "geojson" / f"{names[image_id]}.geojson"
        path.parent.mkdir(parents=True, exist_ok=True)
        annotations.write_geojson(path, [p for _, p in mine], ranks=[rank for rank, _ in mine], scores=own)
    pd.DataFrame(rows).to_csv(out / "patches.csv", index=False)
    path = Path(images).expanduser()
    place = str(path.resolve()) if path.exists() else str(images)
    # Their outlines come back under these names, whatever images have come to the folder by then.
    record = {"images": place, "names": {i: names[i] for i in chosen}, "left_out": left_out, **selection.to_dict()}
    write_text(out / SELECTION_FILE, json.dumps(record, indent=1))
    _warn_of_overlaps(selection, config)
    return selection


def notes_for_reading(selection: Selection) -> list[str]:
    """Return what whoever outlines can use of a selection's notes, which ``selection.json`` has as they are."""
    found = []
    for note in selection.notes:
        for pattern, words in PLAIN.items():
            note = re.sub(pattern, words, note)
        found += [note] if note else []
    return found


def _counted(progress: Task, passes: int, step: int) -> Callable[[int, int], None]:
    """Return `progress` so that it first says how many patches there are, each of which counts so many times."""
    told = False

    def report(done: int, total: int) -> None:
        nonlocal told
        if not told:
            say(f"{total // passes:,} of them show enough tissue and are compared")
            if total // passes > MANY:
                warnings.warn(
                    f"{total // passes:,} patches take long to compare, and much memory; with --step {2 * step} there "
                    "are about a quarter as many",
                    stacklevel=2,
                )
        told = True
        progress(done, total)

    return report


def _warn_of_overlaps(selection: Selection, config: SelectionConfig) -> None:
    """Say which of the patches show much the same: their nuclei would be outlined once and learned from twice."""
    numbered = list(enumerate(selection.patches, 1))
    pairs = []
    for (i, a), (j, b) in itertools.combinations(numbered, 2):
        shared = max(a.size - abs(a.row - b.row), 0) * max(a.size - abs(a.col - b.col), 0) / a.size**2
        if a.image_id == b.image_id and shared > MUCH:
            pairs.append(f"{i} and {j} ({shared:.0%})")
    if pairs:
        more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
        rule = ", or 'exclusion: 0' below 'selection:' in a profile of your own for none that do at all"
        warnings.warn(
            f"of the chosen patches, {', '.join(pairs[:NAMED])}{more} show the same tissue in more than half of their "
            f"area; select again with --step {config.size // 2} for patches that do not"
            + (rule if selection.strategy in TWO_LEVELS else ""),
            stacklevel=3,
        )


def _fit(samples: Sequence[Sample], size: int, images: str | Path) -> tuple[list[Sample], dict[str, str]]:
    """Return the images that a patch can be chosen from, and by id why not the others, which a warning names.

    Those that are decoded whole later are decoded here too, so that a damaged one is found before the work. Of larger
    ones only the header is read.
    """
    found, left_out = large_enough(samples, size)
    fit = []
    with task(f"opening {len(found)} images", len(found)) as progress:
        for i, sample in enumerate(found):
            try:
                if not sample.source.by_region or sample.shape[0] * sample.shape[1] <= BAND_PIXELS:
                    _ = sample.image
            except DataError as error:
                left_out[sample.id] = str(error)
            else:
                fit.append(sample)
            progress.update(i + 1, sample.id)
    lines = list(left_out.values())
    more = [f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    said = "\n".join([*lines[:NAMED], *more])
    if not fit:
        raise WorkflowError(f"{images}: a patch of {size} pixels can be chosen from none of its images:\n{said}")
    if lines:
        warnings.warn(f"{images}: {len(lines)} of {len(samples)} images are left out:\n{said}", stacklevel=3)
    return fit, left_out
