"""Reading images: 8-bit RGB in the end, whole or by region, and a plain reason whenever a file cannot be one.

8-bit RGB is the norm. What is transparent is laid on white; grey, palette and 16-bit images and TIFFs with one page per
colour are converted with a warning; CMYK, float, fluorescence, truncated, empty and non-image files are `ImageError`s
that name the file and the reason. An orientation tag is never applied: label maps are drawn on the pixels as stored.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from nucseg.annotations.errors import DataError
from nucseg.data.tiff_headers import MICROMETRES, colour_pages, plausible, stated_bits, stated_pixel_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".svs", ".ndpi", ".scn", ".mrxs")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".scn", ".mrxs")  # only tiffslide or openslide opens all of these
TIFF_SUFFIXES = (".tif", ".tiff", ".svs", ".ndpi", ".scn")
ORIENTATION_TAG = 274
TIFF_CMYK, TIFF_WHITE_IS_ZERO, TIFF_PALETTE = 5, 0, 3
TIFF_ALPHA = (1, 2)  # kinds of an extra sample: alpha that the colours are multiplied with, or not
GREY = "is grey and was copied to three channels; nuclei models expect H&E colours"


class ImageError(DataError):
    """An image file cannot be read as 8-bit RGB; the message names the file and the reason."""


class ImageWarning(UserWarning):
    """An image was converted to 8-bit RGB, which may lose something; the message names the file."""


def read_image(path: str | Path) -> np.ndarray:
    """Read one image whole.

    Parameters
    ----------
    path
        PNG, JPEG, WebP, BMP, TIFF (any compression that tifffile and imagecodecs know) or a slide.

    Returns
    -------
    numpy.ndarray
        (H, W, 3) uint8, RGB, as stored (no colour normalisation, no orientation tag applied).

    Raises
    ------
    ImageError
        When the file is no image, is truncated, has no pixels, is CMYK or floating point, or has channels that are
        not red, green and blue.

    Warns
    -----
    ImageWarning
        When grey, palette or 16-bit values were converted, or pages were left out or put together.
    """
    path = Path(path)
    _check_file(path)
    return _read_tiff(path) if path.suffix.lower() in TIFF_SUFFIXES else _read_pillow(path)


def image_shape(path: str | Path) -> tuple[int, int]:
    """Height and width of an image in pixels, from its header alone; remembered until the file changes."""
    path = Path(path)
    _check_file(path)
    return _image_shape(path, file_stamp(path))


def pixel_size(path: str | Path) -> float | None:
    """Side of a pixel in micrometres as the file's header states it; remembered until the file changes.

    OME and ImageJ descriptions, Aperio's MPP and resolution tags are understood. None where nothing is stated, or only
    what no microscope has, as 72 dpi of a screen.
    """
    path = Path(path)
    _check_file(path)
    return _pixel_size(path, file_stamp(path))


def file_stamp(path: Path) -> tuple[int, int]:
    """Time of change and size of a file: what is remembered about it holds as long as these do."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def reads_regions(path: str | Path) -> bool:
    """Whether parts of this kind of file can be read without decoding it whole."""
    return Path(path).suffix.lower() in TIFF_SUFFIXES + SLIDE_SUFFIXES


def used_bits(path: str | Path) -> int | None:
    """How many bits of a TIFF's deep pixels are used: as its header states, else the fewest that hold the brightest.

    None for pixels of 8 bits and for other kinds of files. Where nothing is stated, all pixels are decoded.
    """
    path = Path(path)
    _check_file(path)
    return _used_bits(path, file_stamp(path)) if path.suffix.lower() in TIFF_SUFFIXES else None


@functools.lru_cache(maxsize=4096)
def _used_bits(path: Path, stamp: tuple[int, int]) -> int | None:
    with _open_tiff(path) as tiff:
        pages = [tiff.pages[number] for number in _colour_pages(path, stamp)[0]]
        if pages[0].dtype is None or pages[0].dtype.kind not in "iu" or pages[0].dtype.itemsize == 1:
            return None
        if stated := stated_bits(tiff):
            return stated
        try:
            top = max(int(_samples(_pixels(page), page).max(initial=0)) for page in pages)
        except Exception as error:
            raise ImageError(f"{path}: damaged or truncated ({error}); copy or export it again") from error
        return _fewest_bits(top) or top.bit_length()


@functools.lru_cache(maxsize=4096)
def _colour_pages(path: Path, stamp: tuple[int, int]) -> tuple[tuple[int, ...], str]:
    with _open_tiff(path) as tiff:
        try:
            return colour_pages(tiff)
        except ValueError as error:
            raise ImageError(f"{path}: {error}") from None
        except Exception as error:  # of a page after the first one
            raise ImageError(f"{path}: damaged or truncated ({error}); copy or export it again") from error


@functools.lru_cache(maxsize=4096)
def _pixel_size(path: Path, stamp: tuple[int, int]) -> float | None:
    if path.suffix.lower() in TIFF_SUFFIXES:
        with _open_tiff(path) as tiff:
            return stated_pixel_size(tiff)
    if path.suffix.lower() in SLIDE_SUFFIXES:
        with _open_slide(path) as slide:
            return plausible(float(slide.properties.get(f"{_slide_reader()}.mpp-x") or 0))
    with _open_pillow(path) as image:
        dots = float(image.info.get("dpi", (0, 0))[0])
        return plausible(MICROMETRES["inch"] / dots) if dots > 0 else None


@functools.lru_cache(maxsize=4096)
def _image_shape(path: Path, stamp: tuple[int, int]) -> tuple[int, int]:
    if path.suffix.lower() in TIFF_SUFFIXES:
        with _open_tiff(path) as tiff:
            page = tiff.pages[_colour_pages(path, stamp)[0][0]]
            return int(page.imagelength), int(page.imagewidth)
    if path.suffix.lower() in SLIDE_SUFFIXES:
        with _open_slide(path) as slide:
            width, height = slide.dimensions
            return int(height), int(width)
    with _open_pillow(path) as image:
        return image.height, image.width


def read_region(path: str | Path, row: int, col: int, height: int, width: int) -> np.ndarray:
    """Read one rectangle of an image without decoding the rest where the format allows it.

    Of a TIFF only the tiles or strips that the rectangle meets are decoded. Slides (``.svs`` and their like) are
    opened by tiffslide or openslide (``pip install nucseg[slides]``), those that are TIFFs without either as well.
    Other formats have no regions: they are decoded whole and cut.

    Parameters
    ----------
    path
        The image file.
    row, col, height, width
        Upper left pixel and size of the rectangle, in pixels at full resolution; it must lie inside the image.

    Returns
    -------
    numpy.ndarray
        (height, width, 3) uint8.

    Raises
    ------
    ImageError
        As `read_image`, and when the rectangle is empty or leaves the image.
    """
    path = Path(path)
    check_region(path, image_shape(path), row, col, height, width)
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES and (_slide_reader() or suffix not in TIFF_SUFFIXES):
        with _open_slide(path) as slide:
            return _on_white(np.asarray(slide.read_region((col, row), 0, (width, height))))
    if suffix in TIFF_SUFFIXES:
        with _open_tiff(path) as tiff:
            pages = _pages(tiff, path)
            # a region of deep pixels must be reduced like the whole image, not by its own brightest pixel
            parts = [_tiff_region(page, row, col, height, width) for page in pages]
            bits = _used_bits(path, file_stamp(path)) if pages[0].dtype.itemsize > 1 else None
            return _to_rgb(_stacked(parts), path, pages[0], bits)
    return read_image(path)[row : row + height, col : col + width].copy()


def check_region(what: object, shape: tuple[int, int], row: int, col: int, height: int, width: int) -> None:
    """Raise `ImageError` unless the rectangle is not empty and lies inside `shape`."""
    if height < 1 or width < 1 or row < 0 or col < 0 or row + height > shape[0] or col + width > shape[1]:
        raise ImageError(
            f"{what}: the region of {height} x {width} pixels at row {row}, column {col} does not lie inside the image "
            f"of {shape[0]} x {shape[1]} pixels"
        )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes); copy or export it again")


def _open_pillow(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # 10,000 x 10,000 is an ordinary image here
            return Image.open(path)
    except UnidentifiedImageError:
        raise ImageError(
            f"{path}: not an image, or of a kind that cannot be read here; "
            f"known are {', '.join(IMAGE_SUFFIXES)} with the content that their name says"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{path}: too large to be decoded whole; save it as a tiled TIFF, which is read by region"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: damaged or truncated ({error}); copy or export it again") from error


def _read_pillow(path: Path) -> np.ndarray:
    with _open_pillow(path) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"{path}: damaged or truncated ({error}); copy or export it again") from error
        mode = image.mode
        if image.getexif().get(ORIENTATION_TAG, 1) != 1:
            _warn(path, "has an orientation tag, which is ignored: pixels are read as they are stored")
        if mode == "CMYK":
            raise ImageError(f"{path}: CMYK colours; convert it to 8-bit RGB with the profile it was printed for")
        if mode in ("P", "PA", "YCbCr", "LAB", "HSV"):
            _warn(path, f"was converted from {'palette' if mode in ('P', 'PA') else mode} colours to RGB")
        if mode in ("1", "L", "LA", "RGB", "RGBA", "P", "PA") and image.has_transparency_data:
            if mode in ("1", "L", "LA"):
                _warn(path, GREY)
            return _on_white(np.array(image.convert("RGBA")))
        if mode in ("RGB", "P", "YCbCr", "LAB", "HSV"):
            return np.array(image.convert("RGB"))
        if mode == "1":
            return _to_rgb(np.array(image).astype(np.uint8) * 255, path)
        return _to_rgb(np.array(image), path)


def _open_tiff(path: Path):
    import tifffile

    try:
        tiff = tifffile.TiffFile(path)
    except Exception as error:
        raise ImageError(f"{path}: not a TIFF, or a damaged one ({error}); copy or export it again") from error
    try:
        page = tiff.pages[0]
        if page.imagelength * page.imagewidth == 0:
            raise ValueError("it has no pixels")
    except Exception as error:
        tiff.close()
        raise ImageError(f"{path}: damaged or truncated ({error}); copy or export it again") from error
    return tiff


def _read_tiff(path: Path) -> np.ndarray:
    with _open_tiff(path) as tiff:
        pages = _pages(tiff, path)
        try:
            data = _stacked([_pixels(page) for page in pages])
        except Exception as error:  # tifffile and imagecodecs raise many kinds; all of them mean the same to a user
            raise ImageError(f"{path}: damaged or truncated ({error}); copy or export it again") from error
        return _to_rgb(data, path, pages[0], stated_bits(tiff) if data.dtype.itemsize > 1 else None)


def _pages(tiff, path: Path) -> list:
    """Return the page of a TIFF that is its image, or those of its red, green and blue, with a warning."""
    numbers, remark = _colour_pages(path, file_stamp(path))
    if remark:
        warnings.warn(f"{path}: {remark}", ImageWarning, stacklevel=4)
    return [tiff.pages[number] for number in numbers]


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.stack(parts, axis=-1)


def _planes(page) -> bool:
    """Whether a TIFF page stores its colours as planes one after the other."""
    return page.planarconfig != 1 and page.samplesperpixel > 1


def _pixels(page) -> np.ndarray:
    """Decode a whole TIFF page, colours last."""
    return np.moveaxis(page.asarray(), 0, -1) if _planes(page) else page.asarray()


def _tiff_region(page, row: int, col: int, height: int, width: int) -> np.ndarray:
    """Decode the tiles or strips of a TIFF page that a rectangle meets, and cut."""
    path = page.parent.filehandle.path
    if _planes(page):  # rare: decode whole
        return _pixels(page)[row : row + height, col : col + width]
    if page.is_memmappable:  # not compressed: the system reads only what is touched
        stored = page.dtype.newbyteorder(page.parent.byteorder)
        whole = page.parent.filehandle.memmap_array(stored, page.shape, page.dataoffsets[0])
        return np.array(whole[row : row + height, col : col + width], page.dtype)
    tile_height, tile_width = (
        (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    )
    tile_height = min(tile_height, page.imagelength)
    across = -(-page.imagewidth // tile_width)
    samples = page.samplesperpixel
    out = np.zeros((height, width, samples), page.dtype)
    for tile_row in range(row // tile_height, -(-(row + height) // tile_height)):
        for tile_col in range(col // tile_width, -(-(col + width) // tile_width)):
            index = tile_row * across + tile_col
            handle = page.parent.filehandle
            handle.seek(page.dataoffsets[index])
            data = handle.read(page.databytecounts[index])
            tables = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
            try:
                segment, (_, _, top, left, _), shape = page.decode(data, index, **tables)
            except Exception as error:
                raise ImageError(f"{path}: damaged or truncated ({error}); copy or export it again") from error
            if segment is None:  # a sparse tile: background
                continue
            segment = segment[0, : shape[1], : shape[2]]
            r0, r1 = max(row, top), min(row + height, top + segment.shape[0])
            c0, c1 = max(col, left), min(col + width, left + segment.shape[1])
            out[r0 - row : r1 - row, c0 - col : c1 - col] = segment[r0 - top : r1 - top, c0 - left : c1 - left]
    return out[..., 0] if samples == 1 else out


def _slide_reader() -> str | None:
    return next((name for name in ("tiffslide", "openslide") if importlib.util.find_spec(name)), None)


def _open_slide(path: Path):
    name = _slide_reader()
    if name is None:
        raise ImageError(f"{path}: slides of this kind need tiffslide: pip install nucseg[slides]")
    module = importlib.import_module(name)
    try:
        return (module.TiffSlide if name == "tiffslide" else module.OpenSlide)(str(path))
    except Exception as error:
        raise ImageError(f"{path}: {name} cannot open this slide ({error})") from error


def _to_rgb(data: np.ndarray, path: Path, page=None, bits: int | None = None) -> np.ndarray:
    """Turn decoded values of any common kind into (H, W, 3) uint8, with a warning where it matters."""
    if page is not None and page.photometric == TIFF_CMYK:
        raise ImageError(f"{path}: CMYK colours; convert it to 8-bit RGB with the profile it was printed for")
    data = _samples(data[..., None] if data.ndim == 2 else data, page)
    if data.ndim != 3 or data.shape[2] not in (1, 2, 3, 4) or 0 in data.shape:
        raise ImageError(f"{path}: expected an RGB image, got an array of shape {data.shape}; is it a stack or a mask?")
    if data.dtype.kind == "f":
        raise ImageError(f"{path}: floating-point pixels; save it as 8-bit RGB")
    if data.dtype.kind == "b":
        data = data.astype(np.uint8) * 255
    few = data.shape[2] < 3  # grey, with alpha or without
    if few and page is not None and page.photometric == TIFF_PALETTE and page.colormap is not None:
        _warn(path, "was converted from palette colours to RGB")
        colours = (page.colormap[:, data[..., 0]] >> 8).transpose(1, 2, 0)
        opaque = data[..., 1:] >> 8 * (data.dtype.itemsize - 1)
        return _on_white(np.concatenate([colours, opaque], axis=2).astype(np.uint8))
    if data.dtype != np.uint8:
        data = _to_8_bit(data, path, bits)
    if page is not None and page.photometric == TIFF_WHITE_IS_ZERO:
        colours, opaque = np.split(data, [1 if few else 3], axis=2)
        data = np.concatenate([255 - colours, opaque], axis=2)
    if few:
        _warn(path, GREY)
        data = np.concatenate([np.repeat(data[..., :1], 3, axis=2), data[..., 1:]], axis=2)
    return _on_white(data)


def _samples(data: np.ndarray, page) -> np.ndarray:
    """Leave out of (H, W, 2) the second sample of a grey TIFF page that says it is no alpha."""
    if data.ndim == 3 and data.shape[2] == 2 and page is not None and not set(page.extrasamples) & set(TIFF_ALPHA):
        return data[..., :1]
    return data


def _on_white(data: np.ndarray) -> np.ndarray:
    """Return the colours of (H, W, 3 or 4) uint8; where a pixel is transparent, nothing was scanned: that is glass."""
    if data.shape[2] == 3:
        return np.ascontiguousarray(data)
    opaque = data[..., 3:].astype(np.uint16)
    if opaque.min(initial=255) == 255:
        return data[..., :3].copy()
    return ((data[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)


def _fewest_bits(top: int) -> int | None:
    """Guess how many bits are used: scanners store 10, 12, 14 or 16, so the fewest that hold `top`; None for more."""
    return next((bits for bits in (8, 10, 12, 14, 16) if top < 2**bits), None)


def _to_8_bit(data: np.ndarray, path: Path, bits: int | None) -> np.ndarray:
    top = int(data.max(initial=0))
    if data.dtype.kind == "i" and int(data.min(initial=0)) < 0:
        raise ImageError(f"{path}: negative pixel values ({data.dtype}); save it as 8-bit RGB")
    bits = _fewest_bits(top) if bits is None or top >= 2**bits else bits  # a header may be wrong
    if bits is None or bits > 16:
        raise ImageError(f"{path}: pixel values up to {top}; is it a label map? Save images as 8-bit RGB")
    _warn(path, f"has {data.dtype.itemsize * 8}-bit pixels; their {bits} significant bits were reduced to 8")
    return (data >> (bits - 8)).astype(np.uint8)


def _warn(path: Path, what: str) -> None:
    warnings.warn(f"{path}: {what}", ImageWarning, stacklevel=4)
