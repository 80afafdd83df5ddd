"""Annotations: exact on the official release, the same pixels after a round trip, and a reason for everything odd."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from nucseg.annotations import (
    AnnotationError,
    AnnotationWarning,
    LabelWarning,
    SparseLabels,
    read_geojson,
    read_geojson_patches,
    read_geojson_report,
    read_geojson_sparse,
    read_labels,
    read_xml,
    read_xml_report,
    read_xml_sparse,
    write_geojson,
    write_labels,
)
from nucseg.annotations.outlines import trace
from nucseg.data import Patch

small_maps = hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 4))


def _xml(path: Path, *polygons, attributes: str = "") -> Path:
    regions = "".join(
        f'<Region Id="{number}" {attributes}><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in polygon)
        + "</Vertices></Region>"
        for number, polygon in enumerate(polygons, 1)
    )
    path.write_text(f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>")
    return path


def _by_the_rule(polygons, shape) -> np.ndarray:
    """The half-open rule, pixel by pixel and edge by edge, in plain Python."""
    labels = np.zeros(shape, int)
    for number, polygon in enumerate(polygons, 1):
        for r in range(shape[0]):
            for c in range(shape[1]):
                inside = False
                for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
                    if (x0 <= c) != (x1 <= c):
                        inside ^= y0 + (c - x0) * (y1 - y0) / (x1 - x0) > r
                if inside and labels[r, c] == 0:
                    labels[r, c] = number
    return labels


def _square(x, y, side):
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]


# --- XML --------------------------------------------------------------------------------------------------------------


def test_the_official_files_give_the_packed_label_maps_pixel_for_pixel(real_data):
    files = sorted((real_data / "monuseg_original_layout").rglob("*.xml"))
    assert len(files) == 3
    for file in files:
        packed = read_labels(real_data / "kumar" / "labels" / f"{file.stem}.png")
        np.testing.assert_array_equal(read_xml(file, packed.shape), packed)  # and without any warning


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-3, 12, width=16), st.floats(-3, 12, width=16)), min_size=3, max_size=7),
        min_size=1,
        max_size=4,
    )
)
def test_xml_polygons_are_filled_like_the_rule_pixel_by_pixel(tmp_path_factory, polygons):
    path = _xml(tmp_path_factory.mktemp("xml") / "a.xml", *polygons)
    labels, report = read_xml_report(path, (9, 10))
    skipped = {int(problem.region) for problem in report.problems if problem.skipped}
    kept = [[] if number in skipped else polygon for number, polygon in enumerate(polygons, 1)]
    np.testing.assert_array_equal(labels, _by_the_rule(kept, (9, 10)))


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_none_out(tmp_path):
    path = _xml(tmp_path / "a.xml", _square(0, 0, 4), [(4, 0), (8, 0), (8, 4), (4, 4)])
    labels = read_xml(path, (4, 8))
    np.testing.assert_array_equal(labels, np.repeat([[1] * 4 + [2] * 4], 4, axis=0))


def test_the_first_polygon_wins_where_two_overlap(tmp_path):
    labels = read_xml(_xml(tmp_path / "a.xml", _square(2, 2, 6), _square(5, 5, 6)), (12, 12))
    assert labels[6, 6] == 1
    assert (labels == 2).sum() == 36 - 9


ODD = {
    "two points": ([(1, 1), (5, 5)], "fewer than three different vertices"),
    "one point many times": ([(1, 1)] * 5, "fewer than three different vertices"),
    "no points": ([], "no vertices"),
    "a line": ([(1, 1), (3, 3), (7, 7)], "zero area"),
    "not a number": ([(1, 1), ("nan", 3), (7, 7)], "not a finite number"),
    "text": ([(1, 1), ("x", 3), (7, 7)], "without X and Y numbers"),
    "far away": ([(1, 1), (3e9, 3), (7, 9)], "pixels away"),
    "right of the image": (_square(30, 2, 5), "outside the image"),
    "above the image": (_square(2, -9, 5), "outside the image"),
    "between pixels": ([(1.2, 1.2), (1.7, 1.3), (1.5, 1.8)], "covers no pixel position"),
    "hidden": (_square(13, 13, 2), "covered entirely by earlier regions"),
    "a bow tie": ([(2, 2), (8, 8), (8, 2), (2, 8)], "its parts cancel"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_polygon_is_reported_by_id_and_skipped_and_the_others_are_read(case, tmp_path):
    polygon, reason = ODD[case]
    path = _xml(tmp_path / "a.xml", _square(12, 12, 6), polygon, _square(0, 0, 1))
    with pytest.warns(AnnotationWarning, match=f"1 skipped: .*{reason}.*region 2"):
        labels = read_xml(path, (20, 20))
    assert set(np.unique(labels)) == {0, 1, 3}


def test_a_trembling_outline_is_kept_and_only_noted_in_the_report(tmp_path):
    loop = [(2, 2), (10, 2), (10, 10), (6, 10), (5.8, 10.2), (5.8, 9.8), (6.2, 10.2), (2, 10)]
    labels, report = read_xml_report(_xml(tmp_path / "a.xml", loop), (14, 14))
    assert labels[5, 5] == 1
    assert [(p.region, p.skipped, p.harmless) for p in report.problems] == [("1", False, True)]
    read_xml(tmp_path / "a.xml", (14, 14))  # warns of nothing


def test_an_outline_that_loses_part_of_its_area_is_kept_with_a_warning(tmp_path):
    lobe = [(0, 0), (10, 0), (10, 10), (9, 10), (1, 20), (9, 20), (1, 10), (0, 10)]  # the second half runs backwards
    with pytest.warns(AnnotationWarning, match=r"1 kept: outline crosses itself.*region 1"):
        labels = read_xml(_xml(tmp_path / "a.xml", lobe), (24, 12))
    assert labels[5, 5] == labels[18, 5] == 1


def test_many_odd_polygons_give_one_warning_that_counts_them(tmp_path):
    path = _xml(tmp_path / "a.xml", *([[(1, 1), (2, 2)]] * 30))
    with pytest.warns(AnnotationWarning, match="and 22 more") as caught:
        read_xml(path, (9, 9))
    assert len(caught) == 1


def test_regions_whose_ids_are_used_twice_are_told_apart_by_their_number(tmp_path):
    layer = '<Annotation><Regions><Region Id="1"><Vertices>{}</Vertices></Region></Regions></Annotation>'
    good = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in _square(1, 1, 4))
    (tmp_path / "a.xml").write_text(f"<Annotations>{layer.format(good)}{layer.format('')}</Annotations>")
    with pytest.warns(AnnotationWarning, match=r"1 skipped: no vertices \(region 1 \(number 2\)\)"):
        assert (read_xml(tmp_path / "a.xml", (9, 9)) == 1).sum() == 16
    features = [{**_feature(_closed_square(1, 1, 4)), "id": "PathAnnotationObject"}] * 2
    features[1] = {**features[1], "geometry": None}
    (tmp_path / "a.geojson").write_text(json.dumps(features))
    with pytest.warns(AnnotationWarning, match=r"1 skipped: .*PathAnnotationObject \(number 2\)"):
        assert (read_geojson(tmp_path / "a.geojson", (9, 9)) == 1).sum() == 16


def test_an_excluded_region_is_skipped_and_said_so(tmp_path):
    path = _xml(tmp_path / "a.xml", _square(1, 1, 5), attributes='NegativeROA="1"')
    with pytest.warns(AnnotationWarning, match="marked as excluded"):
        assert read_xml(path, (9, 9)).max() == 0


ATTACK = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><Annotations>&b;</Annotations>'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ATTACK, "refused"),
        ("<Annotations><Annotation>", "not a complete XML file"),
        ("", "not a complete XML file"),
        ("<html></html>", "the root is <html>"),
        ("\x00\x01\x02", "not a complete XML file"),
    ],
)
def test_a_file_that_is_no_annotation_is_an_error_with_its_name(content, reason, tmp_path):
    path = tmp_path / "bad.xml"
    path.write_text(content)
    with pytest.raises(AnnotationError, match=rf"bad\.xml: .*{reason}"):
        read_xml(path, (5, 5))


def test_an_annotation_without_regions_is_an_empty_label_map(tmp_path):
    assert read_xml(_xml(tmp_path / "a.xml"), (5, 6)).shape == (5, 6)


# --- GeoJSON ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(small_maps)
def test_any_label_map_comes_back_from_geojson_pixel_for_pixel(tmp_path_factory, labels):
    path = tmp_path_factory.mktemp("geojson") / "a.geojson"
    write_geojson(path, labels)
    np.testing.assert_array_equal(read_geojson(path, labels.shape), labels)


@settings(max_examples=150, deadline=None)
@given(small_maps)
def test_outlines_are_simple_rings_whose_area_is_the_number_of_pixels(labels):
    for id, polygons in trace(labels).items():
        area = 0.0
        for polygon in polygons:
            for number, ring in enumerate(polygon):
                assert len(np.unique(ring, axis=0)) == len(ring)  # no point twice
                x, y = ring.T
                signed = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
                assert (signed > 0) == (number == 0)  # shell first, then holes
                area += signed
        assert area == (labels == id).sum()


def test_every_kumar_and_tnbc_label_map_comes_back_from_geojson_pixel_for_pixel(real_data, tmp_path):
    files = sorted((real_data / "kumar" / "labels").glob("*.png"))[::6] + [
        real_data / "tnbc" / "labels" / f"{id}.png" for id in ("01_1", "03_3", "09_4")
    ]
    for file in files:  # a sixth of Kumar
        labels = read_labels(file)
        write_geojson(tmp_path / "a.geojson", labels)
        np.testing.assert_array_equal(read_geojson(tmp_path / "a.geojson", labels.shape), labels)


def test_a_large_map_on_the_disk_is_written_in_parts_and_gives_the_same_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = ndimage.label(ndimage.gaussian_filter(rng.random((170, 230)), 2) > 0.52)[0].astype(np.int32)
    labels[labels % 5 == 3] = 0  # ids with gaps
    ids = [int(id) for id in np.unique(labels) if id]
    scores = rng.random(len(ids)).round(3)
    canvas = np.memmap(tmp_path / "canvas", np.int32, "w+", shape=labels.shape)
    canvas[:] = labels

    def features(path):
        found = json.loads(path.read_text())["features"]
        return sorted(found, key=lambda feature: feature["properties"]["measurements"]["Label id"])

    write_geojson(tmp_path / "one.geojson", labels, scores=scores)
    monkeypatch.setattr("nucseg.annotations.geojson.PART", 40)
    write_geojson(tmp_path / "parts.geojson", canvas, scores=scores)
    assert features(tmp_path / "parts.geojson") == features(tmp_path / "one.geojson")
    assert len(features(tmp_path / "one.geojson")) == len(ids) > 20
    with pytest.raises(ValueError, match="scores: 2 given"):
        write_geojson(tmp_path / "wrong.geojson", canvas, scores=scores[:2])
    assert not (tmp_path / "wrong.geojson").exists()

    monkeypatch.setattr("nucseg.annotations.label_images.IN_MEMORY", 0)
    monkeypatch.setattr("nucseg.annotations.label_images.TILE", 64)
    write_labels(tmp_path / "labels.tif", canvas)
    with tifffile.TiffFile(tmp_path / "labels.tif") as file:
        assert file.pages[0].is_tiled
    back = read_labels(tmp_path / "labels.tif")
    assert np.array_equal(back, labels)


def test_what_qupath_ignores_is_no_nucleus(tmp_path):
    labels = np.zeros((20, 20), np.int32)
    labels[2:6, 2:6], labels[10:16, 10:16] = 1, 2
    write_geojson(tmp_path / "a.geojson", labels)
    content = json.loads((tmp_path / "a.geojson").read_text())
    content["features"][1]["properties"]["classification"]["name"] = "Ignore*"
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    with pytest.warns(AnnotationWarning, match=r"of class Ignore\*, which QuPath ignores"):
        back = read_geojson(tmp_path / "a.geojson", labels.shape)
    assert np.array_equal(back, np.where(labels == 1, 1, 0))


def test_geojson_has_the_form_that_qupath_reads(tmp_path):
    labels = np.zeros((10, 12), np.int32)
    labels[1:6, 1:6] = 7
    labels[3, 3] = 0  # a hole
    labels[8, 2] = labels[8, 9] = 9  # two pieces
    write_geojson(tmp_path / "a.geojson", labels, scores={7: 0.5, 9: 0.25}, object_type="detection")
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    whole, pieces = content["features"]
    assert whole["geometry"]["type"] == "Polygon"
    assert whole["geometry"]["coordinates"][0][0] == whole["geometry"]["coordinates"][0][-1]
    assert sorted(whole["geometry"]["coordinates"][0][:-1]) == [[1, 1], [1, 6], [6, 1], [6, 6]]
    assert len(whole["geometry"]["coordinates"]) == 2
    assert pieces["geometry"]["type"] == "MultiPolygon"
    assert [len(polygon) for polygon in pieces["geometry"]["coordinates"]] == [1, 1]
    assert whole["properties"]["objectType"] == "detection"
    assert whole["properties"]["classification"]["name"] == "Nucleus"
    assert len(whole["properties"]["classification"]["color"]) == 3
    assert pieces["properties"]["measurements"] == {"Label id": 9, "Score": 0.25}
    assert str(uuid.UUID(whole["id"])) == whole["id"] != pieces["id"]


def test_the_same_label_map_gives_the_same_file(tmp_path):
    labels = np.eye(6, dtype=np.int32)
    write_geojson(tmp_path / "a.geojson", labels)
    write_geojson(tmp_path / "b.geojson", labels)
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()


def test_patches_come_back_in_the_order_of_their_rank(tmp_path):
    patches = [Patch("slide", 10, 20, 64), Patch("slide", 0, 5, 32), Patch("slide", 7, 7, 8)]
    write_geojson(tmp_path / "p.geojson", patches, ranks=[3, 1, 2], scores=[0.1, 0.2, 0.3])
    assert read_geojson_patches(tmp_path / "p.geojson") == [patches[1], patches[2], patches[0]]
    feature = json.loads((tmp_path / "p.geojson").read_text())["features"][0]
    assert feature["properties"]["measurements"] == {"Rank": 3, "Score": 0.1}
    assert feature["geometry"]["coordinates"] == [[[20, 10], [84, 10], [84, 74], [20, 74], [20, 10]]]


def test_patches_in_a_file_of_nuclei_are_not_read_as_nuclei(tmp_path):
    labels = np.zeros((20, 20), np.int32)
    labels[3:9, 3:9] = 4
    write_geojson(tmp_path / "n.geojson", labels)
    write_geojson(tmp_path / "p.geojson", [Patch("a", 0, 0, 16)])
    both = [json.loads((tmp_path / name).read_text())["features"][0] for name in ("p.geojson", "n.geojson")]
    (tmp_path / "both.geojson").write_text(json.dumps(both))  # a bare list, as QuPath also writes it
    np.testing.assert_array_equal(read_geojson(tmp_path / "both.geojson", labels.shape), labels)
    assert read_geojson_patches(tmp_path / "both.geojson") == [Patch("a", 0, 0, 16)]


def test_a_patch_that_was_resized_is_refused(tmp_path):
    write_geojson(tmp_path / "p.geojson", [Patch("a", 0, 0, 16)])
    text = (tmp_path / "p.geojson").read_text().replace("[16, 0]", "[18.5, 0]")
    (tmp_path / "p.geojson").write_text(text)
    with pytest.raises(AnnotationError, match="moved or resized"):
        read_geojson_patches(tmp_path / "p.geojson")


def _feature(coordinates, kind="Polygon", **about) -> dict:
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation"},
        **about,
    }


def _closed_square(x, y, side):
    return [[*map(list, _square(x, y, side)), [x, y]]]


def test_features_without_our_ids_are_numbered_in_their_order_and_the_first_wins(tmp_path):
    features = [_feature(_closed_square(0, 0, 6)), _feature(_closed_square(3, 3, 6))]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    labels = read_geojson(tmp_path / "a.geojson", (10, 10))
    assert labels[4, 4] == 1
    assert [(labels == id).sum() for id in (1, 2)] == [36, 27]


def test_a_copied_feature_gets_a_new_id_instead_of_merging_with_its_original(tmp_path):
    old = {"objectType": "annotation", "measurements": [{"name": "Label id", "value": 5}]}  # QuPath before 0.4
    features = [_feature(_closed_square(x, 0, 3), properties=old) for x in (0, 5)]
    (tmp_path / "a.geojson").write_text(json.dumps(features))
    labels = read_geojson(tmp_path / "a.geojson", (4, 10))
    assert (labels[0, 0], labels[0, 6]) == (5, 6)


def test_of_a_cell_the_nucleus_is_taken(tmp_path):
    cell = _feature(
        _closed_square(0, 0, 9), nucleusGeometry={"type": "Polygon", "coordinates": _closed_square(3, 3, 2)}
    )
    (tmp_path / "a.geojson").write_text(json.dumps(cell))
    assert (read_geojson(tmp_path / "a.geojson", (9, 9)) > 0).sum() == 4


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        ({"type": "Point", "coordinates": [1, 2]}, "geometry Point"),
        ({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}, "geometry LineString"),
        (None, "geometry missing"),
        ({"type": "Polygon", "coordinates": [[["a", "b"]]]}, "no area that can be filled"),
        ({"type": "Polygon", "coordinates": []}, "no vertices"),
        ({"type": "Polygon", "coordinates": [[[1, 1], [5, 5], [1, 1]]]}, "fewer than three"),
        ({"type": "Polygon", "coordinates": [[[90, 90], [95, 90], [95, 95], [90, 90]]]}, "outside the image"),
    ],
)
def test_an_odd_feature_is_reported_by_id_and_skipped(geometry, reason, tmp_path):
    features = [_feature(_closed_square(0, 0, 3)), {"type": "Feature", "id": "odd-one", "geometry": geometry}]
    (tmp_path / "a.geojson").write_text(json.dumps(features))
    with pytest.warns(AnnotationWarning, match=f"{reason}.*odd-one"):
        labels = read_geojson(tmp_path / "a.geojson", (20, 20))
    assert set(np.unique(labels)) == {0, 1}
    assert read_geojson_report(tmp_path / "a.geojson", (20, 20))[1].n_nuclei == 1


@pytest.mark.parametrize("content", ["{", "[1, 2]", '{"type": "Topology"}', "", '{"type": "FeatureCollection"}'])
def test_a_file_that_is_no_geojson_is_an_error_with_its_name(content, tmp_path):
    (tmp_path / "bad.geojson").write_text(content)
    with pytest.raises(AnnotationError, match=r"bad\.geojson: no"):
        read_geojson(tmp_path / "bad.geojson", (5, 5))


def test_scores_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scores: 2 given for 1 nuclei"):
        write_geojson(tmp_path / "a.geojson", np.ones((3, 3), int), scores=[0.1, 0.2])
    assert list(tmp_path.iterdir()) == []


# --- Label images -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(small_maps, st.sampled_from(["png8", "png16", "tif8", "tif16", "tif32", "tif-zlib", "npy"]))
def test_label_images_come_back_from_every_format(tmp_path_factory, labels, form):
    labels = labels * (50 if form.endswith("8") else 1)
    path = tmp_path_factory.mktemp("labels") / f"a.{form[:3]}"
    if form.startswith("png"):
        Image.fromarray(labels.astype(f"uint{form[3:]}")).save(path)
    elif form == "npy":
        np.save(path, labels)
    else:
        kind = form[3:] if form != "tif-zlib" else "16"
        tifffile.imwrite(path, labels.astype(f"uint{kind}"), compression="zlib" if form == "tif-zlib" else None)
    np.testing.assert_array_equal(read_labels(path, binary=False), labels)


@settings(max_examples=40, deadline=None)
@given(small_maps, st.sampled_from([".png", ".tif", ".npy"]), st.sampled_from([1, 300, 16_000, 500_000_000]))
def test_written_label_maps_come_back_and_leave_no_other_file(tmp_path_factory, labels, suffix, factor):
    path = tmp_path_factory.mktemp("written") / f"a{suffix}"
    labels = labels * factor
    if suffix == ".png" and labels.max() > 65535:
        with pytest.raises(ValueError, match=r"do not fit a 16-bit PNG; write a \.tif"):
            write_labels(path, labels)
        return
    write_labels(path, labels)
    np.testing.assert_array_equal(read_labels(path, binary=False), labels)
    assert list(path.parent.iterdir()) == [path]


def test_ids_above_255_survive_a_16_bit_png(tmp_path):
    labels = np.array([[0, 300], [65000, 2]], np.uint16)
    Image.fromarray(labels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), labels)


def test_a_binary_mask_is_split_into_components_with_a_warning(tmp_path):
    mask = np.zeros((9, 9), np.uint8)
    mask[1:3, 1:3] = mask[3, 3] = mask[6:8, 5:8] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    with pytest.warns(LabelWarning, match=r"2 connected parts .* nuclei that touch are merged"):
        labels = read_labels(tmp_path / "a.png")
    assert labels.max() == 2
    assert labels[3, 3] == labels[1, 1]  # touching at a corner is touching
    assert read_labels(tmp_path / "a.png", binary=True).max() == 2  # asked for, so without a warning
    assert read_labels(tmp_path / "a.png", binary=False).max() == 255


def test_a_map_with_one_nucleus_is_not_taken_for_a_mask(tmp_path):
    labels = np.zeros((5, 5), np.uint8)
    labels[1:3, 1:3] = 1
    np.save(tmp_path / "a.npy", labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.npy"), labels)


class _Evil:
    def __reduce__(self):
        return (Path("/tmp/nucseg-was-here").touch, ())


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cellpose_masks_are_read_without_unpickling(dtype, order, tmp_path, monkeypatch):
    masks = np.asarray(np.arange(20).reshape(4, 5), dtype, order=order)
    content = {
        "outlines": masks.copy(),
        "colors": np.random.default_rng(0).random((3, 3)),
        "masks": masks,
        "chan_choose": [0, 0],
        "filename": "a.png",
        "flows": [np.zeros((2, 2)), [1.5, None, True]],
        "ismanual": np.zeros(19, bool),
        "est_diam": np.float64(12.5),
    }
    np.save(tmp_path / "a_seg.npy", content)

    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    np.testing.assert_array_equal(read_labels(tmp_path / "a_seg.npy"), masks)


def test_code_in_a_seg_file_is_never_run(tmp_path):
    witness = Path("/tmp/nucseg-was-here")
    witness.unlink(missing_ok=True)
    np.save(tmp_path / "a_seg.npy", {"masks": np.eye(3, dtype=int), "evil": _Evil()})
    np.testing.assert_array_equal(read_labels(tmp_path / "a_seg.npy"), np.eye(3))
    np.save(tmp_path / "b_seg.npy", {"masks": _Evil()})
    with pytest.raises(AnnotationError, match="never unpickled here"):
        read_labels(tmp_path / "b_seg.npy")
    assert not witness.exists()


def test_a_seg_file_without_masks_says_how_to_export_them(tmp_path):
    np.save(tmp_path / "a_seg.npy", {"flows": [1, 2]})
    with pytest.raises(AnnotationError, match="Save masks as PNG"):
        read_labels(tmp_path / "a_seg.npy")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 3)), "floating-point"),
        (np.full((3, 3), -1), "ids must lie in 0"),
        (np.full((3, 3), 2**31), "ids must lie in 0"),
        (np.arange(36).reshape(4, 3, 3), "expected one id per pixel"),
        (np.zeros(5, int), "expected one id per pixel"),
        (np.array([["a", "b"]]), "expected whole numbers"),
    ],
)
def test_an_array_that_is_no_label_map_is_an_error_with_its_reason(array, reason, tmp_path):
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(AnnotationError, match=rf"bad\.npy: .*{reason}"):
        read_labels(tmp_path / "bad.npy")


def test_label_files_that_cannot_be_decoded_are_errors_with_their_names(tmp_path):
    for name in ("bad.png", "bad.tif", "bad.npy"):
        (tmp_path / name).write_bytes(b"no such thing")
        with pytest.raises(AnnotationError, match=name):
            read_labels(tmp_path / name)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "bad.jpg")
    with pytest.raises(AnnotationError, match="must be lossless"):
        read_labels(tmp_path / "bad.jpg")
    colours = np.random.default_rng(0).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "colours.png")
    with pytest.raises(AnnotationError, match="coloured picture of labels"):
        read_labels(tmp_path / "colours.png")
    with pytest.raises(AnnotationError, match="no such file"):
        read_labels(tmp_path / "absent.png")


@given(small_maps, st.tuples(st.integers(0, 11), st.integers(0, 11)))
def test_sparse_labels_are_the_dense_ones(labels, corner):
    sparse = SparseLabels.of(labels)
    assert (sparse.dense() == labels).all()
    row, col = (min(a, n - 1) for a, n in zip(corner, labels.shape, strict=True))
    height, width = labels.shape[0] - row, max(1, (labels.shape[1] - col) // 2)
    assert (sparse.crop(row, col, height, width) == labels[row : row + height, col : col + width]).all()
    for number in np.unique(labels[labels > 0]):
        assert sparse.box(number) == ndimage.find_objects((labels == number).astype(int))[0]


@pytest.mark.parametrize("suffix", [".geojson", ".xml"])
def test_outlines_on_a_whole_slide_take_memory_by_what_is_drawn(tmp_path, suffix):
    shape, corner = (100_000, 120_000), 90_000  # 48 GB as a label map
    ring = [(corner, corner), (corner + 30, corner), (corner + 30, corner + 20), (corner, corner + 20)]
    path = tmp_path / f"slide{suffix}"
    if suffix == ".xml":
        _xml(path, ring)
        read = read_xml_sparse
    else:
        geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        path.write_text(json.dumps([{"type": "Feature", "geometry": geometry, "properties": {}}]))
        read = read_geojson_sparse
    tracemalloc.start()
    labels, report = read(path, shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert report.n_nuclei == 1
    assert labels.box(1) == (slice(corner, corner + 20), slice(corner, corner + 30))
    assert labels.crop(corner - 10, corner - 10, 64, 64).sum() == 600


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_one_nucleus_in_two_pieces_is_read_back_as_one(tmp_path, suffix):
    labels = np.zeros((20, 20), np.int32)
    labels[2:6, 2:6] = labels[10:14, 2:6] = 1
    write_labels(tmp_path / f"a{suffix}", labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (read_labels(tmp_path / f"a{suffix}") == labels).all()
    Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "b.png")  # by another program: a mask
    with pytest.warns(LabelWarning, match="binary mask"):
        assert read_labels(tmp_path / "b.png").max() == 2
