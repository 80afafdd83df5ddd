"""Many pieces of work at a time, through joblib: processes of this machine, or the workers of an existing cluster.

The list of work is the same whatever the backend, and there is no scheduler of our own. The workers of a cluster find
each other's results in one shared folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from nucseg.config import ConfigError, nearest
from nucseg.progress import task

T = TypeVar("T")

BACKENDS = ("loky", "ray", "dask")  # loky: processes of this machine
WAIT = 60  # seconds for a cluster to answer


class BackendError(ConfigError):
    """A backend is not installed, cannot be reached, or its workers cannot do the work; the message says which."""


def check(backend: str, address: str, jobs: int) -> None:
    """Raise a `BackendError` for a backend that is unknown or not installed, or an address in the wrong place."""
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; {nearest(backend, BACKENDS)}")
    if backend == "loky":
        if address:
            raise BackendError(f"--address {address} is for a cluster: add --backend ray or --backend dask")
        return
    if not address:
        example = "HOST:6379, or auto" if backend == "ray" else "tcp://HOST:8786"
        raise BackendError(f"--backend {backend} needs the --address of a running cluster, for example {example}")
    if backend == "dask" and jobs:
        raise BackendError("--jobs is not for dask: every worker of the cluster takes one experiment at a time")
    try:
        importlib.import_module("ray.util.joblib" if backend == "ray" else "distributed")
    except ImportError as error:
        raise BackendError(
            f"--backend {backend} needs a package that is not installed ({error}): pip install 'nucseg[{backend}]'"
        ) from error


def run_all(
    work: Callable[[T], Any],
    items: Sequence[T],
    jobs: int = 0,
    backend: str = "loky",
    address: str = "",
    probe: Callable[[], str] | None = None,
    cuda: bool = False,
) -> None:
    """Call ``work(item)`` for every item, several at a time, in any order.

    Parameters
    ----------
    work
        Importable where the workers are; what it returns is dropped.
    jobs
        Processes; 0 for as many as the cluster has workers.
    backend, address
        ``"loky"`` for processes of this machine; ``"ray"`` or ``"dask"`` with the address of a running cluster.
    probe
        Called once on every node (ray) or worker (dask) before any work; returns what is wrong there, or nothing.
    cuda
        Work needs a GPU: with ray, which hides GPUs that were not asked for, `jobs` share the cluster's (one each by
        default).

    Raises
    ------
    BackendError
        See `check`; and if the cluster does not answer, a probe finds something wrong, or a process dies.
    """
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    check(backend, address, jobs)
    cluster = {"loky": _loky, "ray": _ray, "dask": _dask}[backend]
    with cluster(address, jobs, probe, cuda) as options, parallel_config(**options), task("experiments") as progress:
        # One item is minutes of work: nothing is gained by handing out more than one to a worker, or ahead of time.
        as_they_come = "list" if backend == "ray" else "generator_unordered"
        parallel = Parallel(batch_size=1, pre_dispatch="n_jobs", return_as=as_they_come)
        if backend == "loky":
            work = functools.partial(_work_for, os.getpid(), work)
        try:
            for done, _ in enumerate(parallel(delayed(work)(item) for item in items), start=1):
                progress(done, len(items))
        except TerminatedWorkerError as error:
            raise BackendError(
                f"a process of {options['n_jobs']} was killed, most likely for lack of memory. What was finished is "
                "kept; start again, with fewer --jobs"
            ) from error


@contextlib.contextmanager
def _loky(address: str, jobs: int, probe: Callable[[], str] | None, cuda: bool) -> Iterator[dict[str, Any]]:
    from joblib.externals.loky import get_reusable_executor

    # Processes that finished predictions (`nucseg.inference.run_ahead`) may still be there, and joblib would take them
    # for its own, which they are not.
    get_reusable_executor().shutdown()
    yield {"backend": "loky", "n_jobs": jobs or 1}


def _work_for(parent: int, work: Callable[[T], Any], item: T) -> None:
    """Do a piece of work in a process of this machine, which ends with the one that gave it the work."""
    if os.getpid() != parent:
        _end_with(parent)
    work(item)


@functools.cache
def _end_with(parent: int) -> None:
    """End this process soon after its parent.

    A parent that was killed (by hand, by a scheduler, for lack of memory) tells its workers nothing, and each would go
    on with its piece of work, for minutes and with its part of a GPU, beside the next start of the same command.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


@contextlib.contextmanager
def _dask(address: str, jobs: int, probe: Callable[[], str] | None, cuda: bool) -> Iterator[dict[str, Any]]:
    from distributed import Client

    try:
        client = Client(address, timeout=WAIT)
    except (OSError, ValueError) as error:
        raise BackendError(f"no dask scheduler answers at {address}: {error}") from error
    with client:  # which also makes joblib's backend 'dask' this client's
        try:
            client.wait_for_workers(1, timeout=WAIT)
        except TimeoutError as error:
            raise BackendError(f"the dask scheduler at {address} has no worker; start some: dask worker") from error
        if any(threads > 1 for threads in client.nthreads().values()):
            raise BackendError(
                "dask workers with several threads would mix experiments in one process; start each one with "
                "--nthreads 1, and several to a machine with --nworkers"
            )
        if probe:
            _complain(client.run(probe))
        yield {"backend": "dask", "n_jobs": -1}


@contextlib.contextmanager
def _ray(address: str, jobs: int, probe: Callable[[], str] | None, cuda: bool) -> Iterator[dict[str, Any]]:
    import ray
    from ray.util.joblib import register_ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BackendError(f"no ray cluster answers at {address}: {error}") from error
    try:
        if probe:
            remote = ray.remote(num_cpus=0)(lambda: probe())  # ray takes functions only, no other callables
            nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            asked = [
                remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote()
                for n in nodes
            ]
            _complain(dict(zip(nodes, ray.get(asked, timeout=WAIT), strict=True)))
        register_ray()
        gpus = int(ray.cluster_resources().get("GPU", 0))
        # A worker holds a processor, or all of them would start on one node; and its share of a GPU.
        options: dict[str, Any] = {"num_cpus": 1}
        if cuda:
            if not gpus:
                raise BackendError(f"the ray cluster at {address} has no GPU; choose --device cpu")
            jobs = jobs or gpus
            options["num_gpus"] = 1 / math.ceil(jobs / gpus)
        yield {"backend": "ray", "n_jobs": jobs or -1, "ray_remote_args": options}
    finally:
        if mine:
            ray.shutdown()


def _complain(problems: dict[str, str]) -> None:
    """Raise a `BackendError` with the first thing that is wrong, and say on how many workers."""
    wrong = {name: text for name, text in problems.items() if text}
    if wrong:
        name, text = next(iter(wrong.items()))
        raise BackendError(f"{len(wrong)} of {len(problems)} workers cannot take part. {name}: {text}")
