"""The official MoNuSeg and Kumar annotations: Aperio ImageScope XML, one ``Region`` of ``Vertex`` X, Y per nucleus.

Coordinates are taken as 0-based pixel positions (X = column, Y = row), rasterised by the half-open rule of
`nucseg.annotations.polygons`; ids are the regions' numbers in the order of the file, so a region without a visible
pixel leaves a gap. Parsing goes through defusedxml: entities and external references are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nucseg.annotations.errors import AnnotationError
from nucseg.annotations.polygons import AnnotationReport, Problem, Region, rasterize


def read_xml(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read an Aperio XML file into a label map.

    Parameters
    ----------
    path
        The ``.xml`` file.
    shape
        Height and width of its image.

    Returns
    -------
    numpy.ndarray
        (H, W) int32; id k is the k-th region of the file, 0 is background; the first region wins on overlaps.

    Raises
    ------
    AnnotationError
        When the file is no XML, uses entities, or holds no regions' list.

    Warns
    -----
    AnnotationWarning
        Once per file, listing by id the regions that were skipped or are odd.
    """
    labels, report = read_xml_report(path, shape)
    report.warn()
    return labels


def read_xml_report(path: str | Path, shape: tuple[int, int]) -> tuple[np.ndarray, AnnotationReport]:
    """Read like `read_xml`, and return the problems as an `AnnotationReport` instead of warning."""
    regions, odd = _parse(Path(path))
    labels, problems = rasterize(regions, shape)
    known = {problem.region for problem in odd}
    problems = odd + [problem for problem in problems if problem.region not in known]
    nuclei = int(np.count_nonzero(np.bincount(labels.ravel(), minlength=1)[1:]))
    return labels, AnnotationReport(str(path), len(regions), nuclei, tuple(problems))


def _parse(path: Path) -> tuple[list[Region], list[Problem]]:
    from defusedxml import DefusedXmlException, ElementTree

    try:
        root = ElementTree.parse(path, forbid_dtd=True).getroot()
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file") from None
    except DefusedXmlException as error:
        raise AnnotationError(
            f"{path}: refused, the XML declares {type(error).__name__}: entities and DTDs can attack a reader; "
            "Aperio ImageScope writes none"
        ) from error
    except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
        raise AnnotationError(f"{path}: not a complete XML file ({error}); copy or export it again") from error
    if root.tag != "Annotations" and root.find(".//Region") is None:
        raise AnnotationError(f"{path}: no Aperio annotations: the root is <{root.tag}>, expected <Annotations>")
    regions, problems = [], []
    for number, element in enumerate(root.iter("Region"), 1):
        name = element.get("Id") or f"number {number}"
        vertices = [(vertex.get("X"), vertex.get("Y")) for vertex in element.iter("Vertex")]
        try:
            ring = np.array(vertices, float).reshape(-1, 2)
        except (TypeError, ValueError):
            problems.append(Problem(name, "a vertex without X and Y numbers", skipped=True))
            ring = np.zeros((0, 2))
        if element.get("NegativeROA", "0") == "1":
            problems.append(Problem(name, "marked as excluded (NegativeROA)", skipped=True))
            ring = np.zeros((0, 2))
        regions.append(Region(name, (ring,)))
    return regions, problems
