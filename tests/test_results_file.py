"""One experiment after another lands in results.csv and runs.csv. All numbers here are made up."""

import multiprocessing
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from nucseg.results import RESULT_COLUMNS, RUN_COLUMNS, ResultsError, read_results, read_runs
from nucseg.results.file import add_results


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    return tmp_path


def frame(seed=1, aji=0.5, fingerprint="f1", run_id="r1", dataset="tissue", image_id="a"):
    row = dict.fromkeys(RESULT_COLUMNS, 0)
    row |= {"profile": "tiny", "dataset": dataset, "fingerprint": fingerprint, "selection": "cps", "seed": seed}
    row |= {"augmentation": "naive", "segmenter": "hoverlite", "encoder": "e", "supervision": "patches", "best": 1}
    row |= {"image_id": image_id, "organ": "o", "aji": aji, "run_id": run_id}
    return pd.DataFrame([row])


def lines(run_id="r1"):
    return pd.DataFrame([{"run_id": run_id, "started": "t", "seconds": 1.0, "device": "d", "versions": "v",
                          "peak_gpu_mb": None, "config": "{}"}])  # fmt: skip


def test_an_experiment_run_again_replaces_its_own_lines_only(place):
    add_results(frame(1, 0.5), lines())
    add_results(frame(2, 0.6, run_id="r2"), lines("r2"))
    add_results(frame(1, 0.7, run_id="r3"), lines("r3"))
    kept = read_results(place / "tables" / "tiny" / "results.csv")
    assert dict(zip(kept["seed"], kept["aji"], strict=True)) == {1: 0.7, 2: 0.6}
    assert set(read_runs(place / "tables" / "tiny" / "runs.csv")["run_id"]) == {"r2", "r3"}


def test_a_run_stays_known_while_one_line_comes_from_it(place):
    both = pd.concat([frame(1), frame(1, run_id="r2", image_id="b")], ignore_index=True)
    add_results(both, pd.concat([lines(), lines("r2")]))
    add_results(frame(2, run_id="r1", dataset="kumar"), lines())
    add_results(frame(1, run_id="r3"), lines("r3"))
    assert set(read_runs(place / "tables" / "tiny" / "runs.csv")["run_id"]) == {"r1", "r3"}


def test_results_on_other_data_are_put_aside_and_not_lost(place):
    add_results(frame(1, 0.5), lines())
    with pytest.warns(UserWarning, match="data of 'tissue' have changed; 1 older results moved"):
        add_results(frame(2, 0.6, "f2"), lines("r2"))
    folder = place / "tables" / "tiny"
    assert set(read_results(folder / "results.csv")["fingerprint"]) == {"f2"}
    assert set(read_results(folder / "results-tissue-f1.csv")["seed"]) == {1}


def test_the_order_of_adding_does_not_show_in_the_file(place):
    path = place / "tables" / "tiny" / "results.csv"
    files = set()
    for shuffle in range(3):
        path.unlink(missing_ok=True)
        seeds = [100, 21, 3, 1000]
        random.Random(shuffle).shuffle(seeds)
        for seed in seeds:
            add_results(frame(seed, seed / 1000, run_id=f"r{seed}"), lines(f"r{seed}"))
        files.add(path.read_bytes())
    assert len(files) == 1
    assert list(read_results(path)["seed"]) == [3, 21, 100, 1000]


def test_what_pandas_would_write_is_what_is_written(place):
    made = pd.concat([frame(image_id="a,b"), frame(image_id='say "c"', aji=0.1 + 0.2)], ignore_index=True)
    add_results(made, lines())
    add_results(frame(0), lines("r0"))
    path = place / "tables" / "tiny" / "results.csv"
    assert path.read_text() == pd.concat([frame(0), made]).to_csv(index=False)
    assert list(read_results(path)["image_id"]) == ["a", "a,b", 'say "c"']


@pytest.mark.parametrize("change", [{"aji": float("nan")}, {"aji": 1.5}, {"seen": -1}, {"n_true": 2.5}])
def test_an_impossible_number_does_not_get_in(place, change):
    with pytest.raises(ResultsError):
        add_results(frame().assign(**change), lines())
    with pytest.raises(ResultsError, match="more than once"):
        add_results(pd.concat([frame(), frame()]), lines())
    assert not (place / "tables" / "tiny" / "results.csv").exists()


def test_an_older_file_is_brought_up_to_date_and_a_broken_one_is_an_error(place):
    folder = place / "tables" / "tiny"
    folder.mkdir(parents=True)
    frame(1).drop(columns="label_nuclei").to_csv(folder / "results.csv", index=False)
    add_results(frame(2), lines())
    assert list(read_results(folder / "results.csv")["seed"]) == [1, 2]
    (folder / "results.csv").write_text("profile,dataset\nx,y\n")
    with pytest.raises(ResultsError, match="missing column"):
        add_results(frame(3), lines("r3"))


def test_results_put_aside_before_stay_there(place):
    add_results(frame(1, fingerprint="f1"), lines())
    for seed, version in ((2, "f2"), (3, "f1"), (4, "f2")):
        with pytest.warns(UserWarning, match="moved"):
            add_results(frame(seed, fingerprint=version), lines())
    assert list(read_results(place / "tables" / "tiny" / "results-tissue-f1.csv")["seed"]) == [1, 3]


def test_of_several_datasets_each_one_s_older_version_is_put_aside(place):
    add_results(frame(1, dataset="kumar"), lines())
    add_results(frame(1, dataset="tnbc"), lines())
    both = pd.concat([frame(2, dataset="kumar"), frame(2, fingerprint="f2", dataset="tnbc")], ignore_index=True)
    with pytest.warns(UserWarning, match="data of 'tnbc' have changed"):
        add_results(both, lines())
    kept = read_results(place / "tables" / "tiny" / "results.csv")
    assert sorted(zip(kept["dataset"], kept["seed"], strict=True)) == [("kumar", 1), ("kumar", 2), ("tnbc", 2)]


def test_what_a_killed_run_was_writing_is_cleared_away(place):
    folder = place / "tables" / "tiny"
    folder.mkdir(parents=True)
    (folder / ".results.csv.123.part").write_text("prof")
    add_results(frame(), lines())
    assert sorted(path.name for path in folder.iterdir()) == [".results.lock", "results.csv", "runs.csv"]


def test_a_run_killed_between_the_two_files_is_still_missing_in_results(place, monkeypatch):
    from nucseg.results import file as results_file

    def stop(path, *_):
        if path.name == "results.csv":
            raise KeyboardInterrupt
        write(path, *_)

    write = results_file._write
    monkeypatch.setattr(results_file, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        add_results(frame(), lines())
    assert sorted(path.name for path in (place / "tables" / "tiny").glob("*.csv")) == ["runs.csv"]


def test_runs_are_kept_once_each_in_the_order_of_their_coming(place):
    for seed, run_id in ((2, "r2"), (1, "r1"), (2, "r2")):
        add_results(frame(seed, run_id=run_id), lines(run_id))
    runs = read_runs(place / "tables" / "tiny" / "runs.csv")
    assert list(runs["run_id"]) == ["r1", "r2"]
    assert tuple(runs.columns) == RUN_COLUMNS


def _add_many(seeds):
    for seed in seeds:
        add_results(frame(seed, run_id=f"r{seed}"), lines(f"r{seed}"))


def test_processes_that_add_at_the_same_time_lose_nothing(place):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_many, args=(range(i, 40, 2),)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert list(read_results(place / "tables" / "tiny" / "results.csv")["seed"]) == list(range(40))
    assert len(read_runs(place / "tables" / "tiny" / "runs.csv")) == 40


def test_names_beyond_ascii_are_kept_whatever_the_locale(tmp_path):
    script = """
        import sys
        sys.path.insert(0, "tests")
        from test_results_file import frame, lines
        from nucseg.results.file import add_results
        for seed in (1, 2):
            add_results(frame(seed, run_id=f"r{seed}").assign(organ="Pr\\u00e4putium"), lines(f"r{seed}"))
    """
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "NUCSEG_HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **plain},
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    (path,) = tmp_path.glob("tables/*/results.csv")
    assert set(read_results(path)["organ"]) == {"Präputium"}
