"""QuPath GeoJSON: nuclei as polygons, patches to annotate as rectangles, and both back again.

The form is QuPath's own (File > Export objects as GeoJSON, with or without FeatureCollection; versions 0.3 to 0.6): a
feature has a UUID, a Polygon or MultiPolygon in whole-image pixels with corners at whole numbers, and properties
``objectType``, ``classification`` (name and colour), ``measurements``. Outlines follow pixel edges, so a label map
comes back pixel for pixel. Where features overlap, the first in the file keeps the pixels, as in the XML of the
challenge; nothing is lost silently, every odd feature is in the report.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from nucseg.annotations.errors import AnnotationError
from nucseg.annotations.outlines import trace
from nucseg.annotations.polygons import AnnotationReport, Problem, Region, rasterize, unique_names
from nucseg.annotations.sparse import SparseLabels
from nucseg.files import whole
from nucseg.labels import check_label_map
from nucseg.patches import Patch

NUCLEUS, PATCH = "Nucleus", "Patch"  # classification names
COLOURS = {NUCLEUS: (0, 160, 220), PATCH: (240, 150, 0)}
OTHER_COLOUR = (200, 0, 0)
LABEL_ID = "Label id"  # the measurement that carries a nucleus' id through QuPath
IMAGE_ID = "image_id"  # the metadata entry that carries a patch's image
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://arxiv.org/abs/2212.10305")
PART = 4096  # pixels; of larger label maps, outlines are traced in parts of about this side
HALF_PIXEL = 0.5  # QuPath's integers are pixel corners; a pixel is inside when its centre is


def write_geojson(
    path: str | Path,
    objects: np.ndarray | Sequence[Patch],
    *,
    scores: Sequence[float] | Mapping[int, float] | None = None,
    ranks: Sequence[int] | None = None,
    classification: str | None = None,
    object_type: Literal["annotation", "detection"] = "annotation",
) -> None:
    """Write a label map or patches for QuPath.

    Parameters
    ----------
    path
        The ``.geojson`` file; written beside and moved into place.
    objects
        A label map, (H, W), or a sequence of `nucseg.data.Patch` of one image. Of a large map, which may lie on the
        disk (`numpy.memmap`), a part at a time is held in memory.
    scores
        Measurement ``Score``: of nuclei by id, or in ascending order of ids; of patches in their order (their cost).
    ranks
        Measurement ``Rank`` of patches, 1 = annotate first; default 1, 2, 3, ... in their order.
    classification
        Class name; default ``"Nucleus"`` or ``"Patch"``.
    object_type
        QuPath's object type: annotations can be edited, detections are lighter.

    Raises
    ------
    ValueError
        When scores or ranks do not fit the objects in number.
    """
    if isinstance(objects, np.ndarray):
        if ranks is not None:
            raise ValueError("ranks: only patches have ranks")
        features = _nucleus_features(objects, scores, classification or NUCLEUS, object_type)
    else:
        features = _patch_features(list(objects), scores, ranks, classification or PATCH, object_type)
    with whole(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, feature in enumerate(features):  # one by one: a slide has a million
            file.write((", " if number else "") + json.dumps(feature, allow_nan=False))
        file.write("]}")


def read_geojson(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read nuclei drawn or corrected in QuPath into a label map.

    Ids are those that `write_geojson` gave; new or doubled features get the next free ids. Rectangles of class
    ``"Patch"`` are those to annotate, not nuclei, and are left out; so is, with a warning, what has a class that QuPath
    ignores (``"Ignore*"``). Of cells the nucleus is taken.

    Parameters
    ----------
    path
        The ``.geojson`` file.
    shape
        Height and width of its image.

    Returns
    -------
    numpy.ndarray
        (H, W) int32, 0 = background; the first feature wins on overlaps.

    Raises
    ------
    AnnotationError
        When the file is no GeoJSON.

    Warns
    -----
    AnnotationWarning
        Once per file, listing by id the features that were skipped or are odd.
    """
    labels, report = read_geojson_report(path, shape)
    report.warn()
    return labels


def read_geojson_report(path: str | Path, shape: tuple[int, int]) -> tuple[np.ndarray, AnnotationReport]:
    """Read like `read_geojson`, and return the problems as an `AnnotationReport` instead of warning."""
    labels, report = read_geojson_sparse(path, shape)
    return labels.dense(), report


def read_geojson_sparse(path: str | Path, shape: tuple[int, int]) -> tuple[SparseLabels, AnnotationReport]:
    """Read like `read_geojson_report`, in memory that follows what is drawn, not the size of the image."""
    names, shapes, ids, unread, pieces = [], [], [], {}, {}
    for number, feature in enumerate(_features(Path(path)), 1):
        properties = _mapping(feature.get("properties"))
        geometry = feature.get("nucleusGeometry") or feature.get("geometry")
        patch = _class_name(properties) == PATCH
        if properties.get("objectType") == "root" or (patch and _is_rectangle(geometry)):
            continue
        names.append(str(feature.get("id") or properties.get("name") or f"number {number}"))
        given = _measurements(properties).get(LABEL_ID)
        ignored = (_class_name(properties) or "").endswith("*")  # QuPath's own sign
        try:
            rings = () if patch or ignored else _rings(geometry)
        except (TypeError, ValueError, KeyError, IndexError) as error:
            unread[len(shapes)] = f"no area that can be filled ({error})"
            rings = ()
        if ignored:
            unread[len(shapes)] = f"of class {_class_name(properties)}, which QuPath ignores"
        elif patch:
            unread[len(shapes)] = f"of class {PATCH}, but no rectangle; a nucleus needs another class, or none"
        elif given is None and (parts := _parts(geometry)) > 1:
            pieces[len(shapes)] = f"taken as one nucleus, but in {parts} parts (several: Split annotations in QuPath)"
        shapes.append(rings)
        ids.append(given)
    names = unique_names(names)
    regions = [Region(name, rings) for name, rings in zip(names, shapes, strict=True)]
    labels, problems = rasterize(regions, shape, _unique_ids(ids), HALF_PIXEL)
    why = {names[index]: reason for index, reason in unread.items()}
    problems = [replace(problem, reason=why.get(problem.region, problem.reason)) for problem in problems]
    problems += [Problem(names[index], reason, skipped=False) for index, reason in pieces.items()]
    return labels, AnnotationReport(str(path), len(regions), np.unique(labels.ids).size, tuple(problems))


def read_geojson_patches(path: str | Path, image_id: str | None = None, strict: bool = True) -> list[Patch]:
    """Read the patches of a file that `write_geojson` wrote or QuPath saved again, by rank.

    Parameters
    ----------
    path
        The ``.geojson`` file; features of other classes than ``"Patch"`` are left out.
    image_id
        Image of patches that do not name theirs; default the file's name without suffix.
    strict
        False leaves out what is no rectangle along the axes: a nucleus of the wrong class, say.

    Raises
    ------
    AnnotationError
        When a patch is not a square at whole pixels.
    """
    ranked = []
    for number, feature in enumerate(_features(Path(path)), 1):
        properties = _mapping(feature.get("properties"))
        if _class_name(properties) != PATCH or not (strict or _is_rectangle(feature.get("geometry"))):
            continue
        corners = np.concatenate(_rings(feature.get("geometry")))
        (left, top), (right, bottom) = corners.min(0), corners.max(0)
        whole = all(float(value).is_integer() for value in (left, top, right, bottom))
        if not whole or right - left != bottom - top:
            raise AnnotationError(
                f"{path}: patch {feature.get('id', number)} is not a square at whole pixels ({left}, {top}) to "
                f"({right}, {bottom}); it was moved or resized, undo that"
            )
        image = _mapping(properties.get("metadata")).get(IMAGE_ID) or image_id or Path(path).stem
        rank = _measurements(properties).get("Rank", number)
        ranked.append((rank, number, Patch(image, int(top), int(left), int(right - left))))
    return [patch for *_, patch in sorted(ranked, key=lambda item: item[:2])]


def _nucleus_features(labels, scores, classification, object_type) -> Iterator[dict]:
    check_label_map(labels)
    ids, parts = _parts_of(labels)
    if scores is not None and not isinstance(scores, Mapping):
        if len(scores) != len(ids):
            raise ValueError(f"scores: {len(scores)} given for {len(ids)} nuclei")
        scores = dict(zip(ids, scores, strict=True))
    if scores is not None and (without := [id for id in ids if id not in scores]):
        raise ValueError(f"scores: none given for id {without[0]}")
    for part, row, col in parts:
        for id, polygons in trace(part).items():
            coordinates = [[_closed(ring + np.array([col, row])) for ring in polygon] for polygon in polygons]
            one = len(coordinates) == 1
            geometry = {
                "type": "Polygon" if one else "MultiPolygon",
                "coordinates": coordinates[0] if one else coordinates,
            }
            measurements = {LABEL_ID: id}
            if scores is not None:
                measurements["Score"] = float(scores[id])
            yield _feature(geometry, classification, object_type, measurements)


def _parts_of(labels: np.ndarray) -> tuple[list[int], Iterable[tuple[np.ndarray, int, int]]]:
    """Return the ids of a label map, and parts of it that hold each nucleus whole and once: map, row, column.

    A small one is one part. Of a large one, which may lie on the disk, only a part at a time is in memory.
    """
    top = int(labels.max(initial=0))
    if labels.size <= PART**2 or top > labels.size:
        return [int(id) for id in np.unique(labels) if id], [(labels, 0, 0)]
    boxes = ndimage.find_objects(labels)
    found: dict[tuple[int, int], list[int]] = {}
    for number, box in enumerate(boxes, 1):
        if box is not None:
            found.setdefault((box[0].start // PART, box[1].start // PART), []).append(number)

    def parts() -> Iterator[tuple[np.ndarray, int, int]]:
        for _, ids in sorted(found.items()):
            rows, cols = ([boxes[number - 1][axis] for number in ids] for axis in (0, 1))
            row, col = (min(span.start for span in spans) for spans in (rows, cols))
            bottom, right = (max(span.stop for span in spans) for spans in (rows, cols))
            mine = np.zeros(top + 1, dtype=bool)
            mine[ids] = True
            part = labels[row:bottom, col:right]
            yield np.where(mine[part], part, 0), row, col

    return [number for number, box in enumerate(boxes, 1) if box is not None], parts()


def _patch_features(patches, scores, ranks, classification, object_type) -> list[dict]:
    ranks = list(range(1, len(patches) + 1)) if ranks is None else list(ranks)
    for name, values in (("scores", scores), ("ranks", ranks)):
        if values is not None and len(values) != len(patches):
            raise ValueError(f"{name}: {len(values)} given for {len(patches)} patches")
    features = []
    for index, (patch, rank) in enumerate(zip(patches, ranks, strict=True)):
        x0, y0, x1, y1 = patch.col, patch.row, patch.col + patch.size, patch.row + patch.size
        ring = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        measurements = {"Rank": int(rank)}
        if scores is not None:
            measurements["Score"] = float(scores[index])
        feature = _feature(
            {"type": "Polygon", "coordinates": [_closed(ring)]}, classification, object_type, measurements
        )
        feature["properties"] |= {"name": f"Patch {rank}", "isLocked": True, "metadata": {IMAGE_ID: patch.image_id}}
        features.append(feature)
    return features


def _feature(geometry: dict, classification: str, object_type: str, measurements: dict) -> dict:
    colour = list(COLOURS.get(classification, OTHER_COLOUR))
    return {
        "type": "Feature",
        # the same object gets the same UUID in every run, so files can be compared and committed
        "id": str(uuid.uuid5(NAMESPACE, json.dumps([classification, geometry, measurements]))),
        "geometry": geometry,
        "properties": {
            "objectType": object_type,
            "classification": {"name": classification, "color": colour},
            "measurements": measurements,
        },
    }


def _closed(ring: np.ndarray) -> list[list[int]]:
    points = ring.tolist()
    return [*points, points[0]]


def _features(path: Path) -> Iterable[dict]:
    """The features of a FeatureCollection, of a bare list (QuPath's other export form) or of a single feature."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise AnnotationError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AnnotationError(f"{path}: not complete JSON ({error}); export it again from QuPath") from error
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    elif isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    if not isinstance(content, list) or not all(isinstance(feature, dict) for feature in content):
        raise AnnotationError(
            f"{path}: no GeoJSON features; export with File > Export objects as GeoJSON in QuPath, as FeatureCollection"
        )
    return content


def _rings(geometry: Any) -> tuple[np.ndarray, ...]:
    kind = _mapping(geometry).get("type")
    if kind == "Polygon":
        polygons = [geometry["coordinates"]]
    elif kind == "MultiPolygon":
        polygons = geometry["coordinates"]
    elif kind == "GeometryCollection":
        return tuple(ring for part in geometry["geometries"] for ring in _rings(part))
    else:
        raise ValueError(f"geometry {kind or 'missing'}")
    return tuple(np.array([point[:2] for point in ring], float).reshape(-1, 2) for rings in polygons for ring in rings)


def _is_rectangle(geometry: Any) -> bool:
    """Whether a geometry is a rectangle along the axes, as `write_geojson` draws patches, moved or resized perhaps."""
    try:
        (ring,) = _rings(geometry)
    except (TypeError, ValueError, KeyError, IndexError):
        return False
    corners = np.unique(ring, axis=0)
    return len(corners) == 4 and all(len(np.unique(corners[:, axis])) == 2 for axis in (0, 1))


def _parts(geometry: Any) -> int:
    """Count the polygons of a geometry."""
    kind = _mapping(geometry).get("type")
    if kind == "GeometryCollection":
        return sum(_parts(part) for part in geometry["geometries"])
    return len(geometry["coordinates"]) if kind == "MultiPolygon" else 1


def _unique_ids(ids: list[Any]) -> np.ndarray:
    """Keep the first use of each positive whole id, and give the others the next free ones."""
    given: dict[int, int] = {}
    for index, id in enumerate(ids):
        if isinstance(id, int | float) and float(id).is_integer() and 0 < id < 2**31:
            given.setdefault(int(id), index)
    out = np.zeros(len(ids), np.int64)
    for id, index in given.items():
        out[index] = id
    # without any given ids, features are numbered in their order
    free = (id for id in range(1, 2**31) if id not in given)
    if given:
        free = iter(range(max(given) + 1, 2**31))
    for index in np.flatnonzero(out == 0):
        out[index] = next(free)
    return out


def _class_name(properties: Mapping) -> str | None:
    value = properties.get("classification")
    return value if isinstance(value, str) else _mapping(value).get("name")


def _measurements(properties: Mapping) -> Mapping:
    """Measurements by name; QuPath before 0.4 wrote a list of name and value."""
    value = properties.get("measurements")
    if isinstance(value, list):
        return {entry["name"]: entry.get("value") for entry in value if isinstance(entry, dict) and "name" in entry}
    return _mapping(value)


def _mapping(value: Any) -> Mapping:
    return value if isinstance(value, Mapping) else {}
