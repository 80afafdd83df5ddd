"""What a TIFF's header says of its pages: which of them hold the image's colours, and how large a pixel is.

Microscopes' programs write a colour image either as one page with three samples per pixel, or (OME, ImageJ) as three
grey pages, one per channel. Fluorescence is written like the latter, with as many pages as there are dyes. Which axis
the pages are counted along, and what the channels are called, stands in text that tifffile finds in the first page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

COLOURS = ("red", "green", "blue")
# words in channels' names that tell nothing: "Channel 1", "C:2/3", "RGB red", "TL Brightfield"
WORDLESS = {
    *("c", "ch", "chan", "channel", "channels", "plane", "component", "sample", "band", "image", "rgb", "other"),
    *("bf", "bright", "field", "brightfield", "tl", "transmitted", "light"),
}
POSITION = re.compile(r"^([czt]:\d+/\d+\s*)+(-\s*)?")  # "c:1/3 - " before what ImageJ calls a channel
INCH, CENTIMETRE, MILLIMETRE, MICROMETRE = 2, 3, 4, 5  # of the tag ResolutionUnit
MICROMETRES = {  # in one of the unit
    **{"µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0},
    **{"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "in": 25400.0, "inch": 25400.0},
}
TAG_UNITS = {INCH: 25400.0, CENTIMETRE: 1e4, MILLIMETRE: 1e3, MICROMETRE: 1.0}
FINEST, COARSEST = 0.05, 5.0  # micrometres: pixels of microscopes are 0.1 (100x) to 4 (2.5x); those of screens, 350
MPP = re.compile(r"\bMPP\s*=\s*([0-9.]+)")  # Aperio's description


def colour_pages(tiff) -> tuple[tuple[int, ...], str]:
    """Return which pages hold the colours of a TIFF's image, and what a reader of them must be told.

    Parameters
    ----------
    tiff
        An open `tifffile.TiffFile`.

    Returns
    -------
    pages
        The index of one page, or those of red, green and blue.
    remark
        What was taken or left out, ``""`` where there was no choice.

    Raises
    ------
    ValueError
        When its pages are channels, but not those of one colour image; the message says what they are, and what to do.
    """
    page = tiff.pages[0]
    alike = len(tiff.pages) > 1 and all(other.shape == page.shape for other in tiff.pages)
    first = f"has {len(tiff.pages)} pages of one size; only the first is read" if alike else ""
    series = _series(tiff) if page.samplesperpixel == 1 else None
    axes = {} if series is None else {a: n for a, n in zip(series.axes, series.shape, strict=True) if n > 1}
    if "C" not in axes:
        if page.samplesperpixel == 1 and alike and len(tiff.pages) == 3:
            first += " (if they are its red, green and blue, save it as one RGB image)"
        return (0,), first
    names = _channel_names(tiff)
    said = f" ({', '.join(names)})" if any(names) else ""
    depth = {axis: size for axis, size in axes.items() if axis not in "CYX"}
    if axes["C"] != 3:
        raise ValueError(
            f"{axes['C']} channels on pages of their own{said}: is it fluorescence? Models here expect the colours of "
            "a stained section; save it as 8-bit RGB, or one channel alone as a grey image"
        )
    if depth:
        more = ", ".join(f"{axis} = {size}" for axis, size in depth.items())
        raise ValueError(f"a stack of colour images (channels: 3, {more}); save the plane that is meant as 8-bit RGB")
    order = _colour_order(names)
    if order is None:
        raise ValueError(
            f"three channels on pages of their own{said}, which are not red, green and blue: it looks like "
            "fluorescence. Models here expect the colours of a stained section; if it is one, save it as 8-bit RGB"
        )
    pages = [series[number] if len(tiff.pages) >= 3 else None for number in range(3)]
    if any(one is None or one.parent is not tiff or one.is_subifd for one in pages):
        raise ValueError("its three channels are in other files, or lack a page of their own; save it as 8-bit RGB")
    return (
        tuple(pages[number].index for number in order),
        "has three pages, one per channel, which are taken as its red, green and blue",
    )


def stated_pixel_size(tiff) -> float | None:
    """Return the side of a pixel in micrometres that the header of an open `tifffile.TiffFile` states, or None."""
    return next(filter(None, map(plausible, _stated(tiff))), None)


def stated_bits(tiff) -> int | None:
    """Return how many bits of a deep pixel are used, as OME or a tag of an open `tifffile.TiffFile` states, or None."""
    pixels = _ome_pixels(tiff)
    bits = int(_number(pixels.get("SignificantBits"))) if pixels is not None else 0
    if not bits:
        largest = tiff.pages[0].tags.valueof("MaxSampleValue") or 0
        bits = int(np.max(largest)).bit_length()
    return bits if 8 <= bits <= 16 else None


def plausible(size: float) -> float | None:
    """Return a pixel's size in micrometres, but None where no microscope has it: it is a screen's or a printer's."""
    return size if FINEST <= size <= COARSEST else None


def _series(tiff):
    try:
        return tiff.series[0]
    except Exception:  # damaged text of OME, ImageJ or others: what the pages themselves say is left
        return None


def _ome_pixels(tiff):
    """The XML element about the first image's pixels, None where there is no (whole) OME text."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    if not tiff.is_ome:
        return None
    try:
        return fromstring(tiff.ome_metadata, forbid_dtd=True).find("{*}Image/{*}Pixels")
    except (ParseError, DefusedXmlException, ValueError, TypeError):
        return None


def _channel_names(tiff) -> list[str]:
    """What the channels are called, and what OME says else of their kind; empty where nothing is said."""
    pixels = _ome_pixels(tiff)
    if pixels is not None:
        about = ("Name", "Fluor", "ContrastMethod")
        named = [" ".join(filter(None, map(one.get, about))) for one in pixels.findall("{*}Channel")]
    else:
        named = [POSITION.sub("", str(label)) for label in (tiff.imagej_metadata or {}).get("Labels", ())]
    return named if len(set(named)) > 1 else []  # all alike (ImageJ repeats the file's name): they tell nothing


def _colour_order(names: list[str]) -> tuple[int, ...] | None:
    """Which of three channels are red, green and blue: by their names, else in their order; None if others."""
    colours: list[int | None] = []
    for name in names:
        words = [word for word in re.findall(r"[^\W\d_]+", name.lower()) if word not in WORDLESS]
        known = [i for i, colour in enumerate(COLOURS) if words in ([colour], [colour[0]])]
        if words and not known:
            return None
        colours.append(known[0] if known else None)
    if sorted(colour for colour in colours if colour is not None) == [0, 1, 2]:
        return tuple(map(colours.index, range(3)))
    return (0, 1, 2) if all(colour in (None, i) for i, colour in enumerate(colours)) else None


def _stated(tiff) -> Iterator[float]:
    """Pixel sizes in micrometres as OME, Aperio, ImageJ and the TIFF's own tags state them, in this order."""
    page = tiff.pages[0]
    pixels = _ome_pixels(tiff)
    if pixels is not None and (size := _number(pixels.get("PhysicalSizeX"))):
        yield size * MICROMETRES.get(pixels.get("PhysicalSizeXUnit", "µm"), 0.0)
    if found := MPP.search(page.description):
        yield _number(found[1])
    across = page.tags.valueof("XResolution")  # pixels per unit, a fraction
    if not across or not all(across):
        return
    unit = str((tiff.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ").strip()
    yield across[1] / across[0] * MICROMETRES.get(unit, 0.0)
    yield across[1] / across[0] * TAG_UNITS.get(page.tags.valueof("ResolutionUnit", INCH), 0.0)


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
