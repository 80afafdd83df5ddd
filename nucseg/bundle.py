"""One folder that runs the paper on a machine without a network: code, notebooks, data, weights, wheels and a start.

The folder is laid out like a checkout, so ``runs/``, ``tables/`` and ``figures/`` grow inside it:

    start.sh      bash start.sh --minutes 8 | notebooks | any other nucseg command
    nucseg/       the package          notebooks/  the five notebooks, without outputs
    data/         the images and label maps, pixel for pixel, in the layout that `nucseg.data` calls packed
    weights/      encoders             wheels/     packages that such a machine lacks; unpacked into site/ at the start
    so-far.zip    results so far, added to tables/ at the start so that nothing is run twice

The same inputs give the same bytes, and nothing inside names the machine that made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

import nucseg
from nucseg import wheels as wheel_files
from nucseg.annotations.label_images import write_labels
from nucseg.data import NAMES, Dataset, Sample, load_dataset
from nucseg.data.sources import FileSource
from nucseg.notebooks import NOTEBOOKS
from nucseg.profiles import FOLDER, load_profile
from nucseg.results import ResultsError
from nucseg.results_pack import pack
from nucseg.store import code_version, home

PARTS = ("package", "notebooks", "data", "weights", "wheels", "results", "start")
OWN = (
    "nucseg",
    "notebooks",
    "data",
    "weights",
    "wheels",
    "profiles",
    "site",
)  # replaced by a new bundle; the rest stays
MANIFEST, SO_FAR = "bundle.json", "so-far.zip"
MB = 1_000_000
COMPACT = (".webp", ".jpg", ".jpeg")  # copied as they are; other images become lossless WebP, the smallest of all tried


class BundleError(RuntimeError):
    """A bundle cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Bundle:
    """What was made.

    Attributes
    ----------
    folder
        Where it lies.
    sizes
        Bytes of each of `PARTS`.
    fingerprint
        Of the dataset, the same inside and outside.
    """

    folder: Path
    sizes: dict[str, int]
    fingerprint: str

    def describe(self) -> str:
        """Return one line per part with its size in MB (10^6 bytes), and their sum."""
        return _describe(self.sizes)


def make_bundle(
    folder: str | Path,
    profile: str | Path = "h100",
    dataset: str = "",
    data_root: str | Path = "",
    wheels: Sequence[str] = wheel_files.DEFAULT,
    python: str = "3.12",
    limit_mb: float = 60.0,
    fresh: bool = False,
    exact: bool = False,
) -> Bundle:
    """Write a bundle; an older one in its place is replaced, and keeps what it has run.

    Parameters
    ----------
    folder
        New, empty, or an older bundle.
    profile, dataset, data_root
        As for `nucseg.pipeline.Pipeline`. Every profile of the package travels; this one is what ``start.sh`` runs, and
        its encoders are those whose weights travel.
    wheels
        Packages or wheel files, see `nucseg.wheels.fetch`.
    python
        Python of the other machine, for wheels with compiled code.
    limit_mb
        Largest size, in 10^6 bytes.
    fresh
        Leave the results so far at home; all is run again then.
    exact
        Weights in full precision, see `pack_weights`.

    Raises
    ------
    BundleError
        If it is too large (with the size of each part), the folder holds other things, or the data changed in packing.
    nucseg.wheels.WheelError, nucseg.data.DataError, nucseg.encoders.EncoderError
        If a part cannot be had.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} holds other things than a bundle; name a new or an empty folder")
    settings = load_profile(profile)
    opened = load_dataset(dataset or settings.dataset, data_root or None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        pack_package(part)
        pack_notebooks(part / "notebooks")
        place = pack_data(opened, dataset or settings.dataset, part / "data")
        for encoder in sorted({settings.encoder, settings.segmenter_encoder}):
            pack_weights(encoder, part / "weights", settings.weights.get(encoder), exact)
        wheel_files.fetch(wheels, part / "wheels", python)
        if not fresh:
            with contextlib.suppress(ResultsError):  # nothing has run yet
                pack(part / SO_FAR, dataset=opened.name, limit_mb=limit_mb, numbers_only=True)
        named = str(profile)
        if named not in {path.stem for path in FOLDER.glob("*.yaml")}:
            named = f"profiles/{Path(profile).name}"
            _write(part / named, _portable(Path(profile).read_text()))
        _write(part / "start.sh", _start(named, place, python), 0o755)
        _write(part / "LICENCES.txt", _licences(opened))
        _write(part / ".gitignore", "*\n")  # the images may not be published
        sizes = dict.fromkeys(PARTS, 0)
        for path in sorted(p for p in part.rglob("*") if p.is_file()):
            sizes[_part_of(path.relative_to(part))] += path.stat().st_size
        about = {
            "profile": settings.name,
            "dataset": opened.name,
            "fingerprint": opened.fingerprint,
            "nucseg": nucseg.__version__,
            "code": code_version("nucseg"),
            "python": python,
            "sizes": sizes,
        }
        _write(part / MANIFEST, json.dumps(about, indent=1))
        _write(part / "SHA256SUMS", _sums(part))
        sizes["start"] += sum((part / name).stat().st_size for name in (MANIFEST, "SHA256SUMS"))
        if sum(sizes.values()) > limit_mb * MB:
            raise BundleError(
                f"the bundle is larger than {limit_mb:g} MB:\n{_describe(sizes)}\nTake less: weights in 16 bits "
                "(no --exact), no packages for notebooks (--wheel none); or allow more: --limit-mb"
            )
        _sane(part)
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Bundle(folder, sizes, opened.fingerprint)


# -- the parts -------------------------------------------------------------------------------------------------


def pack_package(folder: Path) -> None:
    """Copy the package and its licence; paths of weights in profiles mean nothing elsewhere and are left out."""
    source = Path(nucseg.__file__).parent
    for path in sorted(source.rglob("*")):
        if path.suffix in (".py", ".csv", ".md"):
            _write(folder / "nucseg" / path.relative_to(source), path.read_bytes())
        elif path.suffix == ".yaml":
            _write(folder / "nucseg" / path.relative_to(source), _portable(path.read_text()))
    licence = source.parent / "LICENSE"
    if licence.is_file():
        _write(folder / "LICENSE", licence.read_bytes())


def pack_notebooks(folder: Path) -> None:
    """Copy the notebooks without their outputs, which were made elsewhere."""
    for name in NOTEBOOKS:
        path = home() / "notebooks" / f"{name}.ipynb"
        if not path.is_file():
            raise BundleError(f"no notebook {path}: make bundles in a clone, or set NUCSEG_HOME to one")
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        _write(folder / path.name, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


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
                    _write(folder / dataset.name / path.relative_to(root), path.read_bytes())
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
        _write(folder / "images" / f"{sample.id}{image.suffix.lower()}", image.read_bytes())
    else:
        path = folder / "images" / f"{sample.id}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.image).save(path, lossless=True, quality=100, method=6)
    path = folder / "labels" / f"{sample.id}.png"
    if labels.suffix.lower() == ".png" and not source.components:
        _write(path, labels.read_bytes())
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
    from safetensors.torch import save_file

    from nucseg.encoders import Encoder, Pyramid

    state = Encoder(encoder, source).net.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{encoder}.safetensors"
    rounded = {k: v.half() if v.is_floating_point() and v.ndim > 1 and not exact else v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in sorted(rounded.items())}, path)
    Encoder(encoder, path), Pyramid(encoder, path)  # both kinds find all their weights in it
    return path


# -- the start -------------------------------------------------------------------------------------------------

START = r"""#!/usr/bin/env bash
# Runs nucseg from this folder: no installation, no network, and nothing is written outside this folder.
#   bash start.sh --minutes 8      experiments that have no result yet, then results.zip; the next start goes on
#   bash start.sh notebooks        the five notebooks by papermill, then results.zip
#   bash start.sh status           any other nucseg command, with this folder's code, data and weights
# PYTHON names the interpreter that has torch; python3 if it is not set.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
profile=@profile@
dataset=@dataset@
wheels_python=@python@
[[ $profile == */* ]] && profile=$here/$profile
[[ $dataset == */* ]] && dataset=$here/$dataset

# Found before HOME changes: the interpreter behind a shim, and packages installed for this user.
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
PYTHONUSERBASE=${PYTHONUSERBASE:-$("$python" -c 'import site; print(site.getuserbase())')}
export PYTHONUSERBASE PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$here:$here/site${PYTHONPATH:+:$PYTHONPATH}
export NUCSEG_HOME=$here NUCSEG_DATA=$here/data NUCSEG_WEIGHTS=$here/weights JUPYTER_PATH=$here/site/share/jupyter

# Caches of matplotlib, IPython, triton and CUDA follow HOME and TMPDIR.
unset MPLCONFIGDIR IPYTHONDIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR TORCH_HOME CUDA_CACHE_PATH
unset XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME XDG_STATE_HOME XDG_RUNTIME_DIR
unset TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR NUMBA_CACHE_DIR JOBLIB_TEMP_FOLDER
export HOME=$here/.cache/home TMPDIR=$here/.tmp
mkdir -p "$HOME" "$TMPDIR"

"$python" -m nucseg.wheels "$here/wheels" "$here/site"

if [[ -f $here/so-far.zip ]]; then
  if "$python" -m nucseg results add "$here/so-far.zip"; then
    rm "$here/so-far.zip"
  else
    echo "Goes on with the results that are in this folder alone." >&2
  fi
fi

status=0
case "${1:-}" in
  notebooks)
    shift
    has=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [[ $has != "$wheels_python" ]]; then
      echo "The wheels here are for Python $wheels_python, this is $has: make the bundle again with --python $has" >&2
      exit 1
    fi
    if ((${#here} > 70)); then
      echo "Kernels need a short path: move this folder to one of at most 70 characters, or name it by a link" >&2
      exit 1
    fi
    "$python" -m nucseg reproduce --profile "$profile" --dataset "$dataset" "$@" || status=$?
    ;;
  "" | -*)
    "$python" -m nucseg run --profile "$profile" --dataset "$dataset" "$@" || status=$?
    ;;
  *)
    exec "$python" -m nucseg "$@"
    ;;
esac
"$python" -m nucseg results pack --out "$here/results.zip" || exit
exit $status
"""


def _start(profile: str, dataset: str, python: str) -> str:
    values = {"profile": profile, "dataset": dataset, "python": python}
    text = START
    for name, value in values.items():
        text = text.replace(f"@{name}@", shlex.quote(value))
    return text


# -- helpers ---------------------------------------------------------------------------------------------------


def _licences(dataset: Dataset) -> str:
    return (
        f"nucseg: MIT, see LICENSE\ndata, {dataset.name}: {dataset.licence}\n"
        "weights: those of the encoders' own releases\nwheels: each holds its own licence\n"
    )


def _portable(text: str) -> str:
    """Leave the weights' paths out of a profile: here they lie in NUCSEG_WEIGHTS."""
    values = yaml.safe_load(text)
    if "weights" not in values:
        return text
    del values["weights"]
    return yaml.safe_dump(values, sort_keys=False)


def _part_of(path: Path) -> str:
    names = {"nucseg": "package", "LICENSE": "package", "profiles": "package", SO_FAR: "results"}
    first = path.parts[0]
    return names.get(first, first if first in PARTS else "start")


def _describe(sizes: dict[str, int]) -> str:
    lines = [f"{name:10} {size / MB:7.2f} MB" for name, size in sizes.items()]
    return "\n".join([*lines, f"{'all':10} {sum(sizes.values()) / MB:7.2f} MB"])


def _sums(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files)


def _write(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def _sane(folder: Path) -> None:
    """Let everybody read and only the owner write, whatever the umask and the permissions of the originals."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.name == "start.sh" else 0o644)


def _move(part: Path, folder: Path) -> None:
    """Put the parts in place of an older bundle's; what has been run there stays."""
    folder.mkdir(exist_ok=True)
    for name in OWN:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / SO_FAR).unlink(missing_ok=True)
    for path in sorted(part.iterdir()):
        os.replace(path, folder / path.name)
