"""Results of other machines: equal ones are skipped, other ones refused, and a file of strangers changes nothing."""

from __future__ import annotations

import io
import json
import stat
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nucseg.results import RESULT_COLUMNS, RUN_COLUMNS, ResultsError, read_results, read_runs
from nucseg.results import add as results_add
from nucseg.results.add import add


def made_up(seed=1, aji=(0.5, 0.25), **changes):
    """One experiment on two images; the numbers mean nothing."""
    known = {
        **{"profile": "tiny", "dataset": "tissue", "fingerprint": "f1", "selection": "cps", "k1": 3, "k2": 4},
        **{"augmentation": "naive", "segmenter": "hoverlite", "encoder": "lite0", "rounds": 0, "seed": seed},
        **{"supervision": "patches", "round": 0, "best": 1, "organ": "NA", "seen": 1, "label_share": 0.05},
        **dict.fromkeys(("dice", "aji_plus", "dq", "sq", "pq", "f1"), 0.1 + 0.2),
        **{"label_nuclei": 7, "n_true": 10, "n_pred": 9, "run_id": f"{seed:08}", **changes},
    }
    lines = [{**known, "image_id": f"0{i}", "aji": value} for i, value in enumerate(aji)]
    return pd.DataFrame(lines)[list(RESULT_COLUMNS)]


def runs_of(results):
    about = {
        "started": "2026-11-22",
        "seconds": 3.5,
        "device": "d",
        "versions": "v",
        "peak_gpu_mb": 10.0,
        "config": "{}",
    }
    return pd.DataFrame([{"run_id": run_id, **about} for run_id in results["run_id"].unique()])[list(RUN_COLUMNS)]


def folder_of(path, *frames):
    results = pd.concat(frames)
    path.mkdir(exist_ok=True)
    results.to_csv(path / "results.csv", index=False)
    runs_of(results).to_csv(path / "runs.csv", index=False)
    return path


def members_of(*frames, profile="tiny"):
    results = pd.concat(frames)
    tables = {"results.csv": results, "runs.csv": runs_of(results)}
    return {f"{profile}/{name}": frame.to_csv(index=False) for name, frame in tables.items()}


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def files_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".results.lock"}


def test_a_zip_and_a_plain_folder_bring_the_same_numbers(tmp_path, home, monkeypatch):
    [added] = add([zip_of(tmp_path / "a.zip", members_of(made_up(1), made_up(2)))])
    assert (added.profile, added.new, added.equal, added.replaced) == ("tiny", 2, 0, 0)
    from_zip = files_under(home)
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / "other"))
    add([folder_of(tmp_path / "folder", made_up(1), made_up(2))])
    assert list(files_under(tmp_path / "other").values()) == list(from_zip.values())
    found = read_results(home / "tables" / "tiny" / "results.csv")
    assert sorted(found["aji"]) == [0.25, 0.25, 0.5, 0.5]
    assert set(read_runs(home / "tables" / "tiny" / "runs.csv")["run_id"]) == {"00000001", "00000002"}


def test_equal_experiments_are_skipped_and_counted_whatever_their_run_ids(tmp_path, home):
    add([folder_of(tmp_path / "a", made_up(1), made_up(2))])
    before = files_under(home)
    again = made_up(1, aji=(0.5 + 1e-15, 0.25), run_id="ffffffff", label_nuclei="")
    [added] = add([folder_of(tmp_path / "b", again)])
    assert (added.new, added.equal, added.replaced) == (0, 1, 0)
    assert files_under(home) == before
    [added] = add([folder_of(tmp_path / "c", again, made_up(3))])
    assert (added.new, added.equal, added.replaced) == (1, 1, 0)


def test_other_numbers_for_one_experiment_are_named_and_taken_only_on_request(tmp_path, home):
    add([folder_of(tmp_path / "a", made_up(1), made_up(2))])
    before = files_under(home)
    other = folder_of(tmp_path / "b", made_up(2, aji=(0.5, 0.75), run_id="new"), made_up(3))
    with pytest.raises(ResultsError, match=r"seed=2.*: aji of 01, round 0: 0\.25 here, 0\.75 there\n.*--replace"):
        add([other])
    assert files_under(home) == before
    [added] = add([other], replace_other=True)
    assert (added.new, added.equal, added.replaced) == (1, 0, 1)
    found = read_results(home / "tables" / "tiny" / "results.csv").set_index(["seed", "image_id"])["aji"]
    assert found[2].to_dict() == {"00": 0.5, "01": 0.75}
    assert found[1].to_dict() == found[3].to_dict() == {"00": 0.5, "01": 0.25}


def test_results_of_other_schedules_are_added_with_a_word(tmp_path):
    for name, seed, iterations in (("a", 1, 200), ("b", 2, 400), ("c", 3, 400)):
        folder = folder_of(tmp_path / name, made_up(seed))
        model = {"segmenter": ["hoverlite", {}, "lite0"], "training": [{"iterations": iterations}, None, {}]}
        runs = read_runs(folder / "runs.csv").assign(config=json.dumps({"model": model}))
        runs.to_csv(folder / "runs.csv", index=False)
        [added] = add([folder])
        assert ("iterations" in added.describe()) == (name != "a")
    assert added.other_settings == ("hoverlite.training.iterations 200 in 1 run(s), 400 in 2 run(s)",)
    [added] = add([folder])
    assert not added.other_settings, "nothing was added"


def test_an_experiment_with_other_images_or_another_best_round_is_not_the_same(tmp_path):
    add([folder_of(tmp_path / "a", made_up(1))])
    with pytest.raises(ResultsError, match="2 lines here, 3 there"):
        add([folder_of(tmp_path / "b", made_up(1, aji=(0.5, 0.25, 0.1)))])
    with pytest.raises(ResultsError, match="best of 00, round 0: 1 here, 0 there"):
        add([folder_of(tmp_path / "c", made_up(1, best=0))])


def test_results_on_other_data_are_refused_even_with_replace(tmp_path, home):
    add([folder_of(tmp_path / "a", made_up(1))])
    before = files_under(home)
    with pytest.raises(ResultsError, match=r"another version of tissue: fingerprint f2, but f1 in tables/tiny"):
        add([folder_of(tmp_path / "b", made_up(2, fingerprint="f2"))], replace_other=True)
    assert files_under(home) == before


def test_either_all_files_are_added_or_none(tmp_path, home):
    good = folder_of(tmp_path / "good", made_up(1))
    clash = folder_of(tmp_path / "clash", made_up(1, aji=(0.1, 0.2)))
    with pytest.raises(ResultsError, match=r"clash: 1 experiment\(s\) of tiny have other numbers"):
        add([good, clash])  # not with each other either
    with pytest.raises(FileNotFoundError, match=r"none\.zip"):
        add([good, tmp_path / "none.zip"])
    assert not files_under(home)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.json", "/tmp/outside.json", "tiny/../../outside.json", "tiny\\..\\outside.json", "C:/x/results.csv",
        "tiny/stages/../x.json", "tiny/.hidden/results.csv", "tiny/stages/model/k.pkl", "tiny/predictions.npz",
        "tiny/examples/a/b/", "results.csv", "tiny/failed/.json",
    ],
)  # fmt: skip
def test_a_member_that_we_would_not_write_refuses_the_whole_file(tmp_path, home, name):
    path = zip_of(tmp_path / "a.zip", {**members_of(made_up(1)), name: "{}"})
    before = files_under(tmp_path)
    with pytest.raises(ResultsError, match="not a file of 'nucseg results pack'"):
        add([path])
    assert files_under(tmp_path) == before


def test_links_duplicates_bombs_and_damaged_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        link = zipfile.ZipInfo("tiny/failed/link.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(ResultsError, match=r"it holds 'tiny/failed/link\.json'"):
        add([path])
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("tiny/failed/a.json", "{}")
        with pytest.warns(UserWarning, match="Duplicate name"):
            zipped.writestr("tiny/failed/a.json", "{}")
    with pytest.raises(ResultsError, match=r"a\.json"):
        add([path])
    zip_of(path, members_of(made_up(1)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ResultsError, match="damaged or not a zip"):
        add([path])
    zip_of(path, {**members_of(made_up(1)), "tiny/failed/a.json": "{"})
    with pytest.raises(ResultsError, match=r"tiny/failed/a\.json is damaged"):
        add([path])
    zip_of(path, {**members_of(made_up(1)), "tiny/examples/a/b/c.png": b"\x89PNG no"})
    with pytest.raises(ResultsError, match=r"c\.png is damaged"):
        add([path])
    monkeypatch.setattr(results_add, "LARGEST", 100)
    with pytest.raises(ResultsError, match="would unpack to more than"):
        add([zip_of(path, members_of(made_up(1)))])


def test_tables_that_do_not_fit_together_are_refused(tmp_path):
    members = members_of(made_up(1))
    path = tmp_path / "a.zip"
    with pytest.raises(ResultsError, match=r"results\.csv without runs\.csv"):
        add([zip_of(path, {"tiny/results.csv": members["tiny/results.csv"]})])
    with pytest.raises(ResultsError, match="results of profile"):
        add([zip_of(path, members_of(made_up(1), profile="other"))])
    other_runs = members_of(made_up(2))["tiny/runs.csv"]
    with pytest.raises(ResultsError, match=r"runs\.csv does not describe run 00000001"):
        add([zip_of(path, {**members, "tiny/runs.csv": other_runs})])
    with pytest.raises(ResultsError, match=r"a\.zip: results\.csv: aji is 2"):
        add([zip_of(path, members_of(made_up(1, aji=(2.0, 0.5))))])
    with pytest.raises(ResultsError, match=r"a\.zip: results\.csv: not a table"):
        add([zip_of(path, {**members, "tiny/results.csv": b"\xff\xfe\x00"})])


def test_a_folder_with_something_else_in_its_tables_is_refused(tmp_path):
    folder = folder_of(tmp_path / "a", made_up(1))
    (folder / "runs.csv").write_bytes(b"")
    with pytest.raises(ResultsError, match=r"a/runs\.csv: not a table \(.*; copy it again"):
        add([folder])
    (folder / "runs.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"runs\.csv"):
        add([folder])


def test_what_a_file_holds_beside_numbers_is_kept_out_of_version_control(tmp_path, home):
    picture = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(picture, "png")
    more = {"tiny/failed/a.json": "{}", "tiny/examples/tissue/00/image.png": picture.getvalue()}
    [added] = add([zip_of(tmp_path / "a.zip", {**members_of(made_up(1)), **more})])
    assert added.received.is_relative_to(home / "runs" / "tiny")
    assert (added.received / "examples" / "tissue" / "00" / "image.png").read_bytes() == picture.getvalue()
    assert {path.name for path in files_under(home / "tables")} == {"results.csv", "runs.csv"}


def test_failures_alone_can_be_added(tmp_path, home):
    [added] = add([zip_of(tmp_path / "a.zip", {"tiny/failed/a.json": "{}"})])
    assert (added.new, added.equal, added.replaced) == (0, 0, 0)
    assert (added.received / "failed" / "a.json").is_file()
    assert not (home / "tables").exists()
