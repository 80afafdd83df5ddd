"""One training step: nothing waits for the device, the average of the weights, the watch over the loss."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nucseg.augment import AugmentConfig
from nucseg.crops import CropPool
from nucseg.mean_teacher import MeanTeacher, MeanTeacherConfig
from nucseg.models import build
from nucseg.models.dist import DistConfig
from nucseg.models.hoverlite import HoverLiteConfig
from nucseg.models.hovernet import HoverNetConfig
from nucseg.models.maskrcnn import MaskRCNNConfig
from nucseg.models.mdcnet import MDCNetConfig
from nucseg.models.micronet import MicroNetConfig
from nucseg.models.pffnet import DPMSFFConfig, PFFNetConfig
from nucseg.recording import recording
from nucseg.steps import Average, Step
from nucseg.training import TrainingConfig, train

STRONG = AugmentConfig(rotate=180.0, scale=(0.8, 1.25))
# Operators whose result the host must read, or whose shape depends on values.
WAITING = (
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "bincount",
    "repeat_interleave", "equal", "is_nonzero", "lift_fresh", "nonzero_numpy",
)  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raises at each operator that would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name in WAITING:
            raise AssertionError(f"the host would wait for the device at {name}")
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


class Still(torch.optim.Optimizer):
    """Stands in for the fused optimisers of a GPU; those of the CPU count their steps on the host."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})

    def step(self):
        pass


def pairs(count=2, size=128):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        labels = np.kron(rng.integers(0, 2, (size // 16, size // 16)), np.ones((16, 16), dtype=np.int32))
        labels = (labels * (1 + np.arange(size)[:, None] // 16)).astype(np.int32)
        made.append((rng.integers(0, 256, (size, size, 3)).astype(np.uint8), labels))
    return made


def small(name):
    narrow = {"fpn_channels": 16, "box_widths": (16,), "mask_widths": (16,), "train_candidates": 50}
    config = {
        "hoverlite": HoverLiteConfig(widths=(8, 8, 8, 8)),
        "hovernet": HoverNetConfig(),
        "maskrcnn": MaskRCNNConfig(**narrow),
        "dpmsff": DPMSFFConfig(**narrow, semantic_width=8),
        "pffnet": PFFNetConfig(**narrow, semantic_width=8, quality_widths=(8, 8), quality_hidden=8),
        "dist": DistConfig(features=4, halvings=3),
        "micronet": MicroNetConfig(width=2),
        "mdcnet": MDCNetConfig(widths=(8, 8, 8, 8)),
    }[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(name, "efficientnet_lite0", config, pretrained=False)


@pytest.mark.parametrize(
    ("name", "changes", "taught"),
    [
        ("hoverlite", AugmentConfig(), False),
        ("hoverlite", STRONG, True),
        ("hoverlite", None, False),
        ("dist", AugmentConfig(), False),
        ("micronet", AugmentConfig(), False),
        ("mdcnet", AugmentConfig(), False),
        ("maskrcnn", STRONG, False),
        ("dpmsff", AugmentConfig(), False),
        ("pffnet", AugmentConfig(), False),
    ],
)
def test_a_step_of_fixed_shapes_never_waits_for_the_device(name, changes, taught):
    model, data, device = small(name).train(), pairs(), torch.device("cpu")
    config = TrainingConfig(batch=2, crop=64, iterations=10, ema=0.9, precision="bf16" if taught else "fp32")
    hook = MeanTeacher([i for i, _ in data], MeanTeacherConfig(), 2, 64, changes, device) if taught else None
    pool = CropPool(data, changes.window(64) if changes else 64, device)
    average = Average(model, 0.9)
    average.module.eval()
    step = Step(model, pool, changes, config, torch.Generator().manual_seed(0), average, hook)
    step.optimiser = Still(model.parameters())
    with recording():
        step.run()  # constants are made once
        with NoWaiting():
            terms = step.run()
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize(
    ("name", "crop"),
    [
        *(("hoverlite", 64), ("hovernet", 256), ("dist", 64), ("micronet", 64), ("mdcnet", 64)),
        *(("maskrcnn", 64), ("dpmsff", 64), ("pffnet", 64)),
    ],
)
def test_shapes_of_a_loss_follow_from_shapes_alone(name, crop, monkeypatch):
    """On the meta device there are shapes but no values: whatever asks for one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which meta does not know
    with torch.device("meta"):
        model = small(name).train()
        assert model.fixed_shapes
        model.largest_id = 50
        with recording(), NoWaiting():
            terms = model.loss(torch.empty(2, 3, crop, crop), torch.empty((2, crop, crop), dtype=torch.int32))
            sum(terms.values()).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_the_watch_against_waiting_does_raise():
    with NoWaiting():
        x = torch.rand(4)
        for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0.5], lambda: torch.tensor([1.0, 2.0])):
            with pytest.raises(AssertionError):
                wait()


def test_ids_never_exceed_what_the_step_tells_the_model():
    pool = CropPool(pairs(), STRONG.window(64), torch.device("cpu"))
    seen = []

    class Watch(nn.Module):
        fixed_shapes, largest_id = True, None

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def loss(self, images, label_maps):
            seen.append((int(label_maps.max()), self.largest_id))
            return {"zero": 0 * self.weight}

    model = Watch()
    step = Step(model, pool, STRONG, TrainingConfig(batch=4, crop=64), torch.Generator().manual_seed(0), None, None)
    for _ in range(10):
        step(0.1)
    assert all(0 < found <= told for found, told in seen)
    assert model.largest_id is None


@pytest.mark.parametrize("from_start", [False, True])
def test_the_average_is_a_mean_at_first_unless_its_start_is_worth_remembering(from_start):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    expected = model[0].weight.detach().clone()
    average = Average(model, 0.75, from_start)
    for n in range(1, 9):
        with torch.no_grad():
            model[0].weight.add_(n)
        model[1].num_batches_tracked += 1
        average.update()
        keep = 0.75 if from_start else min(0.75, 1 - 1 / n)
        expected = keep * expected + (1 - keep) * model[0].weight.detach()
        torch.testing.assert_close(average.module[0].weight, expected)
    assert average.module[1].num_batches_tracked == 8
    assert not average.module[0].weight.requires_grad


def test_a_graph_without_a_gpu_and_another_layout_change_nothing():
    curves = []
    for changes in ({}, {"cuda_graph": True}, {"channels_last": False}):
        config = TrainingConfig(iterations=2, batch=2, crop=64, log_every=1, validate_every=0, **changes)
        model = small("hoverlite")
        curves.append([row["total"] for row in train(model, pairs(), config).curve])
        stem = model.encoder.net.conv_stem.weight
        assert stem.is_contiguous() == (changes == {"channels_last": False})
    assert curves[0] == curves[1]
    assert curves[2] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("taught", [False, True])
def test_a_replayed_step_learns_what_an_eager_one_does(optimiser, taught):
    curves = {}
    for cuda_graph in (False, True):
        config = TrainingConfig(
            iterations=12, batch=4, crop=64, lr=1e-3, optimiser=optimiser, ema=0.9, log_every=1, validate_every=6,
            cuda_graph=cuda_graph,
        )  # fmt: skip
        model, data = small("hoverlite").cuda(), pairs()
        hook = MeanTeacher([i for i, _ in data], MeanTeacherConfig(), 4, 64, STRONG, "cuda") if taught else None
        result = train(model, data, config, augment=STRONG, unlabelled=hook, validate=lambda m: float(m.training))
        curves[cuda_graph] = [row["total"] for row in result.curve]
    assert curves[True] == pytest.approx(curves[False], rel=0.1)
    assert len(set(curves[True])) == 12  # the rate, the crops and the weights all move on


@pytest.mark.parametrize(("free", "fits"), [(500, True), (499, False)])
def test_a_recording_that_would_not_fit_is_not_begun(monkeypatch, free, fits):
    """Half-way it would cost the process its GPU. What it needs is what the steps before it needed at most."""
    readings = {"max_memory_allocated": 800, "memory_allocated": 300, "memory_reserved": 350}
    for name, value in readings.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value * 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**20, 900 * 2**20))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    config = TrainingConfig(batch=2, crop=64)
    pool = CropPool(pairs(), 64, torch.device("cpu"))
    step = Step(small("hoverlite"), pool, None, config, torch.Generator(), None, None)
    if fits:
        assert step._room_for_a_recording() == 350 * 2**20
    else:
        with pytest.raises(torch.OutOfMemoryError, match=r"HoverLite: recording a step .* 500 MB .* 499 are free"):
            step._room_for_a_recording()


@pytest.mark.gpu
def test_a_recorded_training_says_what_it_takes():
    """The allocator counts a graph's memory as unused; others must not believe that."""
    taken = []
    for cuda_graph in (False, True):
        config = TrainingConfig(iterations=8, batch=4, crop=128, log_every=4, cuda_graph=cuda_graph)
        result = train(small("hoverlite").cuda(), pairs(), config, augment=STRONG)
        assert (result.recorded_memory > 0) == cuda_graph
        taken.append(result.peak_memory)
    assert taken[1] > 0.8 * taken[0]


@pytest.mark.gpu
def test_a_recorded_mask_rcnn_learns_the_same_while_images_of_many_shapes_are_looked_at():
    """What the recording reads must not be given to them."""
    curves = []
    for sides in ((), range(40, 90)):

        def look(net, sides=sides):
            for side in sides:
                net.predict(np.full((side, 64, 3), 200, dtype=np.uint8))
            return 0.0

        config = TrainingConfig(iterations=12, batch=4, crop=64, log_every=1, validate_every=4, cuda_graph=True)
        result = train(small("maskrcnn").cuda(), pairs(), config, augment=STRONG, validate=look)
        curves.append([row["total"] for row in result.curve])
    assert curves[1] == pytest.approx(curves[0], rel=0.1)


@pytest.mark.gpu
def test_a_step_is_captured_after_its_warm_up_and_only_where_shapes_are_fixed():
    device = torch.device("cuda")
    for name, captured in (("hoverlite", True), ("maskrcnn", True), ("maskrcnn", False)):
        model = small(name).cuda().train()
        model.fixed_shapes = captured
        config = TrainingConfig(batch=2, crop=64, cuda_graph=True)
        pool = CropPool(pairs(), 64, device)
        step = Step(model, pool, AugmentConfig(), config, torch.Generator(device).manual_seed(0), None, None)
        for _ in range(5):
            step(1e-3)
        assert step.captured == captured


@pytest.mark.gpu
def test_a_replayed_training_goes_on_where_it_stopped(tmp_path):
    config = TrainingConfig(iterations=12, batch=4, crop=64, log_every=1, validate_every=6, ema=0.9, cuda_graph=True)
    states, models = [], [small("hoverlite").cuda(), small("hoverlite").cuda()]
    whole = train(models[0], pairs(), config, augment=STRONG, checkpoint=lambda s: states.append(s()))
    torch.save(states[5], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    resumed = train(models[1], pairs(), config, augment=STRONG, resume_from=state)
    assert [r["total"] for r in resumed.curve] == pytest.approx([r["total"] for r in whole.curve], rel=0.1)
