"""The rows of Tables I-VI as data: what each runs, and what the paper prints.

What each row means is REFERENCE 1.6. Where the paper leaves it open: every arm trains with the naive augmentation,
except Table III a) and b) (A28); Table VI's "w/o CSinGAN" is the naive augmentation. The printed numbers are read from
the CSV files beside this one.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from nucseg.config import check_name

TABLES = ("I", "II", "III", "IV", "V", "VI")
BEYOND = ("S", "B")  # ours: every selection strategy on one budget, and on several (`nucseg.plans`)


@dataclass(frozen=True)
class Spec:
    """What a row runs, before a dataset, a seed and a profile's sizes are put in.

    Attributes
    ----------
    selection, augmentation, segmenter
        As in `Experiment`; the segmenter is the paper's, which a profile may replace.
    plabel
        With pseudo-labelling (as many rounds as the profile says) or without.
    k1_step
        Place in `GridSettings.k1_grid`; 1 is the dataset's own K1.
    k2
        Fine clusters per coarse cluster, None for the profile's.
    """

    selection: str
    augmentation: str
    segmenter: str
    plabel: bool = False
    k1_step: int = 1
    k2: int | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes
    ----------
    table
        ``"I"`` to ``"VI"``.
    key
        Short name, unique in its table.
    label
        What the paper prints.
    spec
        What is run.
    paper
        The printed numbers by dataset and metric, for example ``paper["kumar"]["aji"]``; a dash is left out. Metrics:
        ``aji dice p``, in Table III also ``aji_seen aji_unseen``, in Table V the organs, in Table VI ``label_share``.
    reference
        Key of the row of the same table that the printed P-value compares with, None without comparison.
    """

    table: str
    key: str
    label: str
    spec: Spec
    paper: Mapping[str, Mapping[str, float]] = field(hash=False)
    reference: str | None = None

    @property
    def id(self) -> str:
        """The row's name among all tables, for example ``"I.cps"``."""
        return f"{self.table}.{self.key}"


def rows(table: str) -> tuple[Row, ...]:
    """Return the rows of a table, ``"I"`` to ``"VI"``, in the printed order.

    Raises
    ------
    ValueError
        For an unknown table.
    """
    check_name("table", table, TABLES)
    return _rows()[table]


def row(id: str) -> Row:
    """Return a row by its name among all tables, for example ``"I.cps"``."""
    known = {each.id: each for table in TABLES for each in rows(table)}
    check_name("row", id, known)
    return known[id]


# Columns of Fig. 7 and the rows whose predictions they show. Which patches stand behind "NaiveAug + Plabel" the paper
# does not say; we take random crops.
FIGURE_7 = {
    "HoVer-Net + Ours": "IV.hovernet-ours",
    "MRCNN + Ours": "IV.mrcnn-ours",
    "HoVer-Net": "IV.hovernet",
    "MRCNN": "IV.mrcnn",
    "NaiveAug + Plabel": "III.rndcrop-plabel",
    "pix2pix + MRCNN": "II.pix2pix",
}


def printed(file: str) -> list[dict[str, str]]:
    """Return the lines of one of the CSV files with the paper's printed numbers, as text; a dash is empty."""
    path = resources.files("nucseg") / "paper" / file
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@functools.cache
def _rows() -> dict[str, tuple[Row, ...]]:
    return {
        "I": _table_1(),
        "II": _table_2(),
        "III": _table_3(),
        "IV": _table_4(),
        "V": _table_5(),
        "VI": _table_6(),
    }


def _numbers(line: Mapping[str, str], **columns: str) -> Mapping[str, float]:
    """Take numbers out of a printed line: metric = column; a dash is left out."""
    return {metric: float(line[column]) for metric, column in columns.items() if line[column]}


def _by_method(file: str) -> dict[str, dict[str, str]]:
    return {line["method"]: line for line in printed(file)}


def _kumar(line: Mapping[str, str], **columns: str) -> Mapping[str, Mapping[str, float]]:
    return {"kumar": _numbers(line, aji="aji", dice="dice", **columns)}


def _table_1() -> tuple[Row, ...]:
    lines = _by_method("table1_patch_selection.csv")
    blocks = (
        (
            ("rndcrop", "RndCrop + MRCNN", "random-crop"),
            ("rndcencrop", "RndCenCrop + MRCNN", "random-centre-crop"),
            ("kmeans", "K-means + MRCNN", "kmeans"),
            ("cps-no-3rd", "CPS w/o 3rd term + MRCNN", "cps-no-3rd"),
            ("cps-no-2nd", "CPS w/o 2nd term + MRCNN", "cps-no-2nd"),
            ("cps", "CPS + MRCNN", "cps"),
        ),
        (
            ("kmeans-plabel", "K-means + MRCNN + Plabel", "kmeans"),
            ("cps-no-3rd-plabel", "CPS w/o 3rd term + MRCNN + Plabel", "cps-no-3rd"),
            ("cps-no-2nd-plabel", "CPS w/o 2nd term + MRCNN + Plabel", "cps-no-2nd"),
            ("cps-plabel", "CPS + MRCNN + Plabel", "cps"),
        ),
    )
    made = []
    for plabel, block in enumerate(blocks):
        reference = block[-1][0]
        for key, label, selection in block:
            spec = Spec(selection, "csingan", "maskrcnn", plabel=bool(plabel))
            compared = None if key == reference else reference
            made.append(Row("I", key, label, spec, _kumar(lines[label], p="p_value"), compared))
    return tuple(made)


def _table_2() -> tuple[Row, ...]:
    lines = _by_method("table2_augmentation.csv")
    names = (
        ("naive", "NaiveAug"),
        ("pix2pix", "pix2pix"),
        ("cyclegan", "cycleGAN"),
        ("singan", "SinGAN"),
        ("csingan-no-cwd", "CSinGAN(w/o CwD)"),
        ("csingan", "CSinGAN"),
    )
    return tuple(
        Row(
            "II",
            key,
            label,
            Spec("cps", key, "maskrcnn"),
            _kumar(lines[label], p="p_value"),
            None if key == "csingan" else "csingan",
        )
        for key, label in names
    )


def _table_3() -> tuple[Row, ...]:
    lines = _by_method("table3_framework_kumar.csv")
    crop, centre = "random-crop", "random-centre-crop"
    names = (
        ("rndcrop", "a).RndCrop + MRCNN", Spec(crop, "none", "maskrcnn")),
        ("rndcencrop", "b).RndCenCrop + MRCNN", Spec(centre, "none", "maskrcnn")),
        ("rndcrop-naive", "c).RndCrop + NaiveAug + MRCNN", Spec(crop, "naive", "maskrcnn")),
        ("rndcencrop-naive", "d).RndCenCrop + NaiveAug + MRCNN", Spec(centre, "naive", "maskrcnn")),
        ("rndcrop-plabel", "e).RndCrop + NaiveAug + MRCNN + Plabel", Spec(crop, "naive", "maskrcnn", plabel=True)),
        (
            "rndcencrop-plabel",
            "f).RndCenCrop + NaiveAug + MRCNN + Plabel",
            Spec(centre, "naive", "maskrcnn", plabel=True),
        ),
        ("ours", "Ours", Spec("cps", "csingan", "maskrcnn", plabel=True)),
        ("full", "Fully-supervised Mask-RCNN", Spec("all", "naive", "maskrcnn")),
    )
    return tuple(
        Row(
            "III",
            key,
            label,
            spec,
            _kumar(lines[label], aji_seen="aji_seen", aji_unseen="aji_unseen"),
            None if key == "ours" else "ours",
        )
        for key, label, spec in names
    )


def _table_4() -> tuple[Row, ...]:
    lines = _by_method("table4_main.csv")
    full = (
        ("mrcnn", "MRCNN", "maskrcnn"),
        ("dist", "DIST", "dist"),
        ("micronet", "Micro-Net", "micronet"),
        ("mdcnet", "MDC_NET", "mdcnet"),
        ("dpmsff", "DPMSFF", "dpmsff"),
        ("pffnet", "PFNET", "pffnet"),
        ("hovernet", "Hover-net", "hovernet"),
    )
    ours = (("mrcnn-ours", "MRCNN + Ours", "maskrcnn"), ("hovernet-ours", "Hover-net + Ours", "hovernet"))
    specs = [(key, label, Spec("all", "naive", segmenter)) for key, label, segmenter in full]
    specs += [(key, label, Spec("cps", "csingan", segmenter, plabel=True)) for key, label, segmenter in ours]
    made = []
    for key, label, spec in specs:
        paper = {
            name: _numbers(lines[label], aji=f"{name}_aji", dice=f"{name}_dice", p=f"{name}_p")
            for name in ("kumar", "tnbc", "monuseg")
        }
        reference = None if key == "hovernet-ours" else "hovernet-ours"
        made.append(Row("IV", key, label, spec, paper, reference))
    return tuple(made)


def _table_5() -> tuple[Row, ...]:
    lines = _by_method("table5_organs_kumar_aji.csv")
    names = (
        ("mrcnn-ours", "MRCNN+Ours"),
        ("mrcnn", "MRCNN"),
        ("hovernet-ours", "Hover-net+Ours"),
        ("hovernet", "Hover-net"),
    )
    specs = {row.key: row.spec for row in _table_4()}
    organs = {name: name for name in next(iter(lines.values())) if name != "method"}
    return tuple(Row("V", key, label, specs[key], {"kumar": _numbers(lines[label], **organs)}) for key, label in names)


def _table_6() -> tuple[Row, ...]:
    lines = {(line["k1"], line["k2"], line["csingan"]): line for line in printed("table6_hyperparams_kumar.csv")}
    made = []
    for name, values in (("K1", ("6", "9", "12")), ("K2", ("3", "4", "8"))):
        for step, value in enumerate(values):
            for csingan, how in (("0", "w/o CSinGAN"), ("1", "w/ CSinGAN")):
                line = lines[(value, "4", csingan) if name == "K1" else ("9", value, csingan)]
                spec = Spec(
                    "cps",
                    "csingan" if csingan == "1" else "naive",
                    "maskrcnn",
                    k1_step=step if name == "K1" else 1,
                    k2=int(value) if name == "K2" else None,
                )
                share = {"label_share": int(line["annos_pct"]) / 100}
                paper = {"kumar": {**_kumar(line)["kumar"], **share}}
                key = f"{name.lower()}-{value}" + ("-csingan" if csingan == "1" else "")
                made.append(Row("VI", key, f"{name} = {value} {how}", spec, paper))
    return tuple(made)
