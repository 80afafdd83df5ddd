"""Waiting for GPU memory, with readings that are made up: no GPU is needed here."""

import json
import threading
import time

import pandas as pd
import pytest
import torch

from nucseg.gan import config_class
from nucseg.gan.csingan import CSinGANConfig
from nucseg.runs import gpu_memory
from nucseg.runs.gpu_memory import CONTEXT_MB, MARGIN, UNKNOWN_MB, Gpu, needed, of_synthesis, reserved, usable
from nucseg.store import claimed

TOTAL = 80_000.0


@pytest.fixture
def gpu(tmp_path):
    """A GPU all of whose memory is free, whatever is promised."""
    return Gpu(tmp_path, lambda: (TOTAL, TOTAL))


def runs(*lines):
    return pd.DataFrame(
        [{"peak_gpu_mb": mb, "config": json.dumps({"experiment": {"segmenter": name}})} for name, mb in lines]
    )


def test_the_need_is_the_highest_peak_of_that_segmenter_with_a_margin():
    known = runs(("hoverlite", 4000), ("hoverlite", 5000), ("maskrcnn", 30_000), ("hovernet", float("nan")))
    assert needed(known, "hoverlite") == MARGIN * 5000 + CONTEXT_MB
    assert needed(known, "hovernet") == UNKNOWN_MB  # measured on a CPU only
    assert needed(known, "dist") == UNKNOWN_MB
    assert needed(None, "hoverlite") == UNKNOWN_MB


def test_a_peak_that_does_not_count_its_recording_says_nothing():
    lines = runs(("hoverlite", 1_200), ("hoverlite", 4_000), ("hoverlite", 2_000))
    schedule = {"model": {"training": [{"cuda_graph": True}]}}
    more = (schedule, schedule | {"recorded_gpu_mb": 3_000}, {"recorded_gpu_mb": None})
    lines["config"] = [json.dumps(json.loads(c) | m) for c, m in zip(lines["config"], more, strict=True)]
    assert needed(lines[:1], "hoverlite") == UNKNOWN_MB
    assert needed(lines[:2], "hoverlite") == MARGIN * 4_000 + CONTEXT_MB
    assert needed(lines[2:], "hoverlite") == MARGIN * 2_000 + CONTEXT_MB  # not recorded at all


def test_generators_that_train_at_once_need_memory_each():
    windows = [of_synthesis(CSinGANConfig(crop=crop), 9, 256) for crop in (96, None)]
    # Counted tensors of one generator's step, in MB.
    assert windows[0] == pytest.approx(9 * 830 + CONTEXT_MB, rel=0.35)
    assert windows[1] == pytest.approx(9 * 6050 + CONTEXT_MB, rel=0.1)
    assert of_synthesis(config_class("pix2pix")(), 9, 256) > CONTEXT_MB


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_process_without_a_gpu_cannot_use_one():
    assert not usable(torch.device("cuda"))


def test_a_gpu_that_others_have_filled_is_still_usable(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "rand", full)
    assert usable(torch.device("cuda"))


def test_two_that_were_never_measured_fit_an_80_gb_gpu():
    assert 2 * UNKNOWN_MB <= 78 * 1024  # GiB that such a GPU has to give


def other_process(gpu, mb):
    """Hold a reservation as another process would."""
    return claimed(gpu.folder / "999999.json", json.dumps(mb))


def enter(gpu, need):
    """Reserve in a thread; the event is set when it was let in."""
    inside, leave = threading.Event(), threading.Event()

    def wait():
        with reserved(gpu, need, poll=0.01):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=wait)
    thread.start()
    return inside, lambda: (leave.set(), thread.join(60))


def test_it_waits_for_memory_that_is_promised_though_still_free(gpu):
    with other_process(gpu, 50_000):
        with reserved(gpu, 30_000, poll=0.01):
            pass  # both fit
        inside, leave = enter(gpu, 30_001)
        assert not inside.wait(0.1)
    assert inside.wait(5)
    leave()


def test_it_waits_for_memory_that_is_taken_though_never_promised(tmp_path):
    free = [10_000.0]
    gpu = Gpu(tmp_path, lambda: (free[0], TOTAL))
    with other_process(gpu, 5_000):
        inside, leave = enter(gpu, 20_000)
        assert not inside.wait(0.1)
        free[0] = 20_000.0
        assert inside.wait(5)
        leave()


def test_alone_there_is_nothing_to_wait_for(tmp_path):
    with reserved(Gpu(tmp_path, lambda: (1.0, TOTAL)), 2 * TOTAL, poll=60):
        pass


def test_a_dead_process_promises_nothing(gpu):
    (gpu.folder / "999999.json").write_text(json.dumps(TOTAL))
    with reserved(gpu, TOTAL, poll=60):
        assert not (gpu.folder / "999999.json").exists()


def test_a_reservation_is_seen_by_others_as_long_as_it_is_held(gpu):
    with reserved(gpu, 30_000):
        assert gpu_memory._promised(gpu.folder) == [30_000]
    assert gpu_memory._promised(gpu.folder) == []


def test_out_of_memory_is_tried_once_more_alone(gpu):
    tries, tensors = [], []

    class Held:
        """Something that only the first try's traceback refers to."""

        def __del__(self):
            tensors.append("freed")

    def work():
        held = Held()
        tries.append((gpu_memory._promised(gpu.folder), list(tensors)))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("too much")
        return held.__class__.__name__

    with other_process(gpu, 1_000):
        result = []
        thread = threading.Thread(target=lambda: result.append(gpu_memory.run(work, 2_000, gpu, poll=0.01)))
        thread.start()
        until = time.monotonic() + 60
        while not tries and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)  # many polls
        assert len(tries) == 1, "the second try did not wait for the other process"
    thread.join(60)
    assert result == ["Held"]
    (first, freed_before), (second, freed_after) = tries
    assert sorted(first) == [1_000, 2_000]
    assert second == [float("inf")]
    assert (freed_before, freed_after) == ([], ["freed"])


def test_out_of_memory_that_has_cost_the_gpu_is_not_tried_again(tmp_path):
    tries = []

    def work():
        tries.append(1)
        raise torch.OutOfMemoryError("half-way through a recording")

    with pytest.raises(torch.OutOfMemoryError, match="half-way"):
        gpu_memory.run(work, 1, Gpu(tmp_path, lambda: (TOTAL, TOTAL), lambda: False))
    assert len(tries) == 1


def test_out_of_memory_twice_is_an_error_and_other_errors_are_not_retried(gpu):
    tries = []

    def work(error):
        tries.append(error)
        raise error

    with pytest.raises(torch.OutOfMemoryError):
        gpu_memory.run(lambda: work(torch.OutOfMemoryError("too much")), 1, gpu)
    assert len(tries) == 2
    with pytest.raises(ZeroDivisionError):
        gpu_memory.run(lambda: work(ZeroDivisionError()), 1, gpu)
    assert len(tries) == 3
    assert gpu_memory._promised(gpu.folder) == []
