"""How the built-in tissue is drawn: nuclei thrown and cut where they touch, stained, lit and photographed.

Support of `nucseg.data.tissue`, which says what lies where. Sizes are pixels, stains are concentrations in units of the
colours that the tissue kind gives them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage
from scipy.spatial import cKDTree
from skimage.measure import label as connected_components


@dataclass(frozen=True)
class Nucleus:
    """How one population of nuclei looks: sizes in pixels, stain in units of the kind's haematoxylin colour."""

    diameter: float  # of the circle of equal area, mean
    spread: float = 0.1  # standard deviation of the diameter over its mean
    elongation: float = 1.2  # long axis over short axis, mean
    irregularity: float = 0.05  # amplitude of the bumps of the outline over the radius
    stain: float = 0.9  # haematoxylin concentration, mean
    vesicular: float = 0.3  # share of the stain missing inside (pale nucleus with a dark membrane), 0..1
    clumps: float = 0.25  # amplitude of the chromatin texture over the stain
    nucleolus: float = 0.0  # additional stain of one dark spot inside


class Population(NamedTuple):
    nucleus: Nucleus
    weight: np.ndarray  # (H, W) >= 0, relative chance of a nucleus' centre
    angle: np.ndarray  # (H, W), direction of its long axis in radians
    count: int  # nuclei tried on 256 x 256 pixels; those that find no room are dropped
    spacing: float  # least distance of two centres over the sum of their radii; below 1 they touch


@dataclass
class Scene:
    """Stain concentrations without nuclei, who lives where, and where red blood cells are."""

    haematoxylin: np.ndarray
    eosin: np.ndarray
    populations: list[Population]
    blood: np.ndarray  # (H, W) bool
    borders: np.ndarray | None = None  # (H, W) 0..1, strength of visible borders between cells


def noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Return smooth noise of zero mean and unit variance whose bumps are about `scale` pixels wide, (H, W) float32.

    Filtered in Fourier space: as fast for wide bumps as for narrow ones, and without the threads of a matrix product.
    """
    padded = [fft.next_fast_len(side + math.ceil(scale), real=True) for side in shape]  # no wrapping inside the image
    waves = fft.fftfreq(padded[0])[:, None], fft.rfftfreq(padded[1])[None, :]
    down, right = (np.exp(-((np.pi * scale * wave) ** 2) / 2).astype(np.float32) for wave in waves)
    white = fft.rfft2(rng.standard_normal(padded, dtype=np.float32))
    field = fft.irfft2(white * down * right, s=padded)[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def soft_step(values: np.ndarray, softness: float) -> np.ndarray:
    """Return a soft step: 0 well below 0, 1 well above."""
    return 0.5 + 0.5 * np.tanh(values / softness)


# --- Nuclei: their outlines, and who gets a pixel where two overlap ---------------------------------------------------

_CELL = np.dtype(
    [(name, "f8") for name in ("row", "col", "radius", "elongation", "angle", "spacing", "depth")]
    + [(name, "f8") for name in ("stain", "vesicular", "clumps", "nucleolus")]
    + [("waves", "f8", (3, 2))]
)


def outline_waves(rng: np.random.Generator, count: int, amplitude: float) -> np.ndarray:
    """Return amplitude and phase of the 2nd to 4th harmonic of `count` outlines, (count, 3, 2)."""
    size = amplitude * rng.standard_normal((count, 3)) / (1, 1.3, 1.8)
    return np.stack([size, rng.uniform(0, 2 * np.pi, (count, 3))], axis=-1)


def _ellipse(down, right, radius, elongation, angle) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates along and across an ellipse's long axis, in half axes."""
    stretch = elongation**0.5
    cos, sin = math.cos(angle), math.sin(angle)
    u = (cos * right + sin * down) / (radius * stretch)
    v = (cos * down - sin * right) / (radius / stretch)
    return u, v


def level_in(down, right, radius, elongation, angle, waves) -> np.ndarray:
    """Return how far out a point lies: 0 at the centre, 1 on the outline of a bumpy ellipse."""
    u, v = _ellipse(down, right, radius, elongation, angle)
    theta = np.arctan2(v, u)
    rim = 1 + sum(size * np.cos(k * theta + phase) for k, (size, phase) in enumerate(waves, start=2))
    return np.hypot(u, v) / np.maximum(rim, 0.3)


def throw(rng: np.random.Generator, populations: list[Population]) -> np.ndarray:
    """Throw nuclei at random, first come first served: one that lies too close to an earlier one is dropped."""
    thrown = [np.zeros(0, _CELL)]
    for who in populations:
        if not who.weight.any():
            continue
        count = round(who.count * who.weight.size / 256**2)
        cells, look = np.zeros(count, _CELL), who.nucleus
        chance = np.cumsum(who.weight, dtype=float)
        place = np.searchsorted(chance, rng.uniform(0, chance[-1], count))
        cells["row"], cells["col"] = np.unravel_index(np.minimum(place, chance.size - 1), who.weight.shape)
        normal = rng.standard_normal((5, count))
        cells["radius"] = look.diameter / 2 * (1 + look.spread * np.clip(normal[0], -2, 2))
        cells["elongation"] = 1 + (look.elongation - 1) * np.exp(0.3 * normal[1])
        cells["angle"] = who.angle.ravel()[place] + 0.12 * normal[2]
        cells["stain"] = look.stain * np.exp(0.2 * normal[3])  # deep and pale ones side by side
        cells["vesicular"] = np.clip(look.vesicular + 0.15 * normal[4], 0, 0.85)
        cells["waves"] = outline_waves(rng, count, look.irregularity)
        cells["depth"] = rng.uniform(0, 0.35, count)
        cells["spacing"] = who.spacing * rng.uniform(1, 1.35, count)  # clusters here, loose cells there
        cells["clumps"], cells["nucleolus"] = look.clumps, look.nucleolus
        thrown.append(cells)
    cells = np.concatenate(thrown)
    # two long nuclei end to end need more room than their equal-area circles say, side by side less: measure both ways
    kept: list[int] = []
    for i in range(len(cells)):
        one, others = cells[i], cells[kept]
        down, right = one["row"] - others["row"], one["col"] - others["col"]
        apart = np.hypot(*_ellipse(down, right, 1.0, one["elongation"], one["angle"]))
        if np.all(apart >= one["spacing"] * (one["radius"] + others["radius"])):
            kept.append(i)
    return cells[kept]


def draw(shape: tuple[int, int], cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the label map of `cells` (cell i has id i + 1) and each pixel's level in its nucleus, each (H, W).

    A pixel inside two outlines goes to the nucleus in which it lies deeper; `depth` favours the one that lies on top.
    """
    labels, best = np.zeros(shape, np.int32), np.full(shape, np.inf, np.float32)
    level = np.ones(shape, np.float32)
    for i, cell in enumerate(cells, start=1):
        reach = int(np.ceil(cell["radius"] * np.sqrt(cell["elongation"]) * 1.4)) + 1
        rows = slice(max(0, int(cell["row"]) - reach), int(cell["row"]) + reach + 1)
        cols = slice(max(0, int(cell["col"]) - reach), int(cell["col"]) + reach + 1)
        down, right = np.ogrid[rows, cols]
        down, right = down[: shape[0] - rows.start] - cell["row"], right[:, : shape[1] - cols.start] - cell["col"]
        one = level_in(down, right, cell["radius"], cell["elongation"], cell["angle"], cell["waves"])
        wins = (one < 1) & (one - cell["depth"] < best[rows, cols])
        labels[rows, cols][wins], level[rows, cols][wins] = i, one[wins]
        best[rows, cols][wins] = (one - cell["depth"])[wins]
    return labels, level


def keep_whole(labels: np.ndarray, cells: np.ndarray, least: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Keep the largest piece of each nucleus, drop what has fewer than `least` pixels, renumber to 1..n."""
    pieces = connected_components(labels, connectivity=1)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    owner = np.zeros(sizes.size, int)
    owner[pieces.ravel()] = labels.ravel()
    new_id = np.zeros(sizes.size, np.int32)
    kept = []
    for piece in np.argsort(-sizes, kind="stable"):
        if sizes[piece] >= least and owner[piece] not in kept:
            kept.append(owner[piece])
            new_id[piece] = len(kept)
    return new_id[pieces], cells[np.array(kept, int) - 1]


# --- Stain, light, camera --------------------------------------------------------------------------------------------

_BLOOD = (0.12, 0.95, 0.92)  # absorbance of a red blood cell in red, green, blue


def add_cell_borders(scene: Scene, cells: np.ndarray) -> None:
    """Draw the borders between neighbouring cells (the Voronoi edges of the nuclei) into the eosin, in place."""
    if len(cells) < 2:
        return
    where = scene.borders > 0.02
    near, _ = cKDTree(np.column_stack([cells["row"], cells["col"]])).query(np.argwhere(where), k=2)
    gap = near[:, 1] - near[:, 0]
    line = 0.3 * np.exp(-((gap / 2.0) ** 2)) - 0.15 * np.exp(-(((gap - 5) / 2.5) ** 2))  # dark, with a pale seam
    scene.eosin[where] += scene.borders[where] * line


def add_stains(rng, scene: Scene, labels: np.ndarray, level: np.ndarray, cells: np.ndarray):
    """Return the concentrations of haematoxylin, eosin and haemoglobin, nuclei and other bodies included, (3, H, W)."""
    shape = labels.shape
    inside = labels > 0
    which = np.maximum(labels - 1, 0)
    if len(cells) == 0:
        cells = np.zeros(1, _CELL)
    rim = (1 - level) * cells["radius"][which]  # roughly the distance to the outline
    chromatin = cells["clumps"][which] * (0.7 * noise(rng, shape, 2.6) + 0.4 * noise(rng, shape, 5))
    hollow = 1 - cells["vesicular"][which] * soft_step(rim - 1.9, 0.7)
    side = rng.uniform(-0.35, 0.35, (2, len(cells))) * cells["radius"]
    rows, cols = np.indices(shape)
    away = (rows - (cells["row"] + side[0])[which]) ** 2 + (cols - (cells["col"] + side[1])[which]) ** 2
    nucleolus = cells["nucleolus"][which] * np.exp(-away / (2 * 1.3**2))
    nuclear = cells["stain"][which] * (hollow * (1 + chromatin) + nucleolus)
    haematoxylin = np.where(inside, np.maximum(nuclear, 0.12), scene.haematoxylin)
    halo = np.exp(-ndimage.distance_transform_edt(~inside) / 1.5) * ~inside * soft_step(noise(rng, shape, 25), 0.6)
    eosin = np.where(inside, 0.55 * scene.eosin + 0.1, scene.eosin * (1 - 0.45 * halo))
    blood = scene.blood & ~inside
    haematoxylin[blood] = 0.02
    eosin[blood] = 0.25
    # bodies that are not nuclei: nuclei of other planes (blurred, faint shadows) and red globules
    count = max(3, np.prod(shape) // 5000)
    anywhere = np.pi * noise(rng, shape, 8)
    room = 1.0 * ~ndimage.binary_dilation(inside, iterations=2) + 1e-9
    for look, tint in ((Nucleus(13.0, 0.2), "shadow"), (Nucleus(8.0, 0.3, irregularity=0.12), "globule")):
        bodies = draw(shape, throw(rng, [Population(look, room, anywhere, int(count), 1.2)]))[0] > 0
        soft = ndimage.gaussian_filter(bodies.astype(np.float32), 2.2 if tint == "shadow" else 0.8) * ~inside
        haematoxylin = haematoxylin + soft * (0.36 if tint == "shadow" else 0.15)
        eosin = eosin + soft * (0.1 if tint == "shadow" else 0.7)
    red = 1.0 * blood * (1 + 0.12 * noise(rng, shape, 4))
    # nothing in a section is smooth: grain of membranes and granules
    grain = 1 + 0.13 * noise(rng, shape, 1.5) + 0.08 * noise(rng, shape, 3)
    return np.maximum(np.stack([haematoxylin, eosin * grain, red]), 0)


def photograph(rng, stains: np.ndarray, haematoxylin: tuple, eosin: tuple) -> np.ndarray:
    """Return the image, (H, W, 3) uint8, that a scanner makes of `stains`, (3, H, W), of the given absorbances."""
    shape = stains.shape[1:]
    thickness = 1 + 0.07 * noise(rng, shape, 80)
    if rng.uniform() < 0.3:  # a fold: the section lies double along a winding band
        rows, cols = np.indices(shape)
        turn = rng.uniform(0, np.pi)
        line = np.cos(turn) * (rows - shape[0] * rng.uniform(0.2, 0.8)) + np.sin(turn) * (cols - shape[1] / 2)
        thickness = thickness + 0.45 * np.exp(-(((line + 10 * noise(rng, shape, 50)) / 6) ** 4))
    stains = stains * thickness * rng.uniform(0.85, 1.15, (3, 1, 1))
    sharp = ndimage.gaussian_filter(stains, (0, 0.7, 0.7))
    blurred = ndimage.gaussian_filter(stains, (0, 2.0, 2.0))
    focus = soft_step(noise(rng, shape, 70) + 1.3, 0.4)  # about a tenth of the area lies out of focus
    stains = focus * sharp + (1 - focus) * blurred
    colours = np.array([haematoxylin, eosin, _BLOOD]) * rng.normal(1, 0.08, (3, 3))  # a laboratory's batch of stain
    dust = np.zeros(shape, np.float32)
    specks = rng.integers(0, shape, (rng.integers(1, 5), 2))
    dust[specks[:, 0], specks[:, 1]] = rng.uniform(4, 14, len(specks))
    dust = ndimage.gaussian_filter(dust, rng.uniform(0.9, 1.6))
    white = rng.normal(243, 4) + rng.normal(0, 1.5, 3)
    image = white * np.exp(-(np.einsum("shw,sc->hwc", stains, colours) + dust[..., None])).astype(np.float32)
    image = _compress(image + 2 * rng.standard_normal(image.shape, dtype=np.float32))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _compress(image: np.ndarray, quality_step: float = 3.0) -> np.ndarray:
    """Return the image with the rounding of JPEG's 8 x 8 cosine blocks (coarser for finer waves), (H, W, 3) float."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8, 3)
    wave = np.arange(8)
    step = quality_step * (1 + wave[:, None, None, None] + wave[None, None, :, None])
    rounded = np.rint(fft.dctn(blocks, axes=(1, 3), norm="ortho") / step) * step
    return fft.idctn(rounded, axes=(1, 3), norm="ortho").reshape(padded.shape)[:height, :width]
