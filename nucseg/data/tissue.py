"""The built-in tissue: synthetic H&E-like images with exact label maps, so that everything runs without a download.

**Nothing here is real.** No image or annotation of a patient went into it. A score on it says that the software works
and which of two methods did better *on this generator*; it says nothing about histology.

An image is made the way a slide is. An architecture (glands, a lymphocyte sheet, collagen, a stratified epithelium)
says where cells may lie; nuclei are thrown there and cut where they touch; each pixel gets a concentration of both
stains; light passes through them (Beer-Lambert: intensity = white * exp(-concentration * absorbance)). Then come the
faults of the laboratory and the microscope: folds, dust, blur, compression, sensor noise. Sizes are pixels.

What makes it a task worth learning: nuclei touch; some are pale and vesicular or out of focus; nucleus-like things are
not nuclei (red blood cells, shadows of other planes, basophilic cytoplasm, mucus, dust); stain varies between images;
and cellularity varies inside each image, so that it matters which patch is annotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from nucseg.data.tissue_drawing import (
    Nucleus,
    Population,
    Scene,
    add_cell_borders,
    add_stains,
    draw,
    keep_whole,
    level_in,
    noise,
    outline_waves,
    photograph,
    soft_step,
    throw,
)

SYNTHETIC_NOTE = "Built-in synthetic tissue: generated images, not real histology."


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
        haematoxylin=(0.86, 1.16, 0.62),
        eosin=(0.16, 0.66, 0.38),
    ),
    # sheets of small, round, dark lymphocytes with a pale follicle centre and empty sinuses
    "lymphoid": TissueKind(
        "sheet",
        Nucleus(11.0, 0.09, elongation=1.12, irregularity=0.06, stain=1.2, vesicular=0.1, clumps=0.4),
        Nucleus(15.0, 0.15, elongation=1.25, irregularity=0.09, stain=0.8, vesicular=0.45, clumps=0.4, nucleolus=0.5),
        haematoxylin=(1.08, 1.20, 0.56),
        eosin=(0.20, 0.52, 0.26),
    ),
    # wavy collagen, strongly pink, with few, long, thin nuclei along the fibres, and vessels
    "stromal": TissueKind(
        "fibres",
        Nucleus(12.5, 0.14, elongation=2.9, irregularity=0.05, stain=0.92, vesicular=0.25, clumps=0.3),
        Nucleus(11.0, 0.1, elongation=1.15, irregularity=0.06, stain=1.05, vesicular=0.1, clumps=0.4),
        haematoxylin=(0.84, 1.08, 0.60),
        eosin=(0.12, 0.80, 0.50),
    ),
    # stratified cells with borders, maturing from a crowded basal layer to keratin: large, irregular nuclei, nucleoli
    "squamous": TissueKind(
        "strata",
        Nucleus(18.0, 0.13, elongation=1.25, irregularity=0.09, stain=0.9, vesicular=0.5, clumps=0.35, nucleolus=0.8),
        Nucleus(14.0, 0.12, elongation=1.6, irregularity=0.07, stain=1.0, vesicular=0.25, clumps=0.35),
        haematoxylin=(0.82, 1.12, 0.62),
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
            shape = (512, 512) if split == "train" else (256, 256)  # six 128 px patches are 5 % of the training pixels
            specs.append(TissueSpec(name, kind, split, kind != UNSEEN_KIND, patient, seed, shape))
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
        Integer >= 0. The same kind, shape and seed give the same image (on other
        platforms up to the rounding of their elementary functions).

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
    cells = throw(rng, scene.populations)
    labels, level = draw(shape, cells)
    labels, cells = keep_whole(labels, cells)
    if scene.borders is not None:
        add_cell_borders(scene, cells)
    stains = add_stains(rng, scene, labels, level, cells)
    return Tissue(photograph(rng, stains, tissue.haematoxylin, tissue.eosin), labels)


# --- The four architectures -------------------------------------------------------------------------------------------


def _flow(rng: np.random.Generator, shape: tuple[int, int], waviness: float) -> tuple[np.ndarray, np.ndarray]:
    """Return wavy fibres: texture of zero mean, and the direction along them, each (H, W)."""
    rows, cols = np.indices(shape, dtype=np.float32)
    turn = rng.uniform(0, np.pi)
    along = math.cos(turn) * cols - math.sin(turn) * rows
    crimp = 2.5 * np.sin(along * (2 * np.pi / rng.uniform(28, 45)) + 2 * noise(rng, shape, 50))
    across = math.cos(turn) * rows + math.sin(turn) * cols + waviness * noise(rng, shape, 64) + crimp
    side = 256
    texture = np.zeros(shape, np.float32)
    for width, length, strength in ((3.0, 6.0, 0.5), (7.0, 4.0, 0.5), (1.4, 8.0, 0.6)):
        table = ndimage.gaussian_filter(rng.standard_normal((side, side), dtype=np.float32), 1, mode="wrap")
        where = [across * 2 / width % side, along * 2 / (width * length) % side]
        texture += strength * ndimage.map_coordinates(table, where, order=1, mode="grid-wrap") / table.std()
    down, right = np.gradient(across)
    return texture, np.arctan2(-right, down) % np.pi + 0.15 * noise(rng, shape, 12)


def _blob(rng: np.random.Generator, shape: tuple[int, int], centre, radius: float, elongation=1.3, bumps=0.12):
    """Return the level of a large, bumpy blob (below 1 inside) and the direction away from its centre, each (H, W)."""
    rows, cols = np.indices(shape, dtype=np.float32)
    down, right = rows - float(centre[0]), cols - float(centre[1])
    waves = outline_waves(rng, 1, bumps)[0].tolist()
    return level_in(down, right, radius, elongation, rng.uniform(0, np.pi), waves), np.arctan2(down, right)


def _vessels(rng: np.random.Generator, shape: tuple[int, int], count: int, room: np.ndarray):
    """Return the level of the nearest vessel (below 1 inside), the direction of its wall, and its red blood cells."""
    level, wall = np.full(shape, 9.0, np.float32), np.zeros(shape, np.float32)
    for centre in rng.permutation(np.argwhere(room))[:count]:
        one, outward = _blob(rng, shape, centre, rng.uniform(10, 20), rng.uniform(1.2, 3.0))
        wall = np.where(one < level, outward + np.pi / 2, wall)
        level = np.minimum(level, one)
    red = Nucleus(9.0, 0.12, elongation=1.15, irregularity=0.08)
    cells = throw(rng, [Population(red, (level < 0.8) + 1e-9, wall, 14 * count if count else 0, 0.95)])
    return level, wall, (draw(shape, cells)[0] > 0) & (level < 1)


def _glands(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> Scene:
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
        lumen = np.where(one < level, soft_step(hollow - one, 0.05), lumen)
        outward = np.where(one < level, away, outward)
        level = np.minimum(level, one)
    inside = soft_step(1.0 - level, 0.03)
    vessel, wall, blood = _vessels(rng, shape, rng.integers(1, 3), level > 1.6)
    open_ = np.maximum(lumen, soft_step(1 - vessel, 0.08) * (1 - inside))
    mucus = 0.12 * soft_step(noise(rng, shape, 30), 0.5) * np.abs(noise(rng, shape, 5)) * lumen  # basophilic wisps
    cytoplasm = 1 + 0.18 * noise(rng, shape, 3) + 0.15 * noise(rng, shape, 20)
    eosin = inside * 0.62 * cytoplasm + (1 - inside) * (0.85 + 0.22 * fibres)
    eosin += 0.35 * np.exp(-(((level - 1) / 0.04) ** 2))  # basement membrane
    haem = inside * (0.17 + 0.05 * noise(rng, shape, 4)) + (1 - inside) * (0.06 + 0.03 * fibres)
    stroma = (0.05 + soft_step(noise(rng, shape, 60) - 0.3, 0.2)) * ((level > 1.12) & (vessel > 1.2))
    row = np.exp(-(((level - 0.8) / 0.09) ** 2)) * (lumen < 0.1)
    stray = 0.05 * ((level < 0.72) & (lumen < 0.05))
    populations = [
        Population(kind.nucleus, row + stray, outward, 420, 0.8),
        Population(kind.companion, stroma, along, 36, 0.95),
        Population(kind.companion, 1.0 * (np.abs(vessel - 1.12) < 0.1) * (level > 1.1), wall, 20, 1.0),
    ]
    haem, eosin = haem * (1 - open_) + mucus, eosin * (1 - open_) + 0.05 * open_
    return Scene(haem, eosin, populations, blood, 0.5 * inside * (1 - lumen))


def _sheet(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> Scene:
    fibres, along = _flow(rng, shape, 20)
    crowd = noise(rng, shape, 60) + 0.5 * noise(rng, shape, 22)
    sinus = soft_step(noise(rng, shape, 30) + 0.5 * noise(rng, shape, 8) - 1.7 - 0.5 * crowd, 0.12)
    centre = rng.uniform(0.2, 0.8, 2) * shape
    follicle, _ = _blob(rng, shape, centre, rng.uniform(38, 55))
    pale = soft_step(1 - follicle, 0.1)
    dense = soft_step(crowd + 0.1, 0.35)
    any_way = np.pi * noise(rng, shape, 4)
    crack = 0.8 * noise(rng, shape, 8) + 0.6 * noise(rng, shape, 4)  # the cells come apart in the section
    eosin = 0.42 + 0.25 * dense + 0.12 * noise(rng, shape, 3) + 0.1 * fibres + 0.25 * pale
    haem = 0.1 + 0.14 * dense + 0.06 * noise(rng, shape, 3)
    gaps = np.maximum(sinus, 0.85 * soft_step(crack - 0.75, 0.25) * (1 - pale))
    blood_level, _, blood = _vessels(rng, shape, rng.integers(0, 3), (sinus < 0.2) & (pale < 0.2))
    gaps = np.maximum(gaps, soft_step(1 - blood_level, 0.08))
    free = (blood_level > 1.1) * (1 - sinus)
    populations = [
        Population(kind.companion, pale * free, any_way, 55, 1.0),
        Population(kind.companion, (1 - pale) * free, any_way, 10, 1.1),
        Population(SPINDLE, soft_step(-crowd - 0.5, 0.2) * free, along, 12, 1.2),
        Population(kind.nucleus, (0.008 + dense**3) * (1 - 0.93 * pale) * free, any_way, 290, 0.8),
    ]
    return Scene(haem * (1 - gaps), eosin * (1 - gaps) + 0.04, populations, blood)


def _fibres(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> Scene:
    fibres, along = _flow(rng, shape, 24)
    cellular = soft_step(noise(rng, shape, 70) - 0.2, 0.2)  # the rest is collagen with hardly a nucleus
    cleft = soft_step(-fibres - 1.35, 0.2) * soft_step(noise(rng, shape, 30) + 0.2, 0.3)  # shrinkage
    vessel, wall, blood = _vessels(rng, shape, rng.integers(1, 4), np.ones(shape, bool))
    eosin = 0.85 + 0.3 * fibres + 0.12 * noise(rng, shape, 30) + 0.25 * np.exp(-(((vessel - 1.25) / 0.15) ** 2))
    haem = 0.06 + 0.05 * cellular * (1 + fibres) + 0.02 * noise(rng, shape, 4)
    open_ = np.maximum(0.8 * cleft, soft_step(1 - vessel, 0.08))
    outside = vessel > 1.25
    infiltrate = soft_step(noise(rng, shape, 40) - 1.5, 0.2)
    populations = [
        Population(kind.nucleus, 1.0 * (np.abs(vessel - 1.15) < 0.12), wall, 24, 1.0),
        Population(kind.companion, infiltrate * outside, wall, 26, 0.9),
        Population(kind.nucleus, (0.02 + cellular) * outside * (1 - cleft), along, 46, 0.8),
    ]
    return Scene(haem * (1 - open_), eosin * (1 - open_) + 0.04, populations, blood)


def _strata(rng: np.random.Generator, shape: tuple[int, int], kind: TissueKind) -> Scene:
    rows, cols = np.indices(shape, dtype=np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    depth = (np.cos(turn) * (rows - shape[0] / 2) + np.sin(turn) * (cols - shape[1] / 2)) / max(shape)
    depth += 0.06 * noise(rng, shape, 45)  # below 0 towards the keratin, above towards the stroma
    fibres, along = _flow(rng, shape, 14)
    keratin, stroma = soft_step(-0.38 - depth, 0.03), soft_step(depth - 0.36, 0.01)
    basal = np.exp(-(((depth - 0.31) / 0.05) ** 2))
    layer = np.full(shape, -turn, np.float32)  # long axes lie along the layers, and across them at the base
    flakes = np.sin(140 * depth + 2 * noise(rng, shape, 20))
    cytoplasm = 0.8 - 0.4 * depth + 0.1 * noise(rng, shape, 3) + 0.1 * noise(rng, shape, 25)
    eosin = cytoplasm * (1 - keratin - stroma) + keratin * (1.15 + 0.2 * flakes) + stroma * (0.7 + 0.2 * fibres)
    haem = 0.08 + 0.12 * basal + 0.02 * noise(rng, shape, 4)
    vessel, _, blood = _vessels(rng, shape, rng.integers(0, 2), stroma > 0.9)
    open_ = soft_step(1 - vessel, 0.08) * stroma
    epithelium = (keratin < 0.3) & (stroma < 0.1)
    populations = [
        Population(kind.companion, basal * (stroma < 0.1), layer + np.pi / 2, 170, 0.8),
        Population(kind.nucleus, np.exp(2 * np.minimum(depth, 0.2)) * epithelium, layer, 220, 1.28),
        Population(SPINDLE, 1.0 * ((stroma > 0.9) & (vessel > 1.2)), along, 16, 1.1),
    ]
    borders = (1 - keratin) * (1 - stroma)
    return Scene(haem * (1 - open_), eosin * (1 - open_), populations, blood, borders)


_ARCHITECTURES: dict[str, Callable[..., Scene]] = {
    "glands": _glands,
    "sheet": _sheet,
    "fibres": _fibres,
    "strata": _strata,
}
