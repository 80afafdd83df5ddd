"""The official MoNuSeg and Kumar annotations: Aperio ImageScope XML, one ``Region`` of ``Vertex`` X, Y per nucleus.

Coordinates are taken as 0-based pixel positions (X = column, Y = row), rasterised by the half-open rule of
`nucseg.annotations.polygons`; ids are the regions' numbers in the order of the file, so a region without a visible
pixel leaves a gap. Parsing goes through defusedxml: entities and external references are refused.
"""

from __future__ import annotations

from pathlib import Path

# the handler and exception classes only: parsing itself goes through defusedxml
from xml.sax import SAXException
from xml.sax.handler import ContentHandler

import numpy as np

from nucseg.annotations.errors import AnnotationError
from nucseg.annotations.polygons import AnnotationReport, Problem, Region, rasterize, unique_names
from nucseg.annotations.sparse import SparseLabels


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
    labels, report = read_xml_sparse(path, shape)
    return labels.dense(), report


def read_xml_sparse(path: str | Path, shape: tuple[int, int]) -> tuple[SparseLabels, AnnotationReport]:
    """Read like `read_xml_report`, in memory that follows what is drawn, not the size of the image."""
    regions, odd = _parse(Path(path))
    labels, problems = rasterize(regions, shape)
    known = {problem.region for problem in odd}
    problems = odd + [problem for problem in problems if problem.region not in known]
    return labels, AnnotationReport(str(path), len(regions), np.unique(labels.ids).size, tuple(problems))


class _Reader(ContentHandler):
    """Collects the vertices of every region; a tree of 100,000 elements would take twice as long."""

    def __init__(self):
        self.root: str | None = None
        self.regions: list[tuple[str, bool, list[tuple[str | None, str | None]]]] = []

    def startElement(self, name, attrs):
        if name == "Vertex" and self.regions:
            self.regions[-1][2].append((attrs.get("X"), attrs.get("Y")))
        elif name == "Region":
            number = len(self.regions) + 1
            self.regions.append((attrs.get("Id") or f"number {number}", attrs.get("NegativeROA") == "1", []))
        elif self.root is None:
            self.root = name


def _parse(path: Path) -> tuple[list[Region], list[Problem]]:
    from defusedxml import DefusedXmlException, sax

    reader = _Reader()
    try:
        with open(path, "rb") as file:
            sax.parse(file, reader, forbid_dtd=True)
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file") from None
    except DefusedXmlException as error:
        raise AnnotationError(
            f"{path}: refused, {type(error).__name__}: a document type or entities can attack a reader, "
            "and Aperio ImageScope writes none"
        ) from error
    except (SAXException, ValueError) as error:
        raise AnnotationError(f"{path}: not a complete XML file ({error}); copy or export it again") from error
    if reader.root != "Annotations" and not reader.regions:
        raise AnnotationError(f"{path}: no Aperio annotations: the root is <{reader.root}>, expected <Annotations>")
    regions, problems = [], []
    names = unique_names([name for name, _, _ in reader.regions])
    for name, (_, excluded, vertices) in zip(names, reader.regions, strict=True):
        ring = np.zeros((0, 2))
        if excluded:
            problems.append(Problem(name, "marked as excluded (NegativeROA)", skipped=True))
        else:
            try:
                ring = np.array(vertices, float).reshape(-1, 2)
            except (TypeError, ValueError):
                problems.append(Problem(name, "a vertex without X and Y numbers", skipped=True))
        regions.append(Region(name, (ring,)))
    return regions, problems
