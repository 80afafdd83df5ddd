"""From images to the patches that a pathologist is asked to annotate, behind one function for every strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from nucseg.config import nearest, to_plain
from nucseg.encoders import Encoder
from nucseg.patches import Patch
from nucseg.selection.config import SelectionConfig
from nucseg.selection.features import PatchFeatures, default_device, extract
from nucseg.selection.others import k_center, probcover, standardised, typiclust
from nucseg.selection.pool import grid, image_shape, nuclear_content, windows
from nucseg.selection.strategies import CPS_TERMS, Picks, Request, centre_crops, centre_rows, consistency, random_crops

# Each takes a pool and a request and returns picks. To add one, name it here and in the help of `--strategy`
# (nucseg.commands.options). It gets the features of patches and of their sub-regions; nuclear content only where
# `SelectionConfig.nuclei` asks for it.
STRATEGIES: dict[str, Callable[[PatchFeatures, Request], Picks]] = {
    **{name: consistency(which) for name, which in CPS_TERMS.items()},
    "random-crop": random_crops,
    "random-centre-crop": centre_rows,
    "typiclust": typiclust,
    "probcover": probcover,
    "k-center": k_center,
    "cps-standardised": standardised,
}

ONE_LEVEL = {"random-crop", "random-centre-crop", "typiclust", "probcover", "k-center"}
TWO_LEVELS = set(STRATEGIES) - ONE_LEVEL  # look at the sub-regions of patches


@dataclass(frozen=True)
class Selection:
    """The patches to annotate, and how they were found.

    Attributes
    ----------
    strategy
        Its name.
    patches
        k1 places, in the order of their coarse clusters (or as drawn).
    clusters
        Coarse cluster of each patch, or None where the strategy has none.
    terms
        (d1, d2, d3) of Eq. 1 of each patch, or None.
    label_share
        Pixels in the union of the patches over pixels in all images (A5).
    switches
        Every setting in force, by name, as plain values.
    notes
        What a reader should know: waived rules, picks that the released code would have made otherwise.
    """

    strategy: str
    patches: tuple[Patch, ...]
    clusters: tuple[int, ...] | None
    terms: tuple[tuple[float, float, float], ...] | None
    label_share: float
    switches: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Selection:
        """Undo `to_dict`."""
        return cls(
            strategy=values["strategy"],
            patches=tuple(Patch(**patch) for patch in values["patches"]),
            clusters=None if values["clusters"] is None else tuple(values["clusters"]),
            terms=None if values["terms"] is None else tuple(tuple(t) for t in values["terms"]),
            label_share=values["label_share"],
            switches=dict(values["switches"]),
            notes=tuple(values["notes"]),
        )


def select(
    samples: Sequence[Any],
    strategy: str,
    k1: int,
    k2: int = 4,
    size: int | None = None,
    step: int | None = None,
    encoder: str | nn.Module = "resnet50",
    seed: int = 0,
    config: SelectionConfig | None = None,
    features: PatchFeatures | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """Choose `k1` patches to annotate.

    Parameters
    ----------
    samples
        Training images: objects with ``.id`` (unique) and ``.image`` (H, W, 3) uint8. Labels are never read.
    strategy
        One of `STRATEGIES`.
    k1, k2
        Patches to choose, and fine clusters per coarse cluster (CPS only).
    size, step
        Override `config.size` (256) and `config.step` (15).
    encoder
        Name for `nucseg.encoders.Encoder`, or a module; not used when `features` are given or not needed.
    seed
        Seeds the random strategies and the k-means (`SelectionConfig.seeds`).
    config
        All other settings.
    features
        The pool of these samples from `extract`, so that strategies and seeds share it; it must fit size and step.
    device
        For features and clustering; None: CUDA where there is one.
    progress
        As for `extract`.

    Raises
    ------
    ValueError
        For an unknown strategy, repeated ids, k1 larger than the pool (or, for ``random-centre-crop``, than the number
        of images), an image smaller than a patch, or features of another pool.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; {nearest(strategy, STRATEGIES)}")
    config = config or SelectionConfig()
    config = dataclasses.replace(config, size=size or config.size, step=step or config.step)
    device = default_device(device)
    ids = [str(sample.id) for sample in samples]
    if len(set(ids)) != len(ids):
        raise ValueError("the ids of the images are not unique")
    shapes = {i: image_shape(sample) for i, sample in zip(ids, samples, strict=True)}
    grids = {i: windows(sample, config) for i, sample in zip(ids, samples, strict=True)}
    pool_ids = np.repeat(ids, [len(grids[i][0]) for i in ids])
    pool_rows, pool_cols = (np.concatenate([grids[i][axis] for i in ids]) for axis in (0, 1))
    glass = ""
    if config.tissue:
        left_out = sum(len(grid(i, *shapes[i], config)[0]) for i in ids) - len(pool_ids)
        glass = f"{left_out} windows with less than {config.tissue:.0%} tissue left out"
    if k1 < 1 or k1 > len(pool_ids):
        if glass and not len(pool_ids):
            raise ValueError(f"there is no patch to choose: {glass}; lower --tissue (here {config.tissue})")
        why = f"; {glass}" if glass else ""
        raise ValueError(f"k1 must lie in 1..{len(pool_ids)} (the number of patches in the pool{why}), got {k1}")

    switches = {**to_plain(config), "k1": k1, "k2": k2, "seed": seed}
    if strategy == "random-centre-crop":
        patches, picks = centre_crops(shapes, k1, seed, config), Picks(np.arange(0))
    else:
        if strategy == "random-crop":
            pool = PatchFeatures(pool_ids, pool_rows, pool_cols, config.size, *_no_features(len(pool_ids)))
        else:
            if features is None:
                net = Encoder(encoder, normalise=config.normalise) if isinstance(encoder, str) else encoder
                two_levels = strategy in TWO_LEVELS
                features = extract(samples, net, config, device, progress, two_levels, list(grids.values()))
            same = all(
                np.array_equal(a, b)
                for a, b in zip(
                    (features.image_ids, features.rows, features.cols), (pool_ids, pool_rows, pool_cols), strict=True
                )
            )
            if not same or features.size != config.size:
                raise ValueError(
                    f"features: made from another pool ({len(features)} patches of {features.size}) than these images "
                    f"with size {config.size} and step {config.step} give ({len(pool_ids)}); extract them again"
                )
            pool = features
            switches["encoder"] = encoder if isinstance(encoder, str) else getattr(encoder, "name", "own module")
        content = None
        if strategy == "cps-standardised" or config.nuclei:
            content = nuclear_content(samples, grids.values(), config.size)
        if config.nuclei:
            # Ranks, not values: where many patches hold nothing at all, exactly the wanted share is left out.
            kept = np.argsort(np.argsort(content, kind="stable")) >= min(int(config.nuclei * len(pool)), len(pool) - k1)
            pool, content = pool.only(kept), content[kept]
            glass += f"{'; ' * bool(glass)}{(~kept).sum()} windows with least nuclear content left out"
        picks = STRATEGIES[strategy](pool, Request(k1, k2, seed, config, device, content))
        patches = tuple(
            Patch(str(pool.image_ids[i]), int(pool.rows[i]), int(pool.cols[i]), pool.size) for i in picks.rows
        )
    return Selection(
        strategy,
        patches,
        None if picks.clusters is None else tuple(int(c) for c in picks.clusters),
        None if picks.terms is None else tuple(tuple(float(v) for v in row) for row in picks.terms),
        label_share(patches, shapes),
        switches,
        (*picks.notes, *([glass] if glass else [])),
    )


def label_share(patches: Sequence[Patch], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Pixels in the union of the patches over the pixels of all images (A5); `shapes` by image id.

    Examples
    --------
    Two patches that share half of their pixels cover 150 of 1,000 pixels.

    >>> label_share([Patch("a", 0, 0, 10), Patch("a", 5, 0, 10)], {"a": (50, 20)})
    0.15
    """
    covered = 0
    for image_id in {patch.image_id for patch in patches}:
        mine = [patch for patch in patches if patch.image_id == image_id]
        # Cells between all edges, whose number does not grow with the image.
        rows, cols = (
            np.unique([getattr(patch, name) + more for patch in mine for more in (0, patch.size)])
            for name in ("row", "col")
        )
        cells = np.zeros((len(rows) - 1, len(cols) - 1), dtype=bool)
        for patch in mine:
            down, across = (
                slice(*np.searchsorted(edges, [start, start + patch.size]))
                for edges, start in ((rows, patch.row), (cols, patch.col))
            )
            cells[down, across] = True
        covered += int((np.diff(rows)[:, None] * np.diff(cols) * cells).sum())
    return covered / sum(height * width for height, width in shapes.values())


def _no_features(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, 0), np.float32), np.zeros((n, 4, 0), np.float32)
