"""Results files are read strictly and merged with care. All numbers here are made up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nucseg.results import (
    RESULT_COLUMNS,
    RUN_COLUMNS,
    ResultsError,
    check_results,
    empty_results,
    merge_results,
    read_results,
    read_runs,
)


def made_up(seed=1, images=("01", "02"), **changes):
    lines = []
    for number, image in enumerate(images):
        line = {
            **{"profile": "sample", "dataset": "tissue", "fingerprint": "f1", "selection": "cps", "k1": 3, "k2": 4},
            **{"augmentation": "naive", "segmenter": "hoverlite", "encoder": "lite0", "rounds": 0, "seed": seed},
            **{"supervision": "patches", "round": 0, "best": 1, "image_id": image, "organ": "NA", "seen": 1},
            **dict.fromkeys(("dice", "aji", "aji_plus", "dq", "sq", "pq", "f1"), 0.25 + 0.125 * number),
            **{"label_share": 0.05, "label_nuclei": 120, "n_true": 10, "n_pred": 9, "run_id": "00000000"},
        }
        lines.append({**line, **changes})
    return pd.DataFrame(lines)


def test_results_survive_a_file_with_their_names_as_text(tmp_path):
    made_up().to_csv(tmp_path / "results.csv", index=False)
    found = read_results(tmp_path / "results.csv")
    assert list(found.columns) == list(RESULT_COLUMNS)
    assert list(found["image_id"]) == ["01", "02"]  # not 1 and 2
    assert list(found["organ"]) == ["NA", "NA"]  # not a missing value
    assert list(found["run_id"]) == ["00000000"] * 2
    assert found["seed"].dtype == np.int64


def test_columns_are_strict():
    with pytest.raises(ResultsError, match=r"here: missing column\(s\) pq, run_id"):
        check_results(made_up().drop(columns=["pq", "run_id"]), "here")
    with pytest.raises(ResultsError, match="unknown column 'ajii'; did you mean 'aji'"):
        check_results(made_up().assign(ajii=1.0))


@pytest.mark.parametrize(("name", "value"), [("aji", np.nan), ("dice", 1.2), ("seed", -1), ("k1", 2.5), ("pq", "x")])
def test_an_impossible_number_is_an_error_that_names_the_image_and_the_run(name, value):
    with pytest.raises(ResultsError, match=f"{name} is .* for image 01, run 00000000"):
        check_results(made_up(**{name: value}))


def test_nuclei_may_be_uncounted_and_stay_so_through_a_file(tmp_path):
    old = made_up(1).drop(columns="label_nuclei")
    merged = merge_results([old, made_up(2), made_up(3, label_nuclei="")])
    assert merged["label_nuclei"].isna().tolist() == [True, True, False, False, True, True]
    merged.to_csv(tmp_path / "results.csv", index=False)
    text = (tmp_path / "results.csv").read_text().splitlines()
    assert ",0.05,,0.25," in text[1]  # empty, not 0
    assert ",0.05,120,0.25," in text[3]  # and no 120.0
    pd.testing.assert_frame_equal(read_results(tmp_path / "results.csv"), merged)


@pytest.mark.parametrize("value", ["many", -1, 2.5])
def test_an_impossible_count_of_nuclei_is_an_error(value):
    with pytest.raises(ResultsError, match=r"label_nuclei is .* for image 01, run 00000000"):
        check_results(made_up(label_nuclei=value))


def test_merging_is_concatenation():
    found = merge_results([made_up(1), made_up(2), empty_results()])
    assert len(found) == 4
    assert sorted(found["seed"].unique()) == [1, 2]
    assert list(merge_results([]).columns) == list(RESULT_COLUMNS)


def test_merging_refuses_a_result_that_is_there_twice_and_names_it():
    with pytest.raises(ResultsError, match=r"1 result\(s\) occur more than once: .*seed=2.*round=0"):
        merge_results([made_up(1), made_up(2), made_up(2, run_id="11111111")])
    # Another round, encoder or profile of the same experiment is another result.
    assert len(merge_results([made_up(1), made_up(1, round=1), made_up(1, encoder="b"), made_up(1, profile="c")])) == 8


def test_merging_refuses_two_versions_of_one_dataset():
    with pytest.raises(ResultsError, match="tissue in different versions, fingerprints f1, f2"):
        merge_results([made_up(1), made_up(2, fingerprint="f2")])
    assert len(merge_results([made_up(1), made_up(1, dataset="tnbc", fingerprint="f2")])) == 4


def test_the_given_frame_is_left_alone():
    frame = made_up(seen=True)
    check_results(frame)
    assert frame["seen"].dtype == bool


def test_runs_are_read_strictly_and_a_cpu_has_no_gpu_memory(tmp_path):
    line = dict(zip(RUN_COLUMNS, ["00000001", "2026-01-01", 12.5, "2 CPU cores", "torch 2", None, "{}"], strict=True))
    pd.DataFrame([line]).to_csv(tmp_path / "runs.csv", index=False)
    found = read_runs(tmp_path / "runs.csv")
    assert found.loc[0, "run_id"] == "00000001"
    assert np.isnan(found.loc[0, "peak_gpu_mb"])
    pd.DataFrame([line]).drop(columns="config").to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(ResultsError, match=r"missing column\(s\) config"):
        read_runs(tmp_path / "runs.csv")


@pytest.mark.parametrize("read", [read_results, read_runs])
@pytest.mark.parametrize("content", [b"", b'run_id,config\n1,"cut he', b"\xff\xfe\x00"])
def test_a_file_that_is_no_table_is_named_and_copied_again(tmp_path, read, content):
    path = tmp_path / "some.csv"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"some\.csv: not a table \(.*\); copy it again"):
        read(path)
