from pathlib import Path

import pytest
import torch

from nucseg import workflow
from nucseg.cli import main
from nucseg.config import ConfigError
from nucseg.devices import device_of, pick_device
from nucseg.profiles import load_profile
from nucseg.stages import Stages

TINY = str(Path(__file__).parent / "tiny.yaml")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "no device 'tpu'; there are cpu and cuda"),
        ("mps", "no device 'mps'; there are cpu and cuda"),
        ("cuda:7", "device 'cuda:7' is not there: PyTorch sees 0 GPUs"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(no_gpu, device, message):
    with pytest.raises(ConfigError, match=message):
        pick_device(device)


def test_without_a_name_it_is_the_gpu_where_there_is_one(monkeypatch):
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device().type == device_of().type == kind


def test_a_gpu_of_another_machine_can_be_named_for_a_cluster(no_gpu):
    assert device_of("cuda:1") == torch.device("cuda:1")
    assert Stages(TINY, device="cuda").device.type == "cuda"
    with pytest.raises(ConfigError, match="no device 'tpu'"):
        Stages(TINY, device="tpu")


@pytest.mark.parametrize("command", ["run", "compare-choices", "compare-schedules", "compare-synthesis"])
@pytest.mark.parametrize(
    ("device", "message"), [("tpu", "no device 'tpu'; there are"), ("cuda", "device 'cuda' is not there: PyTorch sees")]
)
def test_commands_of_the_paper_refuse_such_a_device_before_any_work(
    no_gpu, monkeypatch, tmp_path, command, device, message
):
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    monkeypatch.setattr("nucseg.runs.plan.Plan.run", lambda *a, **k: pytest.fail("worked first"))
    monkeypatch.setattr("sys.argv", ["nucseg", command, "--profile", TINY, "--device", device])
    with pytest.raises(SystemExit) as raised:
        main()
    assert str(raised.value.code).startswith(f"nucseg: {message}")
    assert not any(tmp_path.iterdir())


def test_a_cluster_is_asked_for_gpus_from_a_machine_without_one(no_gpu, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setenv("NUCSEG_HOME", str(tmp_path))
    monkeypatch.setattr("nucseg.runs.backends.check", lambda *_: None)
    monkeypatch.setattr("nucseg.runs.plan.Plan.run", lambda self, *_: asked.append(self.pipeline.device.type) or [])
    monkeypatch.setattr("sys.argv", ["nucseg", "run", "--profile", TINY, "--device", "cuda", "--backend", "dask"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code in (0, None)
    assert asked == ["cuda"]


@pytest.mark.filterwarnings("ignore:.* are left out, to be tested on")
def test_commands_for_ones_own_slides_refuse_it_too(no_gpu, tmp_path):
    with pytest.raises(ConfigError, match="device 'cuda' is not there"):
        workflow.default_profile("cuda")
    with pytest.raises(ConfigError, match="no device 'tpu'"):
        workflow.select_patches("tissue", tmp_path, 1, "random-crop", load_profile(TINY), device="tpu")
