"""Annotations as people have them: MoNuSeg/Aperio XML, QuPath GeoJSON, label images; read and written as label maps."""

from nucseg.annotations.errors import AnnotationError, AnnotationWarning, LabelWarning
from nucseg.annotations.geojson import (
    read_geojson,
    read_geojson_patches,
    read_geojson_report,
    read_geojson_sparse,
    write_geojson,
)
from nucseg.annotations.label_images import another_size, read_labels, write_labels
from nucseg.annotations.polygons import AnnotationReport
from nucseg.annotations.sparse import SparseLabels
from nucseg.annotations.xml import read_xml, read_xml_report, read_xml_sparse

__all__ = [
    "AnnotationError",
    "AnnotationReport",
    "AnnotationWarning",
    "LabelWarning",
    "SparseLabels",
    "another_size",
    "read_geojson",
    "read_geojson_patches",
    "read_geojson_report",
    "read_geojson_sparse",
    "read_labels",
    "read_xml",
    "read_xml_report",
    "read_xml_sparse",
    "write_geojson",
    "write_labels",
]
