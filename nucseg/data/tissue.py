"""The built-in tissue: synthetic H&E-like images with exact label maps, so that everything runs without a download.

**Nothing here is real.** No image, annotation or statistic of a patient went into it; a score on it says that the software
works, and which of two methods did better *on this generator*. It says nothing about histology.

An image is built the way a slide is: an architecture (glands, a lymphocyte sheet, collagen, a stratified epithelium) says
where cells may lie, nuclei are thrown there and cut where they touch, both stains are given a concentration at each pixel, and
light passes through them (Beer-Lambert: intensity = white * exp(-concentration * absorbance)). Then come the microscope's
and the laboratory's faults: blur, folds, dust, compression, sensor noise. Sizes are pixels throughout.

What makes it a task worth learning: nuclei touch, some are pale and vesicular or out of focus, nucleus-like things are not
nuclei (red blood cells, basophilic cytoplasm, mucus, dust), stain varies from image to image, and cellularity varies
inside each image, so that it matters which patch is annotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import fft, ndimage
from scipy.spatial import cKDTree
from skimage.measure import label as connected_components

SYNTHETIC_NOTE = "Built-in synthetic tissue: generated images, not real histology."


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


@dataclass(frozen=True)
class TissueKind:
    """One tissue: its architecture, its main and its accompanying nuclei, and the colours of its two stains."""

    architecture: Literal["glands", "sheet", "fibres", "strata"]
    nucleus: Nucleus
    companion: Nucleus
    haematoxylin: tuple[float, float, float]  # absorbance of unit concentration in red, green, blue
    eosin: tuple[float, float, float]


SPINDLE = Nucleus(11.5, 0.12, elongation=2.6, irregularity=0.04, stain=0.95, vesicular=0.2, clumps=0.2)

KINDS: dict[str, TissueKind] = {
    # glands round a lumen: oval, vesicular nuclei in a basal row, touching; spindle nuclei in the stroma between
    "glandular": TissueKind(
        "glands",
        Nucleus(15.0, 0.11, elongation=1.35, stain=1.0, vesicular=0.4, clumps=0.45, nucleolus=0.4),
        SPINDLE,
        haematoxylin=(0.88, 1.02, 0.50),
        eosin=(0.16, 0.66, 0.38),
    ),
    # sheets of small, round, dark lymphocytes with a pale follicle centre and empty sinuses
    "lymphoid": TissueKind(
        "sheet",
        Nucleus(11.0, 0.09, elongation=1.12, irregularity=0.06, stain=1.2, vesicular=0.1, clumps=0.4),
        Nucleus(15.0, 0.15, elongation=1.25, irregularity=0.09, stain=0.8, vesicular=0.45, clumps=0.4, nucleolus=0.5),
        haematoxylin=(1.10, 1.06, 0.44),
        eosin=(0.20, 0.52, 0.26),
    ),
    # wavy collagen, strongly pink, with few, long, thin nuclei along the fibres, and vessels
    "stromal": TissueKind(
        "fibres",
        Nucleus(12.5, 0.14, elongation=2.9, irregularity=0.05, stain=0.92, vesicular=0.25, clumps=0.3),
        Nucleus(11.0, 0.1, elongation=1.15, irregularity=0.06, stain=1.05, vesicular=0.1, clumps=0.4),
        haematoxylin=(0.80, 0.96, 0.48),
        eosin=(0.12, 0.80, 0.50),
    ),
    # stratified cells with borders, maturing from a crowded basal layer to keratin: large, irregular nuclei, nucleoli
    "squamous": TissueKind(
        "strata",
        Nucleus(18.0, 0.13, elongation=1.25, irregularity=0.09, stain=0.9, vesicular=0.5, clumps=0.35, nucleolus=0.8),
        Nucleus(14.0, 0.12, elongation=1.6, irregularity=0.07, stain=1.0, vesicular=0.25, clumps=0.35),
        haematoxylin=(0.74, 1.05, 0.66),
        eosin=(0.10, 0.62, 0.56),
    ),
}
UNSEEN_KIND = "squamous"  # occurs in the test split only


class Tissue(NamedTuple):
    """A synthetic image, (H, W, 3) uint8, and its exact label map, (H, W) int32 with ids 1..n."""

    image: np.ndarray
    labels: np.ndarray


class TissueSpec(NamedTuple):
    """One row of the built-in data set's table: what to generate and which split it belongs to."""

    id: str
    kind: str
    split: Literal["train", "val", "test"]
    seen: bool  # whether the kind occurs in train
    patient: str  # one image per patient, as in the Kumar set, so that splits are patient-wise
    seed: int
    shape: tuple[int, int]


def splits() -> list[TissueSpec]:
    """Return the built-in data set: 8 training, 2 validation and 8 test images, two of them of the unseen kind."""
    table = [
        ("train", ["glandular", "lymphoid", "stromal", "glandular", "lymphoid", "stromal", "glandular", "lymphoid"]),
        ("val", ["glandular", "stromal"]),
        ("test", ["glandular", "lymphoid", "stromal", "glandular", "lymphoid", "stromal", UNSEEN_KIND, UNSEEN_KIND]),
    ]
    specs: list[TissueSpec] = []
    for split, kinds in table:
        for kind in kinds:
            seed = 1 + sum(spec.kind == kind for spec in specs)  # also the number in the id
            patient = f"synthetic-{len(specs) + 1:02d}"
            name = f"tissue-{kind}-{seed:02d}"
            specs.append(TissueSpec(name, kind, split, kind != UNSEEN_KIND, patient, seed, (256, 256)))
    return specs


def generate_tissue(kind: str, shape: tuple[int, int] = (256, 256), seed: int = 0) -> Tissue:
    """Generate one synthetic H&E image with its label map.

    Parameters
    ----------
    kind
        A key of `KINDS`.
    shape
        Height and width in pixels, each at least 64.
    seed
        Integer >= 0. The same kind, shape and seed give the same image (labels exactly; grey values up to the
        rounding of the platform's exponential).

    Returns
    -------
    Tissue
        `image` (H, W, 3) uint8 and `labels` (H, W) int32: ids 1..n, each one 4-connected piece, never overlapping.

    Raises
    ------
    ValueError
        If the kind is unknown, the shape too small or the seed negative.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: no tissue called {kind!r}; choose one of {', '.join(KINDS)}")
    if len(shape) != 2 or min(shape) < 64:
        raise ValueError(f"shape: expected (height, width) of at least 64 pixels each, got {shape}")
    if seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed}")
    tissue = KINDS[kind]
    rng = np.random.default_rng(np.random.SeedSequence([seed, *kind.encode()]))
    scene = _ARCHITECTURES[tissue.architecture](rng, shape, tissue)
    cells = _throw(rng, scene.populations)
    labels, level = _draw(shape, cells)
    labels, cells = _keep_whole(labels, cells)
    if scene.borders is not None:
        _add_cell_borders(scene, cells)
    stains = _stain(rng, scene, labels, level, cells)
    return Tissue(_photograph(rng, tissue, stains), labels)


# --- Where cells lie -------------------------------------------------------------------------------------------------


class _Population(NamedTuple):
    nucleus: Nucleus
    weight: np.ndarray  # (H, W) >= 0, relative chance of a nucleus' centre
    angle: np.ndarray  # (H, W), direction of its long axis in radians
    count: int  # nuclei tried; those that find no room are dropped
    spacing: float  # least distance of two centres over the sum of their radii; below 1 they touch


@dataclass
class _Scene:
    """Stain concentrations without nuclei, who lives where, and where red blood cells are."""

    haematoxylin: np.ndarray
    eosin: np.ndarray
    populations: list[_Population]
    blood: np.ndarray  # (H, W) bool
    borders: np.ndarray | None = None  # (H, W) 0..1, strength of visible borders between cells


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Return smooth noise of zero mean and unit variance whose bumps are about `scale` pixels wide, (H, W) float32."""
    # a Gaussian bump of random height on every point of a grid: two small matrix products, where a wide filter is slow
    step = max(1.0, scale / 2)
    grids = [np.arange(-2 * scale, side + 2 * scale, step) for side in shape]
    bumps = [np.exp(-2 * ((np.arange(n)[:, None] - grid) / scale) ** 2) for n, grid in zip(shape, grids, strict=True)]
    field = bumps[0] @ rng.standard_normal((len(grids[0]), len(grids[1]))) @ bumps[1].T
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _step(values: np.ndarray, softness: float) -> np.ndarray:
    """Return a soft step: 0 well below 0, 1 well above."""
    return 0.5 + 0.5 * np.tanh(values / softness)


def _flow(rng: np.random.Generator, shape: tuple[int, int], waviness: float) -> tuple[np.ndarray, np.ndarray]:
    """Return wavy fibres: texture of zero mean, and the direction along them, each (H, W)."""
    rows, cols = np.indices(shape, dtype=np.float32)
    turn = rng.uniform(0, np.pi)
    along = math.cos(turn) * cols - math.sin(turn) * rows
    crimp = 2.5 * np.sin(along * (2 * np.pi / rng.uniform(28, 45)) + 2 * _noise(rng, shape, 50))
    across = math.cos(turn) * rows + math.sin(turn) * cols + waviness * _noise(rng, shape, 64) + crimp
    side = 256
    texture = np.zeros(shape, np.float32)
    for width, length, strength in ((3.0, 6.0, 0.5), (7.0, 4.0, 0.5), (1.4, 8.0, 0.6)):
        table = ndimage.gaussian_filter(rng.standard_normal((side, side), dtype=np.float32), 1, mode="wrap")
        where = [across * 2 / width % side, along * 2 / (width * length) % side]
        texture += strength * ndimage.map_coordinates(table, where, order=1, mode="grid-wrap") / table.std()
    down, right = np.gradient(across)
    return texture, np.arctan2(-right, down) % np.pi + 0.15 * _noise(rng, shape, 12)


def _blob(rng: np.random.Generator, shape: tuple[int, int], centre, radius: float, elongation=1.3, bumps=0.12):
    """Return the level of a large, bumpy blob (below 1 inside) and the direction away from its centre, each (H, W)."""
    rows, cols = np.indices(shape, dtype=np.float32)
    down, right = rows - float(centre[0]), cols - float(centre[1])
    waves = _waves(rng, 1, bumps)[0].tolist()
    return _level(down, right, radius, elongation, rng.uniform(0, np.pi), waves), np.arctan2(down, right)


def _vessels(rng: np.random.Generator, shape: tuple[int, int], count: int, room: np.ndarray):
    """Return the level of the nearest vessel (below 1 inside), the direction of its wall, and its red blood cells."""
    level, wall = np.full(shape, 9.0, np.float32), np.zeros(shape, np.float32)
    for centre in rng.permutation(np.argwhere(room))[:count]:
        one, outward = _blob(rng, shape, centre, rng.uniform(10, 20), rng.uniform(1.2, 3.0))
        wall = np.where(one < level, outward + np.pi / 2, wall)
        level = np.minimum(level, one)
    red = Nucleus(9.0, 0.12, elongation=1.15, irregularity=0.08)
    cells = _throw(rng, [_Population(red, (level < 0.8) + 1e-9, wall, 14 * count if count else 0, 0.95)])
    return level, wall, (_draw(shape, cells)[0] > 0) & (level < 1)


def _glands(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> _Scene:
    fibres, along = _flow(rng, shape, 14)
    level, outward = np.full(shape, 9.0, np.float32), np.zeros(shape, np.float32)
    lumen = np.zeros(shape, np.float32)
    tries = rng.uniform(0, 1, (40, 2)) * shape
    centres: list[np.ndarray] = []
    wanted = max(1, round(np.prod(shape) / 256**2 * rng.uniform(3, 6)))
    for centre in tries:  # glands lie apart, which leaves part of the image to the stroma
        if len(centres) == wanted or any(np.hypot(*(centre - other)) < 78 for other in centres):
            continue
        centres.append(centre)
        one, away = _blob(rng, shape, centre, rng.uniform(36, 52))
        hollow = rng.uniform(0.2, 0.5)
        lumen = np.where(one < level, _step(hollow - one, 0.05), lumen)
        outward = np.where(one < level, away, outward)
        level = np.minimum(level, one)
    inside = _step(1.0 - level, 0.03)
    vessel, wall, blood = _vessels(rng, shape, rng.integers(1, 3), level > 1.6)
    open_ = np.maximum(lumen, _step(1 - vessel, 0.08) * (1 - inside))
    mucus = 0.12 * _step(_noise(rng, shape, 30), 0.5) * np.abs(_noise(rng, shape, 5)) * lumen  # basophilic wisps
    cytoplasm = 1 + 0.18 * _noise(rng, shape, 3) + 0.15 * _noise(rng, shape, 20)
    eosin = inside * 0.62 * cytoplasm + (1 - inside) * (0.85 + 0.22 * fibres) + 0.35 * np.exp(-(((level - 1) / 0.04) ** 2))
    haem = inside * (0.17 + 0.05 * _noise(rng, shape, 4)) + (1 - inside) * (0.06 + 0.03 * fibres)
    stroma = (0.05 + _step(_noise(rng, shape, 60) - 0.3, 0.2)) * ((level > 1.12) & (vessel > 1.2))
    row = np.exp(-(((level - 0.8) / 0.09) ** 2)) * (lumen < 0.1)
    stray = 0.05 * ((level < 0.72) & (lumen < 0.05))
    populations = [
        _Population(kind.nucleus, row + stray, outward, 420, 0.8),
        _Population(kind.companion, stroma, along, 36, 0.95),
        _Population(kind.companion, 1.0 * (np.abs(vessel - 1.12) < 0.1) * (level > 1.1), wall, 20, 1.0),
    ]
    haem, eosin = haem * (1 - open_) + mucus, eosin * (1 - open_) + 0.05 * open_
    return _Scene(haem, eosin, populations, blood, 0.5 * inside * (1 - lumen))


def _sheet(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> _Scene:
    fibres, along = _flow(rng, shape, 20)
    crowd = _noise(rng, shape, 60) + 0.5 * _noise(rng, shape, 22)
    sinus = _step(_noise(rng, shape, 30) + 0.5 * _noise(rng, shape, 8) - 1.7 - 0.5 * crowd, 0.12)
    centre = rng.uniform(0.2, 0.8, 2) * shape
    follicle, _ = _blob(rng, shape, centre, rng.uniform(38, 55))
    pale = _step(1 - follicle, 0.1)
    dense = _step(crowd + 0.1, 0.35)
    any_way = np.pi * _noise(rng, shape, 4)
    crack = 0.8 * _noise(rng, shape, 8) + 0.6 * _noise(rng, shape, 4)  # the cells come apart in the section
    eosin = 0.42 + 0.25 * dense + 0.12 * _noise(rng, shape, 3) + 0.1 * fibres + 0.25 * pale
    haem = 0.1 + 0.14 * dense + 0.06 * _noise(rng, shape, 3)
    gaps = np.maximum(sinus, 0.85 * _step(crack - 0.75, 0.25) * (1 - pale))
    blood_level, _, blood = _vessels(rng, shape, rng.integers(0, 3), (sinus < 0.2) & (pale < 0.2))
    gaps = np.maximum(gaps, _step(1 - blood_level, 0.08))
    free = (blood_level > 1.1) * (1 - sinus)
    populations = [
        _Population(kind.companion, pale * free, any_way, 55, 1.0),
        _Population(kind.companion, (1 - pale) * free, any_way, 10, 1.1),
        _Population(SPINDLE, _step(-crowd - 0.5, 0.2) * free, along, 12, 1.2),
        _Population(kind.nucleus, (0.008 + dense**3) * (1 - 0.93 * pale) * free, any_way, 290, 0.8),
    ]
    return _Scene(haem * (1 - gaps), eosin * (1 - gaps) + 0.04, populations, blood)


def _fibres(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> _Scene:
    fibres, along = _flow(rng, shape, 24)
    cellular = _step(_noise(rng, shape, 70) - 0.2, 0.2)  # the rest is collagen with hardly a nucleus
    cleft = _step(-fibres - 1.35, 0.2) * _step(_noise(rng, shape, 30) + 0.2, 0.3)  # shrinkage between the bundles
    vessel, wall, blood = _vessels(rng, shape, rng.integers(1, 4), np.ones(shape, bool))
    eosin = 0.85 + 0.3 * fibres + 0.12 * _noise(rng, shape, 30) + 0.25 * np.exp(-(((vessel - 1.25) / 0.15) ** 2))
    haem = 0.06 + 0.05 * cellular * (1 + fibres) + 0.02 * _noise(rng, shape, 4)
    open_ = np.maximum(0.8 * cleft, _step(1 - vessel, 0.08))
    outside = vessel > 1.25
    infiltrate = _step(_noise(rng, shape, 40) - 1.5, 0.2)
    populations = [
        _Population(kind.nucleus, 1.0 * (np.abs(vessel - 1.15) < 0.12), wall, 24, 1.0),
        _Population(kind.companion, infiltrate * outside, wall, 26, 0.9),
        _Population(kind.nucleus, (0.02 + cellular) * outside * (1 - cleft), along, 46, 0.8),
    ]
    return _Scene(haem * (1 - open_), eosin * (1 - open_) + 0.04, populations, blood)


def _strata(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> _Scene:
    rows, cols = np.indices(shape, dtype=np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    depth = (np.cos(turn) * (rows - shape[0] / 2) + np.sin(turn) * (cols - shape[1] / 2)) / max(shape)
    depth += 0.06 * _noise(rng, shape, 45)  # below 0 towards the keratin, above towards the stroma
    fibres, along = _flow(rng, shape, 14)
    keratin, stroma = _step(-0.38 - depth, 0.03), _step(depth - 0.36, 0.01)
    basal = np.exp(-(((depth - 0.31) / 0.05) ** 2))
    layer = np.full(shape, -turn, np.float32)  # long axes lie along the layers, and across them at the base
    flakes = np.sin(140 * depth + 2 * _noise(rng, shape, 20))
    cytoplasm = 0.8 - 0.4 * depth + 0.1 * _noise(rng, shape, 3) + 0.1 * _noise(rng, shape, 25)
    eosin = cytoplasm * (1 - keratin - stroma) + keratin * (1.15 + 0.2 * flakes) + stroma * (0.7 + 0.2 * fibres)
    haem = 0.08 + 0.12 * basal + 0.02 * _noise(rng, shape, 4)
    vessel, wall, blood = _vessels(rng, shape, rng.integers(0, 2), stroma > 0.9)
    open_ = _step(1 - vessel, 0.08) * stroma
    epithelium = (keratin < 0.3) & (stroma < 0.1)
    populations = [
        _Population(kind.companion, basal * (stroma < 0.1), layer + np.pi / 2, 170, 0.8),
        _Population(kind.nucleus, np.exp(2 * np.minimum(depth, 0.2)) * epithelium, layer, 220, 1.28),
        _Population(SPINDLE, 1.0 * ((stroma > 0.9) & (vessel > 1.2)), along, 16, 1.1),
    ]
    borders = (1 - keratin) * (1 - stroma)
    return _Scene(haem * (1 - open_), eosin * (1 - open_), populations, blood, borders)


_ARCHITECTURES: dict[str, Callable[..., _Scene]] = {
    "glands": _glands,
    "sheet": _sheet,
    "fibres": _fibres,
    "strata": _strata,
}

# --- Nuclei: their outlines, and who gets a pixel where two overlap ---------------------------------------------------

_CELL = np.dtype(
    [(name, "f8") for name in ("row", "col", "radius", "elongation", "angle", "spacing", "depth")]
    + [(name, "f8") for name in ("stain", "vesicular", "clumps", "nucleolus")]
    + [("waves", "f8", (3, 2))]
)


def _waves(rng: np.random.Generator, count: int, amplitude: float) -> np.ndarray:
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


def _level(down, right, radius, elongation, angle, waves) -> np.ndarray:
    """Return how far out a point lies: 0 at the centre, 1 on the outline of a bumpy ellipse."""
    u, v = _ellipse(down, right, radius, elongation, angle)
    theta = np.arctan2(v, u)
    rim = 1 + sum(size * np.cos(k * theta + phase) for k, (size, phase) in enumerate(waves, start=2))
    return np.hypot(u, v) / np.maximum(rim, 0.3)


def _throw(rng: np.random.Generator, populations: list[_Population]) -> np.ndarray:
    """Throw nuclei at random, first come first served: one that lies too close to an earlier one is dropped."""
    thrown = [np.zeros(0, _CELL)]
    for who in populations:
        if not who.weight.any():
            continue
        cells, look = np.zeros(who.count, _CELL), who.nucleus
        chance = np.cumsum(who.weight, dtype=float)
        place = np.searchsorted(chance, rng.uniform(0, chance[-1], who.count))
        cells["row"], cells["col"] = np.unravel_index(np.minimum(place, chance.size - 1), who.weight.shape)
        normal = rng.standard_normal((5, who.count))
        cells["radius"] = look.diameter / 2 * (1 + look.spread * np.clip(normal[0], -2, 2))
        cells["elongation"] = 1 + (look.elongation - 1) * np.exp(0.3 * normal[1])
        cells["angle"] = who.angle.ravel()[place] + 0.12 * normal[2]
        cells["stain"] = look.stain * np.exp(0.2 * normal[3])  # deep and pale ones side by side
        cells["vesicular"] = np.clip(look.vesicular + 0.15 * normal[4], 0, 0.85)
        cells["waves"] = _waves(rng, who.count, look.irregularity)
        cells["depth"] = rng.uniform(0, 0.35, who.count)
        cells["spacing"] = who.spacing * rng.uniform(1, 1.35, who.count)  # clusters here, loose cells there
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


def _draw(shape: tuple[int, int], cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the label map of `cells` (cell i has id i + 1) and each pixel's level in its nucleus, each (H, W).

    A pixel inside two outlines goes to the nucleus in which it lies deeper, in favour of the one with the greater `depth`.
    """
    labels, best = np.zeros(shape, np.int32), np.full(shape, np.inf, np.float32)
    level = np.ones(shape, np.float32)
    for i, cell in enumerate(cells, start=1):
        reach = int(np.ceil(cell["radius"] * np.sqrt(cell["elongation"]) * 1.4)) + 1
        rows = slice(max(0, int(cell["row"]) - reach), int(cell["row"]) + reach + 1)
        cols = slice(max(0, int(cell["col"]) - reach), int(cell["col"]) + reach + 1)
        down, right = np.ogrid[rows, cols]
        down, right = down[: shape[0] - rows.start] - cell["row"], right[:, : shape[1] - cols.start] - cell["col"]
        one = _level(down, right, cell["radius"], cell["elongation"], cell["angle"], cell["waves"])
        wins = (one < 1) & (one - cell["depth"] < best[rows, cols])
        labels[rows, cols][wins], level[rows, cols][wins] = i, one[wins]
        best[rows, cols][wins] = (one - cell["depth"])[wins]
    return labels, level


def _keep_whole(labels: np.ndarray, cells: np.ndarray, least: int = 25) -> tuple[np.ndarray, np.ndarray]:
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


def _add_cell_borders(scene: _Scene, cells: np.ndarray) -> None:
    """Draw the borders between neighbouring cells (the Voronoi edges of the nuclei) into the eosin, in place."""
    if len(cells) < 2:
        return
    where = scene.borders > 0.02
    near, _ = cKDTree(np.column_stack([cells["row"], cells["col"]])).query(np.argwhere(where), k=2)
    gap = near[:, 1] - near[:, 0]
    line = 0.3 * np.exp(-((gap / 2.0) ** 2)) - 0.15 * np.exp(-(((gap - 5) / 2.5) ** 2))  # dark, with a pale seam
    scene.eosin[where] += scene.borders[where] * line


def _stain(rng, scene: _Scene, labels: np.ndarray, level: np.ndarray, cells: np.ndarray):
    """Return the concentrations of haematoxylin, eosin and haemoglobin, nuclei and other bodies included, (3, H, W)."""
    shape = labels.shape
    inside = labels > 0
    which = np.maximum(labels - 1, 0)
    if len(cells) == 0:
        cells = np.zeros(1, _CELL)
    rim = (1 - level) * cells["radius"][which]  # roughly the distance to the outline
    chromatin = cells["clumps"][which] * (0.7 * _noise(rng, shape, 2.6) + 0.4 * _noise(rng, shape, 5))
    hollow = 1 - cells["vesicular"][which] * _step(rim - 1.9, 0.7)
    side = rng.uniform(-0.35, 0.35, (2, len(cells))) * cells["radius"]
    rows, cols = np.indices(shape)
    away = (rows - (cells["row"] + side[0])[which]) ** 2 + (cols - (cells["col"] + side[1])[which]) ** 2
    nucleolus = cells["nucleolus"][which] * np.exp(-away / (2 * 1.3**2))
    nuclear = cells["stain"][which] * (hollow * (1 + chromatin) + nucleolus)
    haematoxylin = np.where(inside, np.maximum(nuclear, 0.12), scene.haematoxylin)
    halo = np.exp(-ndimage.distance_transform_edt(~inside) / 1.5) * ~inside * _step(_noise(rng, shape, 25), 0.6)
    eosin = np.where(inside, 0.45 * scene.eosin + 0.1, scene.eosin * (1 - 0.45 * halo))
    blood = scene.blood & ~inside
    haematoxylin[blood] = 0.02
    eosin[blood] = 0.25
    # bodies that are not nuclei: nuclei of other planes (blurred, faint shadows) and red globules
    count = max(3, np.prod(shape) // 6500)
    anywhere = np.pi * _noise(rng, shape, 8)
    room = 1.0 * ~ndimage.binary_dilation(inside, iterations=2) + 1e-9
    for look, tint in ((Nucleus(13.0, 0.2), "shadow"), (Nucleus(8.0, 0.3, irregularity=0.12), "globule")):
        bodies = _draw(shape, _throw(rng, [_Population(look, room, anywhere, int(count), 1.2)]))[0] > 0
        soft = ndimage.gaussian_filter(bodies.astype(np.float32), 2.2 if tint == "shadow" else 0.8) * ~inside
        haematoxylin = haematoxylin + soft * (0.28 if tint == "shadow" else 0.05)
        eosin = eosin + soft * (0.1 if tint == "shadow" else 0.7)
    red = 1.0 * blood * (1 + 0.12 * _noise(rng, shape, 4))
    # nothing in a section is smooth: grain of membranes and granules
    grain = 1 + 0.1 * _noise(rng, shape, 1.5) + 0.07 * _noise(rng, shape, 3)
    return np.maximum(np.stack([haematoxylin, eosin * grain, red]), 0)


def _photograph(rng, kind: TissueKind, stains: np.ndarray) -> np.ndarray:
    """Return the image that a scanner makes of a section with stains (3, H, W): (H, W, 3) uint8."""
    shape = stains.shape[1:]
    thickness = 1 + 0.07 * _noise(rng, shape, 80)
    if rng.uniform() < 0.3:  # a fold: the section lies double along a winding band
        rows, cols = np.indices(shape)
        turn = rng.uniform(0, np.pi)
        line = np.cos(turn) * (rows - shape[0] * rng.uniform(0.2, 0.8)) + np.sin(turn) * (cols - shape[1] / 2)
        thickness = thickness + 0.45 * np.exp(-(((line + 10 * _noise(rng, shape, 50)) / 6) ** 4))
    stains = stains * thickness * rng.uniform(0.85, 1.15, (3, 1, 1))
    sharp = ndimage.gaussian_filter(stains, (0, 0.7, 0.7))
    blurred = ndimage.gaussian_filter(stains, (0, 2.0, 2.0))
    focus = _step(_noise(rng, shape, 70) + 1.3, 0.4)  # about a tenth of the area lies out of focus
    stains = focus * sharp + (1 - focus) * blurred
    colours = np.array([kind.haematoxylin, kind.eosin, _BLOOD]) * rng.normal(1, 0.06, (3, 3))  # the laboratory's stain batch
    dust = np.zeros(shape, np.float32)
    specks = rng.integers(0, shape, (rng.integers(1, 5), 2))
    dust[specks[:, 0], specks[:, 1]] = rng.uniform(4, 14, len(specks))
    dust = ndimage.gaussian_filter(dust, rng.uniform(0.9, 1.6))
    white = rng.normal(243, 4) + rng.normal(0, 1.5, 3)
    image = white * np.exp(-(np.tensordot(stains, colours, axes=(0, 0)) + dust[..., None])).astype(np.float32)
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
