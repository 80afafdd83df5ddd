"""Getting the public datasets: TNBC is downloaded, checked and unzipped; Kumar and MoNuSeg are explained step by step.

The licence is shown and accepted first. A download that was cut off goes on where it stopped (``<archive>.part``
stays), a finished one is never fetched again, and no path of an archive can leave the folder that it is unzipped into.

No SHA-256 of the TNBC archive is published, and none is invented here: the archive is checked against the size and
MD5 that its Zenodo record shows, its content against the 50 images, 50 masks and 4,028 nuclei that are expected, and
its SHA-256 is written to ``<archive>.json`` beside it, so that later copies can be compared.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nucseg.annotations.errors import DataError
from nucseg.config import nearest
from nucseg.data import kumar, tnbc

LARGEST = 4 * 2**30  # bytes that an archive may unpack to: a zip bomb stops here
CHUNK = 2**14  # bytes written at once; of a cut download less than this is lost
TIMEOUT = 30  # seconds without an answer from the server


class FetchError(DataError):
    """A dataset could not be fetched; the message says why and how to go on."""


@dataclass(frozen=True)
class Archive:
    """One public file.

    Attributes
    ----------
    url
        Where it is.
    name
        File name to keep it under.
    hash
        ``"<algorithm>:<hex digest>"`` as published.
    size
        Bytes, as published.
    """

    url: str
    name: str
    hash: str
    size: int


TNBC_ARCHIVE = Archive(
    url="https://zenodo.org/records/2579118/files/TNBC_NucleiSegmentation.zip?download=1",
    name="TNBC_NucleiSegmentation.zip",
    hash="md5:1605712a752b201b57eacc8f866adb4f",
    size=25_232_361,
)

STEPS = {
    "kumar": f"""Kumar cannot be fetched for you: it is handed out through a form and a drive. By hand:
  1. Open {kumar.HOME} (or https://nucleisegmentationbenchmark.weebly.com), accept its terms.
  2. Download "MoNuSeg 2018 Training Data": 30 images (.tif) and 30 annotations (.xml).
  3. Unzip it into {{folder}}, so that there are
       {{folder}}/MoNuSeg 2018 Training Data/Tissue Images/TCGA-....tif
       {{folder}}/MoNuSeg 2018 Training Data/Annotations/TCGA-....xml
  4. Check: the total of `load_dataset("kumar").describe()` must be 30 images and 16,959 nuclei (current release).""",
    "monuseg": f"""MoNuSeg cannot be fetched for you: it is handed out through a form and a drive. By hand:
  1. Open {kumar.HOME}, accept its terms.
  2. Download "MoNuSeg 2018 Training Data" (30 images with XML) and "MoNuSegTestData" (14 images with XML).
  3. Unzip both into {{folder}}; sub-folders are searched, names must keep their TCGA codes.
  4. Check: `load_dataset("monuseg").describe()` must print 30 training images with 16,959 nuclei, 14 test images.
The training images include all 14 Kumar test images: never evaluate on Kumar what was trained on MoNuSeg.""",
}
LICENCES = {"kumar": kumar.LICENCE, "monuseg": kumar.LICENCE, "tnbc": tnbc.LICENCE}


def fetch_dataset(
    name: str,
    root: str | Path,
    accept_licence: bool | Callable[[str], bool] = False,
    progress: bool = True,
    archive: Archive = TNBC_ARCHIVE,
) -> str:
    """Fetch a dataset into ``<root>/<name>``, or say how to get it by hand.

    Parameters
    ----------
    name
        ``"tnbc"``, ``"kumar"`` or ``"monuseg"``.
    root
        Data root; made if needed.
    accept_licence
        True when the licence is accepted, or a function that is shown the licence and gives the answer.
    progress
        Show a progress bar.
    archive
        The file to fetch for TNBC; another one for a mirror or a test.

    Returns
    -------
    str
        What is there now, or the steps to take by hand.

    Raises
    ------
    FetchError
        When the licence is not accepted, the server does not answer, or what came is not what was expected.
    ValueError
        For an unknown name, with the nearest valid one.
    """
    if name not in LICENCES:
        raise ValueError(f"cannot fetch {name!r}; {nearest(name, LICENCES)}")
    folder = Path(root).expanduser() / name
    text = f"{name}: {LICENCES[name]}"
    if name in STEPS:
        return f"Licence of {text}\n" + STEPS[name].format(folder=folder)
    if not (accept_licence(f"Licence of {text}") if callable(accept_licence) else accept_licence):
        raise FetchError(
            f"nothing was fetched: the licence was not accepted ({text}); pass accept_licence=True or --yes"
        )
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / Path(archive.name).stem
    receipt = folder / f"{archive.name}.json"  # written last: with it, there is nothing left to do
    if not receipt.is_file() or not unpacked.is_dir():
        path = _download(archive, folder, progress)
        extract(path, unpacked)
        with open(path, "rb") as file:
            about = {"url": archive.url, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        receipt.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    version = tnbc.load(unpacked).version  # says which images are missing, and counts the nuclei
    return f"{folder}: {version}\nLicence of {text}"


def extract(archive: str | Path, folder: str | Path) -> list[Path]:
    """Unzip safely: every file lands inside `folder`, or nothing does.

    Parameters
    ----------
    archive
        A zip file.
    folder
        Where to; appears only when everything is unpacked.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    FetchError
        For absolute paths, ``..``, links, archives that unpack to more than 4 GB, and damaged ones.
    """
    archive, folder = Path(archive), Path(folder)
    beside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)
    written = []
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [member for member in zipped.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > LARGEST:
                raise FetchError(
                    f"{archive}: unpacks to more than {LARGEST / 2**30:.0f} GB; it is not the expected archive"
                )
            for member in members:
                target = beside / _inside(member, archive)
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out, CHUNK)
                written.append(folder / target.relative_to(beside))
        if folder.exists():  # left by an older run that was stopped
            shutil.rmtree(folder)
        beside.mkdir(parents=True, exist_ok=True)
        beside.rename(folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(f"{archive}: damaged or no zip file ({error}); delete it and fetch again") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return written


def _inside(member: zipfile.ZipInfo, archive: Path) -> Path:
    """Path of a member below the folder, refused when it leaves it."""
    name = member.filename.replace("\\", "/")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
        raise FetchError(f"{archive}: refused, the member {member.filename!r} would be written outside the folder")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise FetchError(f"{archive}: refused, the member {member.filename!r} is a link")
    return Path(*path.parts)


def _download(archive: Archive, folder: Path, progress: bool) -> Path:
    import pooch
    import requests

    part = folder / f"{archive.name}.part"

    def resume(url: str, output_file: str, _pooch: object) -> None:
        _fetch_rest(url, part, archive.size, progress)
        shutil.move(part, output_file)  # from here pooch checks the hash and moves the file into place

    try:
        path = pooch.retrieve(archive.url, archive.hash, fname=archive.name, path=folder, downloader=resume)
    except requests.RequestException as error:
        raise FetchError(
            f"{archive.url}: {error}\nWhat came so far is kept in {part}: run the same command again to go on, or "
            f"download the file by hand and put it at {folder / archive.name}"
        ) from error
    except ValueError as error:  # pooch: the hash does not match
        raise FetchError(
            f"{archive.url}: what came is not the published file ({error}); it was deleted, fetch again, "
            "or compare with the checksum that the record's page shows"
        ) from error
    return Path(path)


def _fetch_rest(url: str, part: Path, size: int, progress: bool) -> None:
    """Append to a partial file what is missing; start anew when the server cannot resume."""
    import requests
    from tqdm.auto import tqdm

    have = part.stat().st_size if part.is_file() else 0
    if have > size:
        part.unlink()
        have = 0
    if have == size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        response.raise_for_status()
        if have and response.status_code != requests.codes.partial_content:
            have = 0
        with (
            open(part, "ab" if have else "wb") as out,
            tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=not progress) as bar,
        ):
            for chunk in response.iter_content(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    came = part.stat().st_size
    if came < size:
        raise requests.ConnectionError(f"the connection ended after {came:,} of {size:,} bytes")
