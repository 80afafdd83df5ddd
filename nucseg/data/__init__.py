"""Images and their label maps: `load_dataset` gives a `Dataset` of lazily read `Sample`s in train, val and test.

``"tissue"`` is built in and synthetic; ``"kumar"``, ``"monuseg"`` and ``"tnbc"`` are looked for under a data root; a
folder path opens any folder of images. Which image is in which split stands in one table, ``splits.csv``.
"""

from __future__ import annotations

import os
from pathlib import Path

from nucseg.annotations.errors import DataError
from nucseg.config import nearest
from nucseg.data.dataset import Dataset, MissingData, Sample
from nucseg.data.depths import check_depths
from nucseg.data.folder import load as load_folder
from nucseg.data.images import ImageError, ImageWarning, pixel_size, read_image, read_region
from nucseg.data.pixel_sizes import check_pixel_sizes
from nucseg.patches import Patch

NAMES = ("tissue", "kumar", "monuseg", "tnbc")

__all__ = [
    "NAMES",
    "DataError",
    "Dataset",
    "ImageError",
    "ImageWarning",
    "MissingData",
    "Patch",
    "Sample",
    "check_depths",
    "check_pixel_sizes",
    "data_root",
    "load_dataset",
    "load_folder",
    "pixel_size",
    "read_image",
    "read_region",
]


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds the datasets: `root`, else the environment's NUCSEG_DATA, else ``data`` here."""
    return Path(root or os.environ.get("NUCSEG_DATA") or "data").expanduser()


def load_dataset(name: str | Path, root: str | Path | None = None) -> Dataset:
    """Open a dataset; images are decoded when they are used.

    Parameters
    ----------
    name
        ``"tissue"`` (built in, synthetic), ``"kumar"``, ``"monuseg"``, ``"tnbc"``, or a folder of images. A name wins
        over a folder of that name: write ``./kumar`` for the folder.
    root
        Folder that holds the named datasets; default NUCSEG_DATA, then ``data`` in the working directory.

    Raises
    ------
    MissingData
        When the images are not at hand: what to get from where, under which licence, where to put it.
    ValueError
        For a name that is neither a dataset nor a folder, with the nearest valid name, and for a file.
    """
    from nucseg.data import folder, kumar, monuseg, tnbc

    loaders = {"kumar": kumar.load, "monuseg": monuseg.load, "tnbc": tnbc.load}
    if name in loaders:
        return loaders[name](data_root(root))
    if name == "tissue":
        from nucseg.data.builtin import load

        return load()
    if Path(name).expanduser().is_file():
        raise ValueError(f"{name} is a file: name the folder that holds it")
    if Path(name).expanduser().is_dir() or os.sep in str(name):
        return folder.load(Path(name).expanduser())
    raise ValueError(f"no folder {str(name)!r}, and no dataset of that name; {nearest(str(name), NAMES)}")
