"""Pictures that came with another machine's results: crops of a few test images, their truth, and what runs predicted.

`nucseg.results.pack` packs them and `nucseg.results.add` keeps them in ``runs/<profile>/received/``; tables and figures
made there have no other way to the images.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from nucseg.results.pack import centre, slug
from nucseg.store import home


class Example(NamedTuple):
    """The middle of one test image."""

    image_id: str
    image: np.ndarray  # (h, w, 3) uint8
    labels: np.ndarray  # (h, w), the truth
    predictions: dict[str, np.ndarray]  # run id -> label map (h, w)


def read_examples(profile: str, dataset: str, image_ids: list[str]) -> list[Example]:
    """Return the examples of a profile and a dataset that were received, in the order of `image_ids`."""
    received = home() / "runs" / profile / "received"
    found = []
    for image_id in image_ids:
        # The newest file last: where two machines ran the same, it is the one that stays.
        folders = sorted(received.glob(f"*/examples/{slug(dataset)}/{slug(image_id)}"), key=lambda f: f.stat().st_mtime)
        pictures = {path.stem: path for folder in folders for path in sorted(folder.glob("*.png"))}
        image, truth = pictures.pop("image", None), pictures.pop("truth", None)
        if image and truth and pictures:
            predictions = {run: centre(_read(path)) for run, path in pictures.items()}
            found.append(Example(image_id, _read(image), _read(truth).astype(np.int32), predictions))
    return found


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.array(opened)
