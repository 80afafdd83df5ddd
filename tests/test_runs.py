import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from small import TINY, no_op_plan, small_data, small_profile

from nucseg.results import read_results, read_runs
from nucseg.runs.backends import BackendError
from nucseg.runs.gpu_memory import Gpu
from nucseg.runs.plan import Plan
from nucseg.runs.running import Ticket, failure_file, probe, run_one, running_file, work_on
from nucseg.store import Store, claimed


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return small_profile(folder / "small.yaml"), small_data(folder / "tiny")


@pytest.fixture
def no_op(place):
    """A function that makes a plan of so many experiments that cost nothing."""

    def make(count):
        seeds = str(list(range(1, count + 1)))
        profile = small_profile(place / "noop.yaml", "{III: [rndcrop-naive]}", random_seeds=seeds)
        return no_op_plan(profile, small_data(place / "tiny"))

    return make


@pytest.mark.usefixtures("place")
def test_a_failure_that_takes_the_gpu_with_it_ends_the_run_and_not_all_experiments_after_it(monkeypatch):
    plan = Plan(TINY, device="cpu")
    plan.pipeline.device = torch.device("cuda")

    def broken(*_):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr("nucseg.runs.running._measure", broken)
    monkeypatch.setattr("nucseg.runs.gpu_memory.usable", lambda _: False)
    with pytest.raises(BackendError, match=r"took this process's GPU with it; .*json says how. .* start again"):
        plan.run()
    assert list(plan.states().values()).count("failed") == 1


@pytest.mark.usefixtures("place")
def test_a_failed_experiment_keeps_its_traceback_and_waits_to_be_asked_again(monkeypatch):
    plan = Plan(TINY, device="cpu")
    tried = []

    def broken(self, experiment):
        tried.append(experiment)
        raise RuntimeError("out of luck")

    monkeypatch.setattr("nucseg.pipeline.Pipeline.run", broken)
    assert set(plan.run()) == set(plan.experiments)
    record = json.loads(failure_file(plan.pipeline, plan.experiments[0]).read_text())
    assert "out of luck" in record["traceback"]
    assert "why it failed" in plan.describe()
    count = len(tried)
    plan.run()
    assert len(tried) == count
    plan.run(retry=True)
    assert len(tried) == 2 * count


def test_results_that_came_from_elsewhere_are_measured_anew_on_request(no_op):
    plan = no_op(2)
    plan.run()
    measured = plan.results_file.read_bytes()
    elsewhere = read_results(plan.results_file)
    elsewhere["aji"] = 0.123
    elsewhere.to_csv(plan.results_file, index=False)
    plan.run()
    assert (read_results(plan.results_file)["aji"] == 0.123).all()
    plan.run(again=True)
    assert plan.results_file.read_bytes() == measured


def test_a_rerun_that_fails_says_so_and_leaves_the_older_results(no_op, monkeypatch):
    plan = no_op(1)
    plan.run()
    measured = plan.results_file.read_bytes()

    def broken(self, experiment):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("nucseg.pipeline.Pipeline.run", broken)
    assert plan.run(again=True) == list(plan.experiments)
    assert plan.results_file.read_bytes() == measured
    assert "why it failed" in plan.describe()


# -- results do not depend on how they were run ----------------------------------------------------------------


def test_two_hundred_experiments_lose_nothing_in_one_process_or_two(no_op):
    plan, files = no_op(200), set()
    for jobs in (1, 2):
        plan.results_file.unlink(missing_ok=True)
        assert plan.run(jobs) == []
        rows = read_results(plan.results_file)
        assert len(rows) == 200 * 14
        assert list(rows["seed"].drop_duplicates()) == list(range(1, 201))
        assert len(read_runs(plan.results_file.with_name("runs.csv"))) == 200
        assert set(plan.states().values()) == {"done"}
        files.add(plan.results_file.read_bytes())
    assert len(files) == 1


def test_stopping_at_stages_gives_the_results_of_one_go(small, tmp_path, monkeypatch):
    files = {}
    for name, minutes in (("whole", 0), ("cut", 0.1 / 60)):
        monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / name))
        plan = Plan(small[0], str(small[1]), device="cpu")
        calls, stages = 0, [0]
        while "missing" in plan.states().values():
            assert plan.run(minutes=minutes) == []
            stages.append(len(list(plan.pipeline.store.root.glob("*/*/meta.json"))))
            calls += 1
            assert calls < 50
        files[name] = plan.results_file.read_bytes()
        assert not list(plan.pipeline.store.root.glob("failed/*"))
    assert calls > 3
    assert stages == sorted(stages)  # what was made is kept
    assert files["cut"] == files["whole"]


@pytest.mark.usefixtures("place")
def test_when_the_time_is_up_no_process_begins_a_stage_and_nothing_has_failed(small):
    plan = Plan(small[0], str(small[1]), device="cpu")
    assert plan.run(jobs=2, minutes=1e-9) == []
    assert set(plan.states().values()) == {"missing"}
    assert not list(plan.pipeline.store.root.glob("*/*/meta.json"))


KILLED = """
    import json, os, random, signal, sys, time
    import torch
    from pathlib import Path
    from nucseg.runs.plan import Plan
    from nucseg.store import Store

    torch.set_num_threads(1)
    profile, data, place = sys.argv[1:]
    log = Path(place) / "begun.log"
    make_result = Store.get

    def get(self, stage, config, make, inputs=(), code=()):
        def logged(folder):
            with open(log, "a") as file:
                file.write(f"{stage}/{folder.name.split('.')[1]}\\n")
            return make(folder)
        return make_result(self, stage, config, logged, inputs, code)

    Store.get = get

    def start(home):  # a fork, because importing everything takes longer than the run
        child = os.fork()
        if not child:
            os.environ["NUCSEG_HOME"] = str(home)
            os._exit(bool(Plan(profile, data, device="cpu").run()))
        return child

    def finished(home):
        return sorted(f"{p.parent.parent.name}/{p.parent.name}" for p in Path(home).glob("runs/*/*/[!.]*/meta.json"))

    begin = time.monotonic()
    assert os.waitpid(start(Path(place) / "whole"), 0)[1] == 0
    seconds = time.monotonic() - begin
    log.unlink()

    dice, attempts = random.Random(), []
    while True:
        child = start(Path(place) / "cut")
        # Later and later, so that it comes to an end however slow this machine is.
        end = time.monotonic() + seconds * dice.uniform(0, 0.1 + 0.1 * len(attempts))
        status = 0
        while time.monotonic() < end and not (ended := os.waitpid(child, os.WNOHANG))[0]:
            time.sleep(0.002)
        if killed := not (time.monotonic() < end):
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(ended[1])
        begun = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        attempts.append({"killed": killed, "begun": begun, "finished": finished(Path(place) / "cut")})
        table = next(Path(place).glob("cut/tables/*/results.csv"), None)
        attempts[-1]["rows"] = table.read_text() if table else ""
        if not killed:
            assert ended[1] == 0
            break
    print(json.dumps(attempts))
"""


def test_a_run_killed_again_and_again_repeats_only_the_stage_in_hand(small, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(small[0]), str(small[1]), str(tmp_path)]
    quiet = {**__import__("os").environ, "NUCSEG_QUIET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=quiet, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    attempts = json.loads(done.stdout)
    assert sum(attempt["killed"] for attempt in attempts) >= 3

    before, in_hand = set(), []
    for attempt in attempts:
        begun, finished = attempt["begun"], set(attempt["finished"])
        assert before <= finished, "a finished stage was lost"
        assert not before & set(begun), "a finished stage was made again"
        assert len(begun) == len(set(begun))
        lost = set(begun) - finished
        assert len(lost) <= attempt["killed"], "more than the stage in hand was lost"
        in_hand += lost
        before = finished
        if attempt["rows"]:  # whole experiments or nothing
            (tmp_path / "seen.csv").write_text(attempt["rows"])
            seen = read_results(tmp_path / "seen.csv")
            assert set(seen.groupby(["selection", "rounds"])["image_id"].nunique()) == {1}
            assert attempt["rows"].endswith("\n")
    assert in_hand, "no kill met a stage"

    cut, whole = tmp_path / "cut", tmp_path / "whole"

    def files(home):
        """Everything but locks and records of who was running; contents where they hold no times."""
        found = [p for p in home.rglob("*") if p.is_file() and p.suffix != ".lock" and p.parent.name != "running"]
        timeless = {"results.csv", "metrics.csv", "selection.json", "curve.json", "model.safetensors"}
        return {str(p.relative_to(home)): p.read_bytes() if p.name in timeless else b"" for p in found}

    assert files(cut) == files(whole)
    ids = [set(read_runs(next(home.glob("tables/*/runs.csv")))["run_id"]) for home in (cut, whole)]
    assert ids[0] == ids[1]


# -- several at once -------------------------------------------------------------------------------------------


def test_an_experiment_that_another_process_holds_is_left_to_it(no_op):
    plan = no_op(2)
    held, other = plan.experiments
    me = json.dumps({"host": "far", "pid": 7, "since": "2026-01-01T00:00:00+00:00"})
    with claimed(running_file(plan.pipeline, held), me):
        assert plan.states() == {held: "running", other: "missing"}
        assert "on far, process 7, since 2026-01-01T00:00:00+00:00" in plan.describe()
        assert run_one(plan.pipeline, held) == "running"
        plan.run()
        assert plan.states() == {held: "running", other: "done"}
    assert plan.states() == {held: "missing", other: "done"}
    assert run_one(plan.pipeline, held) == "done"


def test_what_fails_in_one_process_is_not_tried_by_another_of_the_same_time(no_op, monkeypatch):
    plan = no_op(1)
    (experiment,) = plan.experiments
    tried = []

    def broken(self, experiment):
        tried.append(experiment)
        raise RuntimeError("out of luck")

    monkeypatch.setattr("nucseg.pipeline.Pipeline.run", broken)
    since = time.time() - 1
    assert run_one(plan.pipeline, experiment, since) == "failed"
    assert run_one(plan.pipeline, experiment, since) == "failed"
    assert len(tried) == 1
    assert run_one(plan.pipeline, experiment, time.time() + 1) == "failed"
    assert len(tried) == 2


@pytest.mark.parametrize("too_large", [False, True])
def test_on_a_gpu_out_of_memory_is_tried_again_before_it_is_a_failure(no_op, place, monkeypatch, too_large):
    plan = no_op(1)
    (experiment,) = plan.experiments
    rows, runs, tries = plan.pipeline.run(experiment), plan.pipeline.runs(experiment), []

    def full(self, experiment):
        tries.append(experiment)
        if too_large or len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    monkeypatch.setattr("nucseg.pipeline.Pipeline.run", full)
    monkeypatch.setattr("nucseg.pipeline.Pipeline.runs", lambda self, e: runs)
    made_up = lambda device, folder: Gpu(folder / "made-up", lambda: (8e4, 8e4))  # noqa: E731
    monkeypatch.setattr("nucseg.runs.gpu_memory.gpu", made_up)
    monkeypatch.setattr("nucseg.runs.gpu_memory.usable", lambda _: True)
    plan.pipeline.device = torch.device("cuda")
    assert run_one(plan.pipeline, experiment) == ("failed" if too_large else "done")
    assert len(tries) == 2
    assert (place / "runs" / ".gpu" / "made-up").is_dir()


@pytest.fixture
def ticket(no_op):
    plan = no_op(1)
    with plan._ticket(float("inf"), 0.0, 1) as ticket:
        yield plan, ticket


def changed(ticket, **changes):
    return Ticket(**{**ticket.__dict__, **changes})


def test_a_worker_finds_everything_by_its_ticket(ticket, monkeypatch, tmp_path):
    plan, given = ticket
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.chdir("/")
    assert all(Path(path).is_absolute() for path in (*given.arguments[:3], given.home, given.token))
    assert probe(given) == ""
    assert work_on(given, plan.experiments[0]) == "done"
    assert (tmp_path / "tables" / "noop" / "results.csv").is_file()


def test_a_worker_that_cannot_give_the_same_results_says_why(ticket):
    plan, given = ticket
    assert "set NUCSEG_HOME to a folder on a file system that every machine mounts" in probe(
        changed(given, token="/not/mounted/here")
    )
    assert "another version of the data" in probe(changed(given, fingerprint="0"))
    assert "install the same" in probe(changed(given, version="0.0.1"))
    assert "no profile" in probe(changed(given, arguments=("smaple", *given.arguments[1:])))
    with pytest.raises(BackendError, match="does not see the results folder"):
        work_on(changed(given, token="/not/mounted/here"), plan.experiments[0])


def test_cluster_options_are_checked_before_anything_runs(no_op):
    plan = no_op(1)
    with pytest.raises(BackendError, match="add --backend"):
        plan.run(address="tcp://there:1")
    assert set(plan.states().values()) == {"missing"}


# -- minutes to go ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("place")
def test_what_is_to_go_is_counted_by_stages_that_experiments_share(small):
    plan = Plan(small[0], str(small[1]), device="cpu")
    to_go = plan.to_go()
    # rndcrop: 1; ours: 1 and a round more; full: 1. One random selection; CSinGAN with the selection before it.
    assert len(to_go.trainings) == 4
    assert sorted(e.selection for e in to_go.shared) == ["cps", "random-crop"]
    crop = next(e for e in plan.experiments if e.selection == "random-crop")
    plan.pipeline.selected(crop)
    assert [e.selection for e in plan.to_go().shared] == ["cps"]
    assert not list(Store(plan.pipeline.store.root).results("model")), "looking must not make anything"
    assert "no estimate for hoverlite" in plan.describe()


def test_results_of_other_settings_are_named_in_the_status(no_op, place):
    plan = no_op(2)
    plan.run()
    assert "other settings" not in plan.describe()
    profile = place / "noop.yaml"
    profile.write_text(profile.read_text().replace("iterations: 3", "iterations: 4"))
    changed = Plan(profile, str(place / "tiny"), device="cpu").describe()
    assert "2 done with other settings (hoverlite.training.iterations 3, now 4): --again measures them anew" in changed


def test_measured_runs_give_an_estimate(no_op):
    plan = no_op(3)
    plan.run()
    runs = plan.results_file.with_name("runs.csv")
    frame = read_runs(runs)
    frame["seconds"] = [60.0, 90.0, 300.0]
    frame.to_csv(runs, index=False)
    plan.results_file.unlink()
    for meta in (plan.pipeline.store.root / "model").glob("*/meta.json"):
        meta.unlink()
    assert plan.estimate().seconds == pytest.approx(3 * 90, abs=0.5)
    assert "about 4.5 minutes to go, one after another (by the runs of noop)" in plan.describe()
    assert "7.5 minutes spent" in plan.describe()
    frame["device"] = "NVIDIA H100 80GB HBM3"
    frame.to_csv(runs, index=False)
    elsewhere = plan.describe()
    assert "no estimate for hoverlite" in elsewhere
    assert "  on NVIDIA H100 80GB HBM3: about 4.5 minutes to go, one after another (by the runs of noop)" in elsewhere
