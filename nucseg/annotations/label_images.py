"""Label images: PNG and TIFF of 8, 16 or 32 bits, NumPy arrays, Cellpose's ``_seg.npy``, and binary masks.

Nothing is ever unpickled: `.npy` files of plain integers are read by numpy, Cellpose's pickled dictionaries by
`nucseg.annotations.cellpose`, which looks for the mask array without running anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nucseg.annotations.errors import AnnotationError, LabelWarning
from nucseg.files import whole
from nucseg.labels import check_label_map

MARK = "nucseg label map: one number per nucleus"  # in the files that we write
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".npy")
IN_MEMORY, TILE = 4096**2, 1024  # pixels of a label map that is written at once; side of the tiles of larger ones
BINARY_VALUES = (1, 255, 65535)  # what programs write for "inside" in a binary mask


def read_labels(path: str | Path, binary: bool | None = None) -> np.ndarray:
    """Read a label image.

    Parameters
    ----------
    path
        PNG or TIFF (8, 16 or 32 bits, any compression), ``.npy``, or a Cellpose ``_seg.npy``.
    binary
        True: any value above 0 is inside, and the 8-connected components are the nuclei (as the 4,028 nuclei of TNBC
        are counted). False: values are ids. None: a mask of one value 1, 255 or 65535 in several pieces is taken as
        binary, with a warning.

    Returns
    -------
    numpy.ndarray
        (H, W) int32, 0 = background.

    Raises
    ------
    AnnotationError
        When the file is no label map; the message says why and how to export one.

    Warns
    -----
    LabelWarning
        When a binary mask was split into components although `binary` is None: touching nuclei merge.
    """
    path = Path(path)
    if not path.is_file():
        raise AnnotationError(f"{path}: no such file")
    labels = _two_dimensional(_read_array(path), path)
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    if labels.dtype.kind == "f":
        raise AnnotationError(
            f"{path}: floating-point values; ids are whole numbers: save it with .astype('int32') "
            "(a probability map is not a label map)"
        )
    if labels.dtype.kind not in "iu":
        raise AnnotationError(f"{path}: expected whole numbers, got {labels.dtype}")
    if labels.size and (int(labels.max()) > np.iinfo(np.int32).max or int(labels.min()) < 0):
        raise AnnotationError(f"{path}: ids must lie in 0..2147483647, found {labels.min()}..{labels.max()}")
    labels = labels.astype(np.int32)
    check_label_map(labels, str(path))
    if binary is False:
        return labels
    return _components(labels) if binary else _split_if_binary(labels, path)


def write_labels(path: str | Path, labels: np.ndarray) -> None:
    """Write a label map that `read_labels` and every image program read back exactly.

    Parameters
    ----------
    path
        ``.tif`` (16 or 32 bits as the ids need, deflate), ``.png`` (16 bits) or ``.npy``; written beside and moved
        into place.
    labels
        (H, W) label map. Of a large one, which may lie on the disk (`numpy.memmap`), a TIFF takes a tile at a time.

    Raises
    ------
    ValueError
        For another suffix, or ids above 65535 in a PNG.
    """
    path, labels = Path(path), check_label_map(labels)
    top = int(labels.max(initial=0))
    suffix = path.suffix.lower()
    if suffix not in LABEL_SUFFIXES:
        raise ValueError(f"{path}: label maps are written as {', '.join(LABEL_SUFFIXES)}")
    if suffix == ".png" and top > np.iinfo(np.uint16).max:
        raise ValueError(f"{path}: ids up to {top} do not fit a 16-bit PNG; write a .tif")
    kind = np.uint16 if top <= np.iinfo(np.uint16).max else np.uint32
    with whole(path) as part, open(part, "wb") as file:
        if suffix == ".npy":
            np.save(file, labels.astype(np.int32))
        elif suffix == ".png":
            from PIL import Image

            Image.fromarray(labels.astype(kind)).save(file, format="png", pnginfo=_png_mark())
        else:
            import tifffile

            how = {"compression": "zlib", "photometric": "minisblack", "description": MARK, "metadata": None}
            if labels.size <= IN_MEMORY:
                tifffile.imwrite(file, labels.astype(kind), **how)
            else:
                where = {"shape": labels.shape, "dtype": kind, "tile": (TILE, TILE), "bigtiff": True}
                tifffile.imwrite(file, _tiles(labels, kind), **where, **how)


def another_size(image: tuple[int, int], labels: tuple[int, int]) -> str:
    """Say how a label map probably came to another size than its image, and what to do: the end of a message.

    Parameters
    ----------
    image, labels
        Height and width of both in pixels; they differ.

    Examples
    --------
    >>> another_size((1000, 800), (800, 1000))
    'its sides are swapped: it was saved turned or transposed; save it as the image lies'
    >>> another_size((1000, 801), (500, 400))
    'it is at 1/2 of the resolution of the image; export it at full resolution'
    """
    if image == labels[::-1]:
        return "its sides are swapped: it was saved turned or transposed; save it as the image lies"
    if times := _times(image, labels):
        return f"it is at 1/{times} of the resolution of the image; export it at full resolution"
    if times := _times(labels, image):
        return (
            f"it is at {times} times the resolution of the image; put the image there that it was drawn on, or export "
            "it at the resolution of this one"
        )
    return "they must be of one size"


def _times(large: tuple[int, int], small: tuple[int, int]) -> int | None:
    """How many times one size is the other, up to the pixel that programs round away; None if it is no multiple."""
    times = round(large[0] / small[0]) if all(small) else 0
    if times > 1 and all(s in (side // times, -(-side // times)) for side, s in zip(large, small, strict=True)):
        return times
    return None


def _tiles(labels: np.ndarray, kind: type) -> Iterator[np.ndarray]:
    """Cut a label map into squares of `TILE` pixels, row by row, the last ones filled up with background."""
    for row in range(0, labels.shape[0], TILE):
        for col in range(0, labels.shape[1], TILE):
            part = labels[row : row + TILE, col : col + TILE].astype(kind)
            yield np.pad(part, [(0, TILE - side) for side in part.shape])


def _split_if_binary(labels: np.ndarray, path: Path) -> np.ndarray:
    top = int(labels.max(initial=0))
    if top not in BINARY_VALUES or ((labels != 0) & (labels != top)).any():
        return labels
    parts = _components(labels)
    count = int(parts.max())
    if count < 2 or _is_marked(path):
        return labels
    warnings.warn(
        f"{path}: a binary mask (only 0 and {top}); its {count} connected parts were taken as nuclei, so nuclei that "
        "touch are merged into one: export instance labels if you can",
        LabelWarning,
        stacklevel=3,
    )
    return parts


def _png_mark():
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text("Description", MARK)
    return mark


def _is_marked(path: Path) -> bool:
    """Say whether `write_labels` wrote a file: one nucleus in two pieces looks like a binary mask of two."""
    if path.suffix.lower() == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return image.info.get("Description") == MARK
    if path.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(path) as file:
            return file.pages[0].description == MARK
    return False


def _components(mask: np.ndarray) -> np.ndarray:
    from scipy.ndimage import label

    return label(mask > 0, structure=np.ones((3, 3)))[0].astype(np.int32)


def _read_array(path: Path) -> np.ndarray:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _read_npy(path)
    if suffix in (".tif", ".tiff"):
        import tifffile

        try:
            return tifffile.imread(path)
        except Exception as error:  # tifffile and imagecodecs raise many kinds; all mean the same to a user
            raise AnnotationError(f"{path}: not a readable TIFF ({error}); copy or export it again") from error
    if suffix in (".jpg", ".jpeg", ".webp"):
        raise AnnotationError(f"{path}: label maps must be lossless with exact ids; export 16-bit PNG or TIFF")
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.array(image)  # palette images give their indices, which are the ids
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AnnotationError(f"{path}: not a readable label image ({error}); copy or export it again") from error


def _read_npy(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise AnnotationError(f"{path}: not a .npy file; write it with numpy.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if "allow_pickle" not in str(error) and "Object arrays" not in str(error):
            raise AnnotationError(f"{path}: not a complete .npy file ({error}); save it again") from error
    from nucseg.annotations.cellpose import read_masks

    return read_masks(path)


def _two_dimensional(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim == 3 and array.shape[2] in (3, 4) and (array[..., :3] == array[..., :1]).all():
        array = array[..., 0]  # grey saved as RGB(A)
    if array.ndim != 2:
        raise AnnotationError(
            f"{path}: expected one id per pixel, got an array of shape {array.shape}; "
            "a coloured picture of labels or a stack cannot be read, export the ids themselves as 16-bit PNG or TIFF"
        )
    return array
