"""The same work by every backend, each on two workers of this machine."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from small import small_data, small_profile

from nucseg.inference import run_ahead
from nucseg.results import read_runs
from nucseg.runs.backends import BackendError, check, run_all
from nucseg.runs.plan import Plan, backends


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return small_profile(folder / "small.yaml"), small_data(folder / "tiny")


def run(small, home, **how):
    """Return results.csv as bytes, and the run ids of runs.csv."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUCSEG_HOME", str(home))
        plan = Plan(small[0], str(small[1]), device="cpu")
        assert plan.run(**how) == []
        assert set(plan.states().values()) == {"done"}
        assert not list(plan.pipeline.store.root.glob(".shared-*"))
        return plan.results_file.read_bytes(), sorted(read_runs(plan.results_file.with_name("runs.csv"))["run_id"])


@pytest.fixture(scope="module")
def sequential(small, tmp_path_factory):
    return run(small, tmp_path_factory.mktemp("sequential"))


def test_two_processes_give_the_results_of_one(small, sequential, tmp_path):
    assert run(small, tmp_path, jobs=2) == sequential


def test_processes_that_finish_predictions_do_not_get_in_the_way(tmp_path):
    ahead = run_ahead([partial(int, "1"), partial(int, "2")], workers=2)
    assert list(ahead) == [1, 2]
    run_all(partial(_write, str(tmp_path)), ["a", "b"], jobs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert list(run_ahead([partial(int, "3")], workers=2)) == [3]


def _write(folder, name):
    (Path(folder) / name).write_text(name)


PARENT = """
import sys
from functools import partial
sys.path.insert(0, sys.argv[1])
from nucseg.runs.backends import run_all
from test_backends import _write_and_wait
run_all(partial(_write_and_wait, sys.argv[2]), ["a", "b"], jobs=2)
"""


def _write_and_wait(folder, name):
    partly = Path(folder) / f".{name}"
    partly.write_text(str(os.getpid()))
    partly.rename(Path(folder) / name)
    time.sleep(600)


def test_processes_end_with_the_one_that_was_killed(tmp_path):
    workers = [tmp_path / "a", tmp_path / "b"]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(Path(__file__).parent), str(tmp_path)])
    try:
        _until(lambda: all(worker.is_file() for worker in workers))
    finally:
        parent.kill()
        parent.wait()
    _until(lambda: not any(_alive(int(worker.read_text())) for worker in workers))


def _until(done, seconds=120):
    stop = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < stop
        time.sleep(0.2)


def _alive(pid):
    try:
        # Nobody may be there to collect an orphan's exit status: it has ended all the same.
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


# Sockets and processes that dask closes late are its own affair.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dask_cluster_of_two_workers_gives_the_results_of_one_process(small, sequential, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        assert run(small, tmp_path, backend="dask", address=address) == sequential
        with pytest.raises(BackendError, match=r"2 of 2 workers cannot take part.*: no disk"):
            run_all(print, [1], backend="dask", address=address, probe=partial(str, "no disk"))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_dask_workers_with_several_threads_are_refused():
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with cluster, pytest.raises(BackendError, match="--nthreads 1"):
        run_all(print, [1], backend="dask", address=cluster.scheduler_address)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ray_cluster_of_two_workers_gives_the_results_of_one_process(small, sequential, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": {"worker_niceness": 0}},
    )
    try:
        assert run(small, tmp_path, backend="ray", address=cluster.address) == sequential
        with pytest.raises(BackendError, match=r"1 of 1 workers cannot take part.*: no disk"):
            run_all(print, [1], backend="ray", address=cluster.address, probe=partial(str, "no disk"))
        with pytest.raises(BackendError, match="has no GPU"):
            run_all(print, [1], backend="ray", address=cluster.address, cuda=True)
    finally:
        cluster.shutdown()


def test_an_address_without_a_cluster_and_a_cluster_without_an_address_are_errors():
    with pytest.raises(BackendError, match="add --backend ray or --backend dask"):
        check("loky", "tcp://there:8786", 2)
    for name in ("ray", "dask"):
        with pytest.raises(BackendError, match=f"--backend {name} needs the --address"):
            check(name, "", 0)
    with pytest.raises(BackendError, match="did you mean 'dask'"):
        check("dusk", "", 0)


@pytest.mark.parametrize("name", ["ray", "dask"])
def test_a_missing_package_is_an_error_that_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, {"ray": "ray.util.joblib", "dask": "distributed"}[name], None)
    with pytest.raises(BackendError, match=rf"pip install 'nucseg\[{name}\]'"):
        check(name, "somewhere:1", 0)


def test_a_scheduler_that_does_not_answer_is_an_error(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(backends, "WAIT", 1)
    with pytest.raises(BackendError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:9"):
        run_all(print, [1], backend="dask", address="tcp://127.0.0.1:9")


def die(path):
    Path(path).write_text("tried")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:resource_tracker:UserWarning")
def test_a_process_that_is_killed_is_an_error_that_says_so(tmp_path):
    with pytest.raises(BackendError, match="killed, most likely for lack of memory"):
        run_all(die, [tmp_path / "a"], jobs=2)
    assert (tmp_path / "a").read_text() == "tried"
