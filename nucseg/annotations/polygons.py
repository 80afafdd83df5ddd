"""Polygons to label maps by the official half-open rule, all nuclei of an image at once, with a report of what is odd.

The rule (REFERENCE 9, and how the Kumar maps were made): pixel positions are integers; for column c an edge counts
when exactly one of its ends has X <= c; pixel (r, c) is inside when an odd number of the counted edges cross column c
at Y > r. So polygons that share an edge share no pixel, and leave none out between them. Where two nuclei overlap,
the first in the file keeps the pixels, as in the challenge's own `he_to_binary_mask`.

Outlines drawn by hand tremble: in the official files a third of them cross themselves in tiny loops (signed area
within 7 % of the filled one). Those are filled by the even-odd rule, as the official maps are, and only noted in the
report; skipping them would lose a third of the nuclei. Only an outline whose parts cancel (a bow tie) is skipped.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nucseg.annotations.errors import AnnotationWarning
from nucseg.annotations.sparse import SparseLabels

SHOWN = 8  # ids that a message lists before it says how many more there are
FARTHEST = 1e6  # pixels; a coordinate beyond is a mistake, not an image
TREMBLES = 0.9  # signed over even-odd area above which a self-crossing is only a trembling hand
CANCELS = 0.5  # ... below which most of the outline's area cancels


@dataclass(frozen=True)
class Problem:
    """One odd region: its id in the file, what is odd, whether it was skipped, and whether it matters at all."""

    region: str
    reason: str
    skipped: bool
    harmless: bool = False


@dataclass(frozen=True)
class AnnotationReport:
    """What was read from one annotation file.

    Attributes
    ----------
    path
        The file.
    n_regions
        Nuclei drawn in the file.
    n_nuclei
        Distinct ids with at least one pixel in the label map.
    problems
        Regions that were skipped, or kept although odd.
    """

    path: str
    n_regions: int
    n_nuclei: int
    problems: tuple[Problem, ...] = ()

    def summary(self, harmless: bool = True) -> str:
        """Return one line per kind of problem, with the regions' ids."""
        reasons: dict[tuple[str, bool], list[str]] = {}
        for problem in self.problems:
            if harmless or not problem.harmless:
                reasons.setdefault((problem.reason, problem.skipped), []).append(problem.region)
        lines = [f"{self.path}: {self.n_regions} regions gave {self.n_nuclei} nuclei"]
        for (reason, skipped), ids in reasons.items():
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            listed = ", ".join(ids[:SHOWN]) + more
            lines.append(f"{len(ids)} {'skipped' if skipped else 'kept'}: {reason} (region {listed})")
        return "; ".join(lines)

    def warn(self) -> None:
        """Give one `AnnotationWarning` that summarises the problems that matter, if there are any."""
        if any(not problem.harmless for problem in self.problems):
            warnings.warn(self.summary(harmless=False), AnnotationWarning, stacklevel=4)


@dataclass(frozen=True)
class Region:
    """One nucleus of a file: its id there and its rings, each (n, 2) float x, y; even-odd, so a hole is just a ring."""

    name: str
    rings: tuple[np.ndarray, ...]


def unique_names(names: Sequence[str]) -> list[str]:
    """Add the number in the file to names that occur twice: ids restart in every Aperio layer, and old QuPath
    calls every object PathAnnotationObject."""
    seen = Counter(names)
    return [name if seen[name] == 1 else f"{name} (number {number})" for number, name in enumerate(names, 1)]


def rasterize(
    regions: Sequence[Region], shape: tuple[int, int], ids: Sequence[int] | None = None, offset: float = 0.0
) -> tuple[SparseLabels, list[Problem]]:
    """Fill regions into a label map; the first wins where they overlap. Memory follows what is drawn, not the image.

    Parameters
    ----------
    regions
        Nuclei in the order of the file.
    shape
        Height and width of the image.
    ids
        (n,) positive ids of the regions; 1..n by default, so that a region without a pixel leaves a gap.
    offset
        Subtracted from all coordinates: 0 where integers are pixel positions (Aperio XML), 0.5 where they are pixel
        corners (QuPath).

    Returns
    -------
    labels : SparseLabels
        Ids int32.
    problems : list of Problem
        In the order of the regions.
    """
    ids = np.arange(1, len(regions) + 1) if ids is None else np.asarray(ids)
    problems = {i: Problem(r.name, why, True) for i, r in enumerate(regions) if (why := _unusable(r))}
    start, end, owner = _edges([(i, region) for i, region in enumerate(regions) if i not in problems], offset)
    for i in _self_crossing(start, end, owner):
        problems[i] = _judge_crossing(regions[i].name, start[owner == i], end[owner == i])
    keep = ~np.isin(owner, [i for i, problem in problems.items() if problem.skipped])
    start, end, owner = start[keep], end[keep], owner[keep]

    rows_from, rows_to, cols, owners = _spans(start, end, owner, shape)
    # paint the last regions first: what is painted last stays, so the first in the file has the last word
    order = np.argsort(-owners, kind="stable")
    lengths = (rows_to - rows_from)[order]
    rows = np.repeat(rows_from[order] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    pixels = rows * shape[1] + np.repeat(cols[order], lengths)
    labels = SparseLabels.painted(shape, pixels, np.repeat(ids[owners[order]], lengths))

    painted = np.bincount(owners, minlength=len(regions)) > 0
    visible = np.isin(ids, labels.ids)
    for i in np.unique(owner):
        if not visible[i]:
            mine = start[owner == i]
            outside = (mine.max(0) < 0).any() or (mine.min(0) > (shape[1] - 1, shape[0] - 1)).any()
            why = "outside the image" if outside else "covers no pixel position"
            why = "covered entirely by earlier regions" if painted[i] else why
            problems[int(i)] = Problem(regions[i].name, why, True)
    return labels, [problems[i] for i in sorted(problems)]


def _unusable(region: Region) -> str:
    """Why a region cannot be filled, or ``""``."""
    if not region.rings or len(region.rings[0]) == 0:
        return "no vertices"
    every, outer = np.concatenate(region.rings), region.rings[0]
    if not np.isfinite(every).all():
        return "a coordinate is not a finite number"
    if np.abs(every).max() > FARTHEST:
        return f"a coordinate lies more than {FARTHEST:.0f} pixels away"
    if len({(x, y) for x, y in outer.tolist()}) < 3:
        return "fewer than three different vertices"
    away = outer - outer[0]
    farthest = away[np.argmax((away**2).sum(1))]
    if np.abs(_cross(np.broadcast_to(farthest, away.shape), away)).max() <= 1e-9 * (farthest**2).sum():
        return "zero area"  # all vertices on one line
    return ""


def _edges(regions: Sequence[tuple[int, Region]], offset: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end points, (e, 2) each, and owning region, (e,), of every edge; rings are closed."""
    if not regions:
        return np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, np.int64)
    rings = [(i, ring) for i, region in regions for ring in region.rings]
    start = np.concatenate([ring for _, ring in rings]) - offset
    end = np.concatenate([np.roll(ring, -1, axis=0) for _, ring in rings]) - offset
    return start, end, np.repeat([i for i, _ in rings], [len(ring) for _, ring in rings])


def _spans(start, end, owner, shape) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs of inside pixels along columns: first row, row after the last, column, region.

    An edge crosses the integer columns in [min X, max X). The crossings of one region and column, sorted by Y, bound
    its runs in pairs: pixel r lies between the pair Y1, Y2 when Y1 <= r < Y2.
    """
    height, width = shape
    first = np.clip(np.ceil(np.minimum(start[:, 0], end[:, 0])), 0, width).astype(np.int64)
    after = np.clip(np.ceil(np.maximum(start[:, 0], end[:, 0])), 0, width).astype(np.int64)
    counts = after - first
    edge = np.repeat(np.arange(len(start)), counts)
    cols = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    y = y0 + (cols - x0) * (y1 - y0) / (x1 - x0)
    order = np.lexsort((y, cols, owner[edge]))
    bounds = np.clip(np.ceil(y[order]), 0, height).astype(np.int64)
    rows_from, rows_to, cols, owners = bounds[0::2], bounds[1::2], cols[order][0::2], owner[edge][order][0::2]
    some = rows_to > rows_from
    return rows_from[some], rows_to[some], cols[some], owners[some]


def _judge_crossing(name: str, start: np.ndarray, end: np.ndarray) -> Problem:
    """Tell a trembling hand from a bow tie by signed area over even-odd area."""
    low = np.floor(start.min(0))
    start, end = start - low, end - low
    box = np.ceil(start.max(0)).astype(int) + 1
    rows_from, rows_to, _, _ = _spans(start, end, np.zeros(len(start), int), (box[1], box[0]))
    share = abs(_cross(start, end).sum() / 2) / max((rows_to - rows_from).sum(), 1)
    if share < CANCELS or share > 1 / CANCELS:
        return Problem(name, "outline crosses itself and its parts cancel, draw it again", skipped=True)
    trembles = TREMBLES <= share <= 1 / TREMBLES
    return Problem(name, "outline crosses itself, filled by the even-odd rule", skipped=False, harmless=trembles)


def _self_crossing(start: np.ndarray, end: np.ndarray, owner: np.ndarray) -> list[int]:
    """Regions in which two edges properly cross; all regions at once, by a sweep along X.

    Edges are sorted by region and left end; each is compared with the 1st, 2nd, 3rd ... one after it for as long as
    that one begins before it ends.
    """
    left, right = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    order = np.lexsort((left, owner))
    start, end, owner, left, right = start[order], end[order], owner[order], left[order], right[order]
    bottom, top = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    found, active = [np.zeros(0, np.int64)], np.arange(len(start))
    for step in range(1, len(start)):
        active = active[active + step < len(start)]
        active = active[(owner[active + step] == owner[active]) & (left[active + step] < right[active])]
        if not len(active):
            break
        near = active[(bottom[active + step] < top[active]) & (bottom[active] < top[active + step])]
        a, b, c, d = start[near], end[near], start[near + step], end[near + step]
        crossing = (_cross(b - a, c - a) * _cross(b - a, d - a) < 0) & (_cross(d - c, a - c) * _cross(d - c, b - c) < 0)
        found.append(owner[near[crossing]])
    return np.unique(np.concatenate(found)).tolist()


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
