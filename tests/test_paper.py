"""The rows of Tables I-VI as data, and the printed numbers that stand in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nucseg import gan, models
from nucseg.paper import TABLES, printed, rows
from nucseg.selection import STRATEGIES

ROOT = Path(__file__).parent.parent
ROWS = [row for table in TABLES for row in rows(table)]
BY_ID = {row.id: row for row in ROWS}


def test_every_table_has_the_rows_that_the_paper_prints():
    assert {table: len(rows(table)) for table in TABLES} == {"I": 10, "II": 6, "III": 8, "IV": 9, "V": 4, "VI": 12}


def test_row_ids_are_unique_slugs_and_their_specs_use_known_names():
    assert len(BY_ID) == len(ROWS)
    for row in ROWS:
        assert row.key == row.key.lower()
        assert " " not in row.key
        assert row.spec.selection in {*STRATEGIES, "all"}
        assert row.spec.augmentation in {*gan.REGISTRY, "naive", "none"}
        assert row.spec.segmenter in models.REGISTRY


@pytest.mark.parametrize(
    ("row", "dataset", "metric", "value"),
    [
        ("I.rndcrop", "kumar", "p", 9.76e-23),
        ("I.cps-plabel", "kumar", "aji", 0.5374),
        ("II.csingan-no-cwd", "kumar", "dice", 0.6882),
        ("III.rndcrop-naive", "kumar", "aji_unseen", 0.4481),
        ("IV.hovernet", "monuseg", "p", 5.73e-35),
        ("IV.pffnet", "tnbc", "dice", 0.8127),
        ("V.hovernet", "kumar", "stomach", 0.7158),
        ("VI.k1-6-csingan", "kumar", "dice", 0.6728),
        ("VI.k2-8", "kumar", "aji", 0.4340),
    ],
)
def test_printed_numbers_stand_in_the_row_that_the_paper_prints_them_in(row, dataset, metric, value):
    assert BY_ID[row].paper[dataset][metric] == value


def test_every_printed_aji_of_every_file_is_in_some_row():
    wanted = sorted(float(line["aji"]) for n in ("1_patch_selection", "2_augmentation", "3_framework_kumar",
                    "6_hyperparams_kumar") for line in printed(f"table{n}.csv"))  # fmt: skip
    found = sorted(row.paper["kumar"]["aji"] for row in ROWS if row.table in ("I", "II", "III", "VI"))
    assert found == wanted


def test_a_dash_of_the_paper_is_no_number():
    assert "p" not in BY_ID["I.cps"].paper["kumar"]
    assert BY_ID["IV.mdcnet"].paper["monuseg"] == {}


def test_references_are_the_row_that_the_printed_p_value_compares_with():
    assert {row.reference for row in rows("I")[:5]} == {"cps"}
    assert {row.reference for row in rows("I")[6:9]} == {"cps-plabel"}
    assert {row.reference for row in rows("II")} == {"csingan", None}
    assert {row.reference for row in rows("III")} == {"ours", None}
    assert {row.reference for row in rows("IV")} == {"hovernet-ours", None}
    for row in ROWS:
        assert row.reference is None or f"{row.table}.{row.reference}" in BY_ID
        assert row.reference != row.key


def test_only_the_first_two_rows_of_table_3_are_without_augmentation():
    assert [row.id for row in ROWS if row.spec.augmentation == "none"] == ["III.rndcrop", "III.rndcencrop"]


def test_an_unknown_table_is_an_error_that_names_the_tables():
    with pytest.raises(ValueError, match="table: unknown name 'X'; valid names: I, II, III, IV, V, VI"):
        rows("X")


def test_every_fact_and_resolution_that_the_code_cites_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^##+ ([\d.]+\d|\d)\.? ", reference, re.MULTILINE))
    known |= {
        number for line in re.findall(r"^\| (A[\d, A]+) \|", reference, re.MULTILINE) for number in line.split(", ")
    }
    cited = set()
    for path in (ROOT / "nucseg").rglob("*.py"):
        text = " ".join(path.read_text(encoding="utf-8").split())
        cited |= set(re.findall(r"REFERENCE,? \(?(?:sections? )?(A\d+|\d(?:\.\d)?)", text))
        cited |= {f"A{n}" for n in re.findall(r"[(,;] ?A(\d{1,2})(?=[),:;])", text)}
    assert len(cited) > 40
    assert not cited - known
