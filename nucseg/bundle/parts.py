"""The parts of a bundle: package, notebooks, data and weights, each written into a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from PIL import Image

import nucseg
from nucseg import models
from nucseg.annotations.label_images import write_labels
from nucseg.data import NAMES, Dataset, Sample, load_dataset
from nucseg.data.sources import FileSource
from nucseg.notebooks import NOTEBOOKS
from nucseg.store import home

COMPACT = (".webp", ".jpg", ".jpeg")  # copied as they are; other images become lossless WebP, the smallest of all tried


class BundleError(RuntimeError):
    """A bundle cannot be made; the message says why and what to do."""


def write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file that everybody may read, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def pack_package(folder: Path) -> None:
    """Copy the package and its licence; paths of weights in profiles mean nothing elsewhere and are left out."""
    source = Path(nucseg.__file__).parent
    for path in sorted(source.rglob("*")):
        if path.suffix in (".py", ".csv", ".md", ".sh"):
            write(folder / "nucseg" / path.relative_to(source), path.read_bytes())
        elif path.suffix == ".yaml":
            write(folder / "nucseg" / path.relative_to(source), portable(path.read_text(encoding="utf-8")))
    licence = source.parent / "LICENSE"
    if licence.is_file():
        write(folder / "LICENSE", licence.read_bytes())


def pack_notebooks(folder: Path) -> None:
    """Copy the notebooks without their outputs, which were made elsewhere."""
    for name in NOTEBOOKS:
        path = home() / "notebooks" / f"{name}.ipynb"
        if not path.is_file():
            raise BundleError(f"no notebook {path}: make bundles in a clone, or set NUCSEG_HOME to one")
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        write(folder / path.name, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def pack_data(dataset: Dataset, name: str, folder: Path) -> str:
    """Pack a dataset losslessly, all splits, and check that it reads back pixel for pixel.

    Named sets take the layout ``<name>/images/*.webp|jpg`` with ``<name>/labels/*.png``: files that have it already are
    copied byte for byte, others are written as lossless WebP and 16-bit PNG. A user's own folder is copied as it is.

    Parameters
    ----------
    dataset, name
        The dataset, and the name or path that it was opened by.
    folder
        The new data root.

    Returns
    -------
    str
        How to open it there: its name, or its path below the folder of the bundle.

    Raises
    ------
    BundleError
        If the fingerprint changed.
    """
    if name == "tissue":  # generated
        return name
    if name in NAMES:
        for sample in dataset.samples:
            _pack_sample(sample, folder / dataset.name)
        place, packed = name, load_dataset(name, folder)
    else:
        root = Path(name).expanduser()
        for sample in dataset.samples:
            for path in (sample.source.image_path, sample.source.label_path):
                if path is not None:
                    write(folder / dataset.name / path.relative_to(root), path.read_bytes())
        place, packed = f"data/{dataset.name}", load_dataset(folder / dataset.name)
    if packed.fingerprint != dataset.fingerprint:
        raise BundleError(
            f"{dataset.name}: packed images or labels differ from the original ones (fingerprint {packed.fingerprint} "
            f"instead of {dataset.fingerprint})"
        )
    return place


def _pack_sample(sample: Sample, folder: Path) -> None:
    source = sample.source
    assert isinstance(source, FileSource)
    image, labels = source.image_path, source.label_path
    if image.suffix.lower() in COMPACT:
        write(folder / "images" / f"{sample.id}{image.suffix.lower()}", image.read_bytes())
    else:
        path = folder / "images" / f"{sample.id}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.image).save(path, lossless=True, quality=100, method=6)
    path = folder / "labels" / f"{sample.id}.png"
    if labels.suffix.lower() == ".png" and not source.components:
        write(path, labels.read_bytes())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_labels(path, sample.labels)


def pack_weights(encoder: str, folder: Path, source: str | Path | None = None, exact: bool = False) -> Path:
    """Write an encoder's weights as ``<encoder>.safetensors``, its convolutions in 16 bits.

    Weights of two or more dimensions are stored as fp16 and read back as fp32; BatchNorm's parameters and statistics
    stay fp32, because running variances below 6e-8 would vanish. The classifier, which nothing here uses, is left out.

    Rounding is not harmless where a discrete choice follows. Measured with EfficientNet-Lite2 on 300 patches of Kumar's
    training images: features move by 0.4 % (L2, median; 2 % at most, of sub-regions), and k-means amplifies that: over
    four seeds CPS picked 5, 7, 7 and 9 of 9 patches as before. So a run from a bundle is not the same run as one from
    the package's weights. Every run from bundles has exactly the same weights, and `exact` leaves them as they are.

    Parameters
    ----------
    encoder
        Its name, see `nucseg.encoders`.
    folder
        Where to write; on the other machine NUCSEG_WEIGHTS names it.
    source
        A file of weights; the installed ones if None.
    exact
        Keep fp32, at twice the size.
    """
    import timm
    from safetensors.torch import save_file

    from nucseg.encoders import EMBEDDED, Encoder, Pyramid

    known = timm.is_model(EMBEDDED[encoder][0] if encoder in EMBEDDED else encoder)
    own = next((name for name, entry in models.REGISTRY.items() if entry.own_encoder == encoder), None)
    if own and not known:  # of HoVer-Net, say, and none of timm's
        model = models.build(own, weights=source)
        if not hasattr(model, "encoder_state"):
            raise BundleError(f"weights: {own} starts from random weights; leave {encoder!r} out of the profile")
        state = model.encoder_state()
    else:
        state = Encoder(encoder, source).net.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{encoder}.safetensors"
    rounded = {k: v.half() if v.is_floating_point() and v.ndim > 1 and not exact else v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in sorted(rounded.items())}, path)
    if known:
        Encoder(encoder, path), Pyramid(encoder, path)  # both kinds find all their weights in it
    return path


def portable(text: str) -> str:
    """Leave the weights' paths out of a profile: here they lie in NUCSEG_WEIGHTS."""
    values = yaml.safe_load(text)
    if "weights" not in values:
        return text
    del values["weights"]
    return yaml.safe_dump(values, sort_keys=False)
