"""Mask synthesis (Sec. III-B, Fig. 4a): many label maps that look like the tissue of one annotated patch.

The paper: collect the nuclei of augmented copies of the real mask in a set E; Q times, draw e_q from E, dilate the mask
M_{q-1} by R_q (the largest distance from the centre of e_q to its boundary), and insert e_q at a random position of the
background that is left; then crop the h' x w' map to h x w, which cuts nuclei at the border as in real masks.

Deviations and choices, each with its reason:

- *Admissible positions* come from one Euclidean distance map: a position is free for e_q where the nearest nucleus is
  at least R_q + 2 away: what the dilation leaves, less what would come to lie within a pixel of a neighbour (5 to 7 %
  of the positions). After an insertion only the surroundings of the new nucleus
  are updated, with a distance field computed once per shape of E (A14).
- *h', w'* are `size` + 2 x 22 pixels, 300 for 256 as in the released code (A13); the margin does not scale with
  `size`, because it has to cover a nucleus and nuclei do not scale.
- *Q* is not a number given by hand: nuclei are placed until the crop holds the foreground of the source patch (A13).
- *No room for the disc R_q*: dense tissue saturates the paper's rule. Then the nucleus itself, not its disc, has to fit
  with one free pixel around it (tries are bounded); after that it is passed over and recorded.
- *Nuclei beside each other* (`touch` above 0 or None): a share of the nuclei is set beside a neighbour instead. For
  those R_q shrinks to nothing and the shape itself must fit, touching or one pixel apart; of the tested positions the
  closest one is taken. Shrinking R_q for all nuclei (A14) does not cluster them: even at radius 0 uniform positions
  left 15 % in contact, while in real Kumar patches it is 31 %. With None the shares of nuclei that stand close and that
  touch are those of the patch; the distances between nuclei are then 3 to 6 times nearer to the tissue's than at 0.
- *Border-cut nuclei* of the patch are not in E, as in the released code: their straight edges would appear inside the
  mask. Large nuclei are cut more often, so the whole ones are drawn with weight 1 / (chance of lying whole in the
  patch), the edge correction of Miles and Lantuejoul; without it synthetic nuclei are too small. A patch without a
  single whole nucleus uses the cut ones, with a warning.
- *Small rests*: nuclei that the crop leaves with fewer than 20 pixels are removed from the map itself (A15), and ids
  count 1..n, so the instance labels need no connected components later (A27).
"""

from __future__ import annotations

import bisect
import warnings
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from nucseg.masks.pool import MaskConfig, Nucleus, Pool, nucleus_pool

_DEFAULTS = MaskConfig()
_APART, _TOUCHING = 2.0, 1.0  # distances between pixel centres: one background pixel in between, and none


class MaskWarning(UserWarning):
    """Synthetic masks are not quite what was asked for: fewer nuclei than in the patch, or shapes cut by its border."""


@dataclass(frozen=True, eq=False)
class MaskReport:
    """What happened to each mask.

    Attributes
    ----------
    wanted
        Foreground fraction aimed at (that of the source patch times `density`).
    achieved
        (count,) foreground fraction of each mask.
    nuclei
        (count,) instances in each mask after the crop.
    placements
        For each mask an (n, 3) integer array in the order of insertion, margin included: member of E, and row and
        column of its insertion point in the crop's frame (negative or >= size in the margin).
    passed
        (count,) nuclei that were drawn and found no room.
    reached
        (count,) bool: foreground not below the wanted one by more than the tolerance; all True where Q is given.
    """

    wanted: float
    achieved: np.ndarray
    nuclei: np.ndarray
    placements: tuple[np.ndarray, ...]
    passed: np.ndarray
    reached: np.ndarray


class _Canvas:
    """The map M_q and, for each pixel, the distance to the nearest placed nucleus (exact up to `cap`)."""

    def __init__(self, pool: Pool, size: int, config: MaskConfig, fields: dict[int, np.ndarray]) -> None:
        self.pool, self.size, self.config, self.fields = pool, size, config, fields
        self.cap = int(np.ceil(max(n.reach for n in pool.nuclei) + _APART)) + 1
        self.pad = 2 * self.cap  # room for a nucleus that sticks out and its distance field: no index checks
        self.side = size + 2 * config.margin
        full = self.side + 2 * self.pad
        self.distance = np.full((full, full), self.cap, np.float32)
        self.labels = np.zeros((full, full), np.int32)
        self.areas: list[int] = []  # pixels inside the crop, one entry per placed nucleus
        self.placements: list[tuple[int, int, int]] = []
        self.passed = 0
        self.full = False

    def admissible(self, low: float, high: float = np.inf) -> np.ndarray:
        """Return the positions of the h' x w' canvas whose distance to the nearest nucleus is in low..high.

        A position is an index into the flat `distance`.
        """
        inner = self.distance[self.pad : self.pad + self.side, self.pad : self.pad + self.side]
        return self._position(np.flatnonzero((inner >= low) & (inner <= high) if np.isfinite(high) else inner >= low))

    def _position(self, pixel: np.ndarray) -> np.ndarray:
        """Return the positions of pixels that are counted row by row over the h' x w' canvas."""
        rows = pixel // self.side
        return pixel + rows * (self.distance.shape[1] - self.side) + self.pad * (self.distance.shape[1] + 1)

    def crop(self) -> np.ndarray:
        start = self.pad + self.config.margin
        return self.labels[start : start + self.size, start : start + self.size]

    def find(self, member: int, rng: np.random.Generator) -> tuple[int, int] | None:
        """Return a random admissible position of a nucleus, or None if none was found."""
        nucleus, pool = self.pool.nuclei[member], self.pool
        if pool.beside > 0 and rng.random() < pool.beside:  # R_q shrinks to nothing, the shape decides
            gap = _TOUCHING if rng.random() < pool.contact else _APART
            near = self._some_admissible(rng, max(nucleus.depth, gap), nucleus.reach + gap)
            found = self._fitting(nucleus, near, gap, closest=True)
            if found is not None:
                return found
        # The paper's rule, uniform over the positions where the whole disc of radius R_q is free. A few blind throws
        # are as uniform as listing the free set (90,000 comparisons), and mostly hit.
        radius = nucleus.reach + _APART
        for row, col in rng.integers(self.pad, self.pad + self.side, (16, 2)).tolist():
            if self.distance[row, col] >= radius:
                return row, col
        free = self.admissible(radius)
        if free.size:
            return divmod(int(free[rng.integers(free.size)]), self.distance.shape[1])
        # no room for the disc: wherever the nucleus itself fits
        gap = _TOUCHING if pool.beside * pool.contact > 0 else _APART
        return self._fitting(nucleus, self._some_admissible(rng, max(nucleus.depth, gap)), gap)

    def _some_admissible(self, rng: np.random.Generator, low: float, high: float = np.inf) -> np.ndarray:
        """Draw up to `tries` positions uniformly from the admissible ones; fewer only where there are hardly any."""
        tries = self.config.tries
        thrown = self._position(rng.integers(self.side**2, size=4 * tries))
        there = self.distance.take(thrown)
        hits = thrown[(there >= low) & (there <= high)]
        if hits.size >= tries // 8:  # blind throws suffice; else list the positions (90,000 comparisons)
            return hits[:tries]
        positions = self.admissible(low, high)
        return rng.choice(positions, min(tries, positions.size)) if positions.size else positions

    def _fitting(self, nucleus: Nucleus, at: np.ndarray, gap: float, closest: bool = False) -> tuple[int, int] | None:
        """Return the first position at which the shape keeps `gap` to all others, or the one that leaves least."""
        width, distance = self.distance.shape[1], self.distance.ravel()
        outline = nucleus.outline[:, 0] * width + nucleus.outline[:, 1]
        at = at[(distance[at[:, None] + outline[::8]] >= gap).all(axis=1)]  # most fail on an eighth of the outline
        left = distance[at[:, None] + outline].min(axis=1)
        order = np.argsort(left, kind="stable") if closest else np.arange(left.size)
        for choice in order[left[order] >= gap]:
            position = divmod(int(at[choice]), width)
            # a free outline may still enclose a small nucleus
            if (self.distance[self._window(nucleus, position)][nucleus.mask] >= gap).all():
                return position
        return None

    def _window(self, nucleus: Nucleus, position: tuple[int, int], grow: int = 0) -> tuple[slice, slice]:
        top, left = position[0] - nucleus.centre[0], position[1] - nucleus.centre[1]
        height, width = nucleus.mask.shape
        return slice(top - grow, top + height + grow), slice(left - grow, left + width + grow)

    def place(self, member: int, position: tuple[int, int]) -> None:
        nucleus = self.pool.nuclei[member]
        if member not in self.fields:  # computed once per shape, used for all masks
            away = ~np.pad(nucleus.mask, self.cap)
            self.fields[member] = ndimage.distance_transform_edt(away).astype(np.float32)
        around = self.distance[self._window(nucleus, position, self.cap)]
        np.minimum(around, self.fields[member], out=around)
        window = self._window(nucleus, position)
        self.labels[window][nucleus.mask] = len(self.placements) + 1
        start = self.pad + self.config.margin
        rows, cols = (slice(max(start - w.start, 0), max(min(w.stop, start + self.size) - w.start, 0)) for w in window)
        self.areas.append(int(nucleus.mask[rows, cols].sum()))
        self.placements.append((member, position[0] - start, position[1] - start))

    def foreground(self) -> int:
        return sum(area for area in self.areas if area >= self.config.min_area)


def _draw(pool: Pool, cumulative: list[float], rng: np.random.Generator) -> int:
    copies = pool.members[min(bisect.bisect(cumulative, rng.random()), len(pool.members) - 1)]
    return copies[rng.integers(len(copies))]


def _fill(canvas: _Canvas, wanted: float, rng: np.random.Generator, q: int | None) -> None:
    """Run the iterations of one mask: Q of them, or until the crop holds `wanted` pixels of foreground."""
    config = canvas.config
    failures, foreground = 0, 0
    cumulative = np.cumsum(canvas.pool.weights).tolist()
    while q is None or len(canvas.placements) < q:
        member = _draw(canvas.pool, cumulative, rng)
        position = canvas.find(member, rng)
        if position is None:
            failures, canvas.passed = failures + 1, canvas.passed + 1
            canvas.full = failures >= config.passes
            if canvas.full:
                break
            continue
        failures = 0
        canvas.place(member, position)
        if q is not None:
            continue
        area = canvas.areas[-1] if canvas.areas[-1] >= config.min_area else 0
        foreground += area
        if foreground >= wanted:
            if foreground - wanted > area / 2 and foreground > area:  # the last one overshoots: nearer without it
                canvas.labels[canvas.labels == len(canvas.placements)] = 0
                canvas.placements.pop(), canvas.areas.pop()
            break


def synthesize_with_report(
    labels: np.ndarray,
    count: int = 50,
    size: int = 256,
    seed: int = 0,
    config: MaskConfig = _DEFAULTS,
) -> tuple[np.ndarray, MaskReport]:
    """Synthesize masks as `synthesize_masks` does, and say what was placed and which density was reached.

    Returns
    -------
    masks, report
        (count, size, size) int32, and a `MaskReport`. No warning is given for sparse masks: see `MaskReport.reached`.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be at least 1, got {count} and {size}")
    pool = nucleus_pool(labels, seed, config)
    if not pool.whole:
        warnings.warn(
            f"labels: all {len(pool.members)} nuclei are cut by the border of the patch; synthetic nuclei will have "
            "straight edges",
            MaskWarning,
            stacklevel=2,
        )
    share = float((labels > 0).mean()) * config.density
    wanted = share * size * size
    fields: dict[int, np.ndarray] = {}
    masks = np.empty((count, size, size), np.int32)
    placements, passed = [], np.zeros(count, int)
    for index in range(count):
        rng = np.random.default_rng((seed, 1 + index))  # one stream per mask: mask 3 of 5 is mask 3 of 50
        best, best_error = None, np.inf
        for _ in range(1 + (config.redraws if config.q is None else 0)):
            canvas = _Canvas(pool, size, config, fields)
            _fill(canvas, wanted, rng, config.q)
            error = abs(canvas.foreground() - wanted)
            if error < best_error:
                best, best_error = canvas, error
            if error <= config.tolerance * wanted or canvas.full:
                break  # good, or full: another draw would not find more room
        keep = np.array([0, *best.areas]) >= config.min_area
        masks[index] = (np.cumsum(keep) * keep)[best.crop()]  # small rests go, the others count 1..n
        placements.append(np.array(best.placements, int).reshape(-1, 3))
        passed[index] = best.passed
    achieved = (masks > 0).mean(axis=(1, 2))
    reached = achieved >= share * (1 - config.tolerance) if config.q is None else np.ones(count, bool)
    return masks, MaskReport(share, achieved, masks.max(axis=(1, 2)), tuple(placements), passed, reached)


def synthesize_masks(
    labels: np.ndarray,
    count: int = 50,
    size: int = 256,
    seed: int = 0,
    config: MaskConfig = _DEFAULTS,
) -> np.ndarray:
    """Make label maps that look like the tissue of one annotated patch (Sec. III-B, Fig. 4a).

    Parameters
    ----------
    labels
        Label map (H, W) of the patch; any size, non-contiguous ids allowed.
    count
        How many masks; the paper makes 50 per patch.
    size
        Side of a mask in pixels; it may differ from the patch's. Nuclei keep their size in pixels.
    seed
        The same seed gives the same masks, and the first masks do not depend on `count`.
    config
        See `MaskConfig`.

    Returns
    -------
    masks
        (count, size, size) int32; ids 1..n in each, no two nuclei overlap, and at `touch=0` at least one background
        pixel lies between any two.

    Raises
    ------
    ValueError
        If the patch has no nucleus of `min_area` pixels.

    Warns
    -----
    MaskWarning
        If masks could not be filled to the density of the patch, or if only border-cut nuclei were available.
    """
    masks, report = synthesize_with_report(labels, count, size, seed, config)
    sparse = int((~report.reached).sum())
    if sparse:
        warnings.warn(
            f"{sparse} of {count} masks hold less than {1 - config.tolerance:.0%} of the foreground of the patch "
            f"({report.wanted:.1%}; the sparsest has {report.achieved.min():.1%}): no room for more of its nuclei; "
            "touch above 0 packs them closer",
            MaskWarning,
            stacklevel=2,
        )
    return masks


@dataclass(frozen=True, eq=False)
class SynthesisSteps:
    """The four steps of one iteration (Fig. 4a), on the h' x w' canvas.

    Attributes
    ----------
    before
        M_{q-1}, (h', w') int32.
    nucleus, reach
        (1) e_q, the drawn member of E as a tight bool mask, and its R_q in pixels.
    centre
        Insertion point inside `nucleus`.
    dilated
        (2) (h', w') bool, M_{q-1} dilated: no position for the centre of e_q.
    position
        (3) Row and column drawn from the background of `dilated`.
    after
        (4) M_q, (h', w') int32.
    size
        Side of the middle part that the crop keeps after the last iteration.
    """

    before: np.ndarray
    nucleus: np.ndarray
    reach: float
    centre: tuple[int, int]
    dilated: np.ndarray
    position: tuple[int, int]
    after: np.ndarray
    size: int


def synthesis_steps(
    labels: np.ndarray,
    seed: int = 0,
    iteration: int = 16,
    size: int = 256,
    config: MaskConfig = _DEFAULTS,
) -> SynthesisSteps:
    """Run the synthesis up to iteration q and keep what its four steps did, for Fig. 4(a).

    Parameters
    ----------
    labels, seed, size, config
        As in `synthesize_masks`; the placements are those of its first mask before any redraw.
    iteration
        Which q to show, from 1. Where the map is full earlier, the last nucleus that found room is shown.

    Raises
    ------
    ValueError
        If `iteration` is below 1, or the patch has no nucleus of `min_area` pixels.
    """
    if iteration < 1:
        raise ValueError(f"iteration must be at least 1, got {iteration}")
    config = replace(config, touch=0.0)
    pool = nucleus_pool(labels, seed, config)
    canvas = _Canvas(pool, size, config, {})
    _fill(canvas, np.inf, np.random.default_rng((seed, 1)), iteration)
    member, row, col = canvas.placements[-1]
    nucleus = pool.nuclei[member]
    inner = slice(canvas.pad, canvas.pad + canvas.side)
    after = canvas.labels[inner, inner].copy()
    before = np.where(after == len(canvas.placements), 0, after)
    dilated = (
        ndimage.distance_transform_edt(before == 0) < nucleus.reach + _APART
        if before.any()
        else np.zeros(before.shape, bool)
    )
    position = row + config.margin, col + config.margin
    return SynthesisSteps(before, nucleus.mask, nucleus.reach, nucleus.centre, dilated, position, after, size)
