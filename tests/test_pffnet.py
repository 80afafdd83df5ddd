"""PFFNet and DPMSFF: fusion and targets against brute force, what teaches what, unknown pixels, learning."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.utils._python_dispatch import TorchDispatchMode

from nucseg import models
from nucseg.config import ConfigError, from_mapping
from nucseg.labels import IGNORE
from nucseg.metrics import aji
from nucseg.models.boxes import Targets, known_cells, mask_targets, targets_from_labels
from nucseg.models.heads import group_norm
from nucseg.models.maskrcnn import MaskRCNN, MaskRCNNConfig
from nucseg.models.pffnet import (
    DPMSFFConfig,
    DualMaskHead,
    PFFNet,
    PFFNetConfig,
    QualityHead,
    _Shuffle,
    areas,
    mask_quality,
)
from nucseg.models.semantic import (
    LargeKernel,
    SemanticBranch,
    consistency_loss,
    enlarge,
    fuse,
    paste_masks,
    semantic_loss,
)
from nucseg.training import TrainingConfig, train

TINY = PFFNetConfig(
    strides=(4, 8), anchors=((8.0, 16.0), (24.0, 32.0)), fpn_channels=16, box_widths=(32,), mask_widths=(16, 16),
    mask_pool=7, rpn_samples=32, roi_samples=16, roi_fraction=0.5, train_candidates=60, train_proposals=30,
    test_candidates=300, test_proposals=100, semantic_width=16, quality_widths=(16, 16), quality_hidden=32,
)  # fmt: skip
SIZES = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(MaskRCNNConfig)} | {
    name: getattr(TINY, name) for name in ("semantic_width", "quality_widths", "quality_hidden")
}
TINY_DPMSFF = DPMSFFConfig(**SIZES)
NEW = {"semantic", "fused", "consistency", "quality"}
OLD = {"rpn_score", "rpn_box", "score", "box", "mask"}


def new_model(config: PFFNetConfig = TINY) -> PFFNet:
    torch.manual_seed(0)
    return PFFNet("efficientnet_lite0", config)


@pytest.fixture(scope="module")
def pretrained() -> dict[str, PFFNet]:
    return {"pffnet": new_model(), "dpmsff": new_model(TINY_DPMSFF)}


@pytest.fixture
def model(pretrained) -> PFFNet:
    return copy.deepcopy(pretrained["pffnet"])


def discs(count: int, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dark discs on a bright ground, with their label map."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), 220.0) + rng.normal(0, 4, (size, size, 3))
    labels = np.zeros((size, size), np.int32)
    y, x = np.mgrid[:size, :size]
    for number in range(1, count + 1):
        r, c, radius = *rng.uniform(8, size - 8, 2), rng.uniform(5, 8)
        disc = (y - r) ** 2 + (x - c) ** 2 < radius**2
        labels[disc], image[disc] = 3 * number, (90, 50, 130)
    return image.clip(0, 255).astype(np.uint8), labels


def batch(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [discs(5, seed=seed) for seed in range(count)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image, _ in pairs])
    return images, torch.stack([torch.from_numpy(labels).long() for _, labels in pairs])


def losses_of(model: PFFNet, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return model.train().loss(images, labels)


# -- fusion ----------------------------------------------------------------------------------------------------------


def paste_by_loops(logits, boxes, image, used, shape):
    """Every pixel of every box, one by one; scipy interpolates."""
    out = np.full(shape, -np.inf)
    for n, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        m = logits.shape[-1]
        for r in range(shape[1]):
            for c in range(shape[2]):
                x, y = (c + 0.5 - x1) / (x2 - x1), (r + 0.5 - y1) / (y2 - y1)
                if used[n] and 0 <= x <= 1 and 0 <= y <= 1:
                    at = [[y * m - 0.5], [x * m - 0.5]]
                    value = map_coordinates(logits[n].double().numpy(), at, order=1, mode="nearest")[0]
                    out[image[n], r, c] = max(out[image[n], r, c], value)
    return out


def random_masks(seed: int = 0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-2, 14, (12, 2))
    boxes = torch.tensor(np.concatenate((corner, corner + rng.uniform(1, 9, (12, 2))), 1), dtype=torch.float32)
    logits = torch.tensor(rng.normal(0, 2, (12, 6, 6)), dtype=torch.float32)
    image, used = torch.tensor(rng.integers(0, 2, 12)), torch.tensor(rng.random(12) < 0.7).float()
    return logits, boxes, image, used


def test_pasting_equals_interpolating_pixel_by_pixel_and_keeping_the_highest():
    logits, boxes, image, used = random_masks()
    got = paste_masks(logits, boxes, image, used, (3, 15, 18)).numpy()
    expected = paste_by_loops(logits, boxes, image, used, (3, 15, 18))
    assert np.isfinite(expected[:2]).any()
    assert np.isneginf(expected[2]).all()
    assert np.array_equal(np.isneginf(got), np.isneginf(expected))
    seen = np.isfinite(expected)
    np.testing.assert_allclose(got[seen], expected[seen], atol=1e-4)


def test_a_place_not_used_may_hold_a_box_without_area_and_gets_no_gradient():
    logits, boxes, image, used = random_masks()
    boxes[0, 2:] = boxes[0, :2]
    used[0], used[1] = 0, 1
    logits.requires_grad_()
    fused = fuse(torch.ones(2, 2, 15, 18), paste_masks(logits, boxes, image, used, (2, 15, 18)), "attention")
    fused.sum().backward()
    assert torch.isfinite(fused).all()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[used == 0].any()
    assert logits.grad[1].any()


def test_no_instance_leaves_the_map_as_it_is():
    scores = torch.randn(2, 2, 5, 5)
    nothing = paste_masks(torch.zeros(0, 4, 4), torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), (2, 5, 5))
    for fusion in ("attention", "paste"):
        assert torch.equal(fuse(scores, nothing, fusion), scores)


def test_attention_multiplies_both_classes_and_pasting_replaces_them_by_the_mask():
    scores, masks = torch.randn(1, 2, 2, 2), torch.tensor([[[0.0, 3.0], [-1.0, -torch.inf]]])
    factor = torch.tensor([[1.5, 1 + 1 / (1 + np.exp(-3))], [1 + 1 / (1 + np.exp(1)), 1.0]])
    torch.testing.assert_close(fuse(scores, masks, "attention"), scores * factor.float())
    pasted = fuse(scores, masks, "paste")
    assert pasted[0, :, 0, 1].tolist() == [0.0, 3.0]
    assert pasted.softmax(1)[0, 1, 0, 1] == pytest.approx(1 / (1 + np.exp(-3)))  # that mask's probability
    others = torch.tensor([[True, False], [True, True]])
    assert torch.equal(pasted[:, :, others], scores[:, :, others])


# -- the semantic branch ----------------------------------------------------------------------------------------------


def test_large_kernels_see_five_by_five_pixels():
    layer = LargeKernel(3, 8)
    layer.norm = torch.nn.Identity()
    image = torch.zeros(1, 3, 15, 15, requires_grad=True)
    layer(image)[0, :, 7, 7].sum().backward()
    seen = torch.zeros(15, 15, dtype=torch.bool)
    seen[5:10, 5:10] = True
    assert torch.equal(image.grad[0].abs().sum(0) > 0, seen)


def test_the_semantic_branch_uses_every_map_and_answers_at_the_finest():
    branch = SemanticBranch((4, 6, 8, 10), 16)
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((4, 16), (6, 8), (8, 4), (10, 2))]
    scores = branch(maps)
    assert scores.shape == (2, 2, 16, 16)
    scores.square().sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)


@pytest.mark.parametrize(("scale", "shape"), [(1.0, (50, 61)), (1.5, (42, 43)), (2.0, (31, 32))])
def test_maps_are_enlarged_to_where_the_image_is(scale, shape):
    """A ramp in network pixels keeps its values at the image's pixel centres, away from the border."""
    stride, padded = 4, [-(-round(side * scale) // 32) * 32 for side in shape]
    y, x = np.mgrid[: padded[0] // stride, : padded[1] // stride]
    ramp = torch.tensor(np.stack(((y + 0.5) * stride, (x + 0.5) * stride))[None], dtype=torch.float32)
    got = enlarge(ramp, stride, shape, scale)
    assert got.shape == (1, 2, *shape)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    expected = (np.stack((rows, columns)) + 0.5) * np.reshape([round(s * scale) / s for s in shape], (2, 1, 1))
    inner = (slice(None), slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(got[0].numpy()[inner], expected[inner], atol=1e-3)


def test_losses_of_maps_are_means_over_known_pixels():
    rng = np.random.default_rng(1)
    a, b = (torch.tensor(rng.normal(0, 2, (2, 2, 4, 5)), dtype=torch.float32) for _ in range(2))
    index = torch.from_numpy(rng.choice([IGNORE, 0, 1, 7], (2, 4, 5)))
    entropy, difference = [], []
    for i, r, c in np.argwhere(index.numpy() != IGNORE):
        p, q = (np.exp(s[i, :, r, c].double().numpy()) for s in (a, b))
        p, q = p / p.sum(), q / q.sum()
        entropy.append(-np.log(p[int(index[i, r, c] > 0)]))
        difference.append(((p - q) ** 2).mean())
    assert semantic_loss(a, index).item() == pytest.approx(np.mean(entropy), rel=1e-5)
    assert consistency_loss(a, b, index).item() == pytest.approx(np.mean(difference), rel=1e-5)
    assert consistency_loss(a, a + 3, index).item() == pytest.approx(0, abs=1e-12)
    for loss in (semantic_loss(a, index * 0 + IGNORE), consistency_loss(a, b, index * 0 + IGNORE)):
        assert loss == 0


# -- mask quality ------------------------------------------------------------------------------------------------------


def test_areas_equal_counts_of_each_id():
    rng = np.random.default_rng(2)
    maps = rng.choice([IGNORE, 0, 2, 5, 9], size=(3, 8, 9)) * rng.integers(0, 2, (3, 1, 1))
    targets = targets_from_labels(torch.from_numpy(maps))
    for b, labels in enumerate(maps):
        counts = [np.count_nonzero(labels == value) for value in np.unique(labels[labels > 0])]
        got = areas(targets)[b].tolist()
        assert got == counts + [0] * (len(got) - len(counts))


def test_quality_is_that_of_the_mask_on_the_pixels_of_the_image():
    """Boxes whose cells are pixels: half IoU plus half Dice, counted by hand, also of a nucleus that sticks out."""
    rng = np.random.default_rng(3)
    labels = np.zeros((1, 24, 24), np.int64)
    labels[0, 4:16, 5:14] = 1
    labels[0, 14:20, 16:22] = 2
    labels[0, :6] = IGNORE
    targets = targets_from_labels(torch.from_numpy(labels))
    boxes = torch.tensor([[4.0, 3.0, 16.0, 15.0], [12.0, 11.0, 24.0, 23.0], [2.0, 6.0, 14.0, 18.0]])
    image, place = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 0])
    masks = torch.from_numpy(rng.random((3, 12, 12)) < 0.5)
    masks[2] = mask_targets(targets.index, image, place, boxes, 12)[2] > 0.5
    got = mask_quality(
        masks, mask_targets(targets.index, image, place, boxes, 12) > 0.5,
        known_cells(targets.index, image, boxes, 12), boxes, areas(targets)[image, place],
    )  # fmt: skip
    for n, (x, y, *_) in enumerate(boxes.int().tolist()):
        found = np.zeros((24, 24), bool)
        found[y : y + 12, x : x + 12] = masks[n].numpy()
        found &= labels[0] != IGNORE
        true = labels[0] == place[n].item() + 1
        common, both = (found & true).sum(), found.sum() + true.sum()
        assert got[n].item() == pytest.approx((common / (both - common) + 2 * common / both) / 2, abs=1e-5)
    assert got[0] < 1
    assert got[2] == 1


def test_quality_stays_between_0_and_1_whatever_the_grid():
    rng = np.random.default_rng(4)
    index = torch.from_numpy(rng.choice([IGNORE, 0, 1], (1, 20, 20)))
    targets = Targets(torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), index)
    corner = torch.rand(50, 2) * 15
    boxes = torch.cat((corner, corner + torch.rand(50, 2) * 5), 1)
    image = place = torch.zeros(50, dtype=torch.int64)
    truth = mask_targets(index, image, place, boxes, 7) > 0.5
    got = mask_quality(truth, truth, known_cells(index, image, boxes, 7), boxes, areas(targets)[image, place])
    assert (got >= 0).all()
    assert (got <= 1).all()
    assert got.max() > 0


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_step_measures_the_thresholded_masks_on_the_pixels_of_the_labels(model, monkeypatch, scale):
    """A mask head that says 0.57 everywhere finds whole boxes, each around the nucleus that it is measured against."""
    model.config = dataclasses.replace(TINY, scale=scale)
    images, labels = batch()
    said = {}

    def watched(masks, truth, known, boxes, area):
        said.update(masks=masks, boxes=boxes, area=area, quality=mask_quality(masks, truth, known, boxes, area))
        return said["quality"]

    monkeypatch.setattr("nucseg.models.pffnet.mask_quality", watched)
    monkeypatch.setattr(model.mask_head, "forward", lambda pooled: torch.full((len(pooled), 14, 14), 0.3))
    losses_of(model, images, labels)
    assert said["masks"].all()
    size = (said["boxes"][:, 2:] - said["boxes"][:, :2]).prod(dim=1)
    counts = {np.count_nonzero(one == value) for one in labels.numpy() for value in np.unique(one)[1:]}
    assert set(said["area"].tolist()) <= counts
    # With IoU >= 0.5 of the boxes; a disc fills pi / 4 of its box, or less where another one covers it.
    assert (said["area"] / size).max() < 2
    assert 0.5 < (said["area"] / size).median() < 1
    assert said["quality"].median() > 0.5


def test_quality_multiplies_the_score_of_the_box(model, monkeypatch):
    image, _ = discs(5)
    model.config = dataclasses.replace(TINY, score=0.0)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    model.eval()
    with torch.no_grad():
        box_score = {}
        monkeypatch.setattr(model, "_final_scores", lambda scores, pooled, masks: box_score.setdefault("s", scores))
        model._detect(pixels)
        monkeypatch.undo()
        monkeypatch.setattr(model.quality, "forward", lambda pooled, masks: masks.mean(dim=(1, 2)).logit())
        _, scores, masks = model._detect(pixels)
    assert len(scores) > 3
    torch.testing.assert_close(scores, box_score["s"] * masks.mean(dim=(1, 2)))


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pffnet", "dpmsff"])
def test_every_layer_gets_a_gradient_and_equal_seeds_equal_losses(pretrained, name):
    model = copy.deepcopy(pretrained[name])
    images, labels = batch()
    terms = losses_of(model, images, labels)
    assert {k: float(v.detach()) for k, v in terms.items()} == {
        k: float(v.detach()) for k, v in losses_of(model, images, labels).items()
    }
    assert set(terms) == OLD | (NEW if name == "pffnet" else {"semantic", "fused"})
    sum(terms.values()).backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {n for n in idle if not n.startswith("pyramid.")}, idle
    assert "pyramid.net.conv_stem.weight" not in idle
    again = new_model(model.config).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_weights_multiply_their_terms_and_0_leaves_a_term_out(model):
    images, labels = batch()
    plain = losses_of(model, images, labels)
    for name in sorted(NEW):
        model.config = dataclasses.replace(TINY, **{name: 2.5})
        changed = losses_of(model, images, labels)
        assert {k: float(v.detach()) for k, v in changed.items()} == pytest.approx(
            {k: float(v.detach()) * (2.5 if k == name else 1) for k, v in plain.items()}
        )
        model.config = dataclasses.replace(TINY, **{name: 0.0})
        if name != "quality":
            assert set(losses_of(model, images, labels)) == set(plain) - {name}
    bare = new_model(dataclasses.replace(TINY, quality=0.0))
    assert bare.quality is None
    assert set(losses_of(bare, images, labels)) == set(plain) - {"quality"}


@pytest.mark.parametrize("name", ["pffnet", "dpmsff"])
def test_the_second_map_teaches_masks_and_the_quality_head_does_not(pretrained, name):
    model = copy.deepcopy(pretrained[name])
    images, labels = batch()
    losses_of(model, images, labels)["fused"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.mask_head.parameters())
    if model.quality is not None:
        model.zero_grad(set_to_none=True)
        losses_of(model, images, labels)["quality"].backward()
        assert all(p.grad is None for p in model.mask_head.parameters())
        assert all(p.grad.any() for p in model.quality.parameters())


def test_without_its_further_losses_a_step_is_mask_rcnns(model, monkeypatch):
    images, labels = batch()
    mine = losses_of(model, images, labels)
    monkeypatch.setattr(PFFNet, "_further_losses", MaskRCNN._further_losses)
    theirs = losses_of(model, images, labels)
    assert set(theirs) == OLD
    assert all(torch.equal(mine[name], theirs[name]) for name in OLD)


def test_the_maps_are_not_taught_on_unknown_pixels(model, monkeypatch):
    images, labels = batch()
    labels[:, :, 24:40] = IGNORE
    said = {}
    monkeypatch.setattr(
        "nucseg.models.pffnet.enlarge",
        lambda *args: said.setdefault(len(said), enlarge(*args).detach().requires_grad_()),
    )
    losses = losses_of(model, images, labels)
    (losses["semantic"] + losses["fused"] + losses["consistency"]).backward()
    for scores in said.values():
        known = (labels != IGNORE)[:, None].expand_as(scores)
        assert not scores.grad[~known].any()
        assert scores.grad[known].all()


def every_place(used):
    return torch.ones_like(used).nonzero(as_tuple=True)


@pytest.mark.parametrize("hidden", [False, True])
def test_places_worked_on_for_nothing_change_neither_loss_nor_gradient(model, monkeypatch, hidden):
    images, labels = batch(3)
    labels[2] = 0  # no positive place at all
    if hidden:
        labels[1] = IGNORE  # no place at all
    results = []
    for fixed in (False, True):
        if fixed:
            monkeypatch.setattr("nucseg.models.maskrcnn.places", every_place)
        model.zero_grad()
        losses = losses_of(model, images, labels)
        sum(losses.values()).backward()
        results.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, msg=name)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_what_pffnet_adds_to_a_step_never_waits_for_the_device(model, monkeypatch):
    monkeypatch.setattr("nucseg.models.maskrcnn.places", every_place)
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.name().split("::")[1].split(".")[0])
            if calls[-1] in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
                calls.append("boolean index")
            return function(*args, **(kwargs or {}))

    further = model._further_losses

    def watched(*args):
        with Record():
            losses = further(*args)
            sum(losses.values()).backward(retain_graph=True)
        return losses

    monkeypatch.setattr(model, "_further_losses", watched)
    losses_of(model, *batch())
    waits = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "boolean index", "lift_fresh"}
    assert "scatter_reduce" in calls
    assert not waits & set(calls), waits & set(calls)


@pytest.mark.parametrize("name", ["pffnet", "dpmsff"])
def test_crops_without_nuclei_and_without_truth_have_finite_losses(pretrained, name):
    model = copy.deepcopy(pretrained[name])
    images, labels = batch()
    empty = losses_of(model, images, labels * 0)
    sum(empty.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert empty["semantic"] > 0
    assert empty.get("quality", torch.zeros(())) == 0
    unknown = losses_of(model, images, torch.full_like(labels, IGNORE))
    assert all(value == 0 for value in unknown.values()), unknown
    sum(unknown.values()).backward()


def test_bf16_autocast_and_channels_last_give_nearly_the_same_finite_losses(model):
    images, labels = batch()
    plain = losses_of(model, images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses_of(model, images.contiguous(memory_format=torch.channels_last), labels)
        sum(mixed.values()).backward()
    for name in NEW:
        assert mixed[name].dtype == torch.float32
        assert mixed[name].item() == pytest.approx(plain[name].item(), rel=0.25, abs=0.02), name
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("scale", [1.5, 2.0])
def test_an_enlarged_network_has_its_maps_on_the_pixels_of_the_labels(model, scale):
    model.config = dataclasses.replace(TINY, scale=scale, roi_stride=4)
    images, labels = batch(1)
    losses = losses_of(model, images[..., :45, :51], labels[..., :45, :51])
    assert all(torch.isfinite(value) for value in losses.values())
    image = (images[0].permute(1, 2, 0) * 255).byte().numpy()[:45, :51]
    assert [m.shape for m in model.semantic_maps(image)] == [(45, 51)] * 2


def test_pooling_from_stride_2_works_too():
    model = new_model(dataclasses.replace(TINY, roi_stride=2))
    sum(losses_of(model, *batch(1)).values()).backward()
    assert model.fused.reduce[0].weight.grad.any()


# -- heads -------------------------------------------------------------------------------------------------------------


def test_a_mask_head_answers_on_a_grid_twice_as_fine_and_its_two_paths_differ_in_reach():
    features = torch.randn(2, 8, 3, 5)
    assert torch.equal(_Shuffle()(features), torch.nn.PixelShuffle(2)(features))
    head = DualMaskHead(16, 8, (16, 16))
    pooled = torch.randn(3, 16, 8, 8)
    assert head(pooled).shape == (3, 16, 16)
    assert head(pooled[:0]).shape == (0, 16, 16)
    one, other = head.local, head.whole
    for layers in (one, other):
        for module in layers.modules():  # a norm sees everything
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, torch.nn.Identity())
    features = torch.randn(1, 16, 8, 8, requires_grad=True)
    (near,) = torch.autograd.grad(one(features)[0, 0, 0, 0], features)
    (far,) = torch.autograd.grad(other(features)[0, 0], features)
    assert not near[..., 4:, 4:].any()
    assert far[..., 4:, 4:].any()


def test_a_quality_head_looks_at_the_mask():
    torch.manual_seed(0)
    head = QualityHead(16, 7, (16, 16), 32)
    pooled = torch.randn(4, 16, 7, 7)
    low, high = head(pooled, torch.zeros(4, 14, 14)), head(pooled, torch.ones(4, 14, 14))
    assert low.shape == (4,)
    assert (low != high).all()


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (64, 8), (8, 1), (12, 1)])
def test_groups_have_eight_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_the_pyramid_and_every_head_but_that_of_proposals_are_normalised(model):
    for part in (model.fpn, model.box_head, model.mask_head, model.semantic, model.quality):
        assert any(isinstance(module, torch.nn.GroupNorm) for module in part.modules())
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in model.rpn.modules())


def test_published_widths_have_their_sizes():
    torch.manual_seed(0)
    model = PFFNet("efficientnet_lite0", pretrained=False)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    conv3, gn = 256 * 256 * 9, 2 * 256
    local = conv3 + gn + (conv3 + 256) + (64 + 1)
    whole = conv3 + gn + (conv3 // 2 + gn // 2) + (128 * 14 * 14 + 1) * 28 * 28
    assert count["mask_head"] == 3 * (conv3 + gn) + local + whole
    quality = 257 * 256 * 9 + 3 * conv3 + 4 * gn + (256 * 7 * 7 + 1) * 1024 + 1025
    assert count["quality"] == quality


# -- learning and prediction -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pffnet", "dpmsff"])
def learnt(request, pretrained) -> tuple[PFFNet, list[dict[str, float]]]:
    """A model that has seen one batch of discs a few dozen times; its encoder rests, for speed."""
    model = copy.deepcopy(pretrained[request.param]).train()
    model.pyramid.requires_grad_(False)
    images, labels = batch(4)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    torch.manual_seed(0)
    rows = []
    for _ in range(30):
        terms = model.loss(images, labels)
        optimiser.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        rows.append({name: float(term.detach()) for name, term in terms.items()})
    return model.eval(), rows


def test_the_losses_fall(learnt):
    _, rows = learnt
    for name in ("rpn_score", "score", "box", "mask", "semantic", "fused"):
        first, last = (np.mean([row[name] for row in part]) for part in (rows[:5], rows[-5:]))
        assert last < 0.8 * first, name


def test_the_discs_it_saw_are_segmented(learnt):
    model, _ = learnt
    found = []
    for seed in range(4):
        image, truth = discs(5, seed=seed)
        labels, scores = model.predict_instances(image)
        ids = np.unique(labels[labels > 0])
        assert ids.tolist() == list(range(1, len(scores) + 1))
        assert labels.dtype == np.int32
        assert (np.diff(scores) <= 0).all()
        assert scores.min() >= 0
        assert scores.max() <= 1
        found.append(aji(truth, labels))
    assert np.mean(found) > 0.7, found


def test_both_maps_show_the_discs(learnt):
    model, _ = learnt
    image, truth = discs(5, seed=0)
    for probability in model.semantic_maps(image):
        assert probability.shape == truth.shape
        nuclei = probability > 0.5
        assert 2 * (nuclei & (truth > 0)).sum() / (nuclei.sum() + (truth > 0).sum()) > 0.85


def test_an_image_without_nuclei_and_odd_sizes_are_predicted(learnt):
    model, _ = learnt
    for shape in ((32, 45), (71, 33)):
        labels, scores = model.predict_instances(np.full((*shape, 3), 220, np.uint8))
        assert labels.shape == shape
        assert len(scores) == len(np.unique(labels)) - 1
    model = copy.deepcopy(model)
    model.config = dataclasses.replace(model.config, score=1.0)  # nothing is found
    labels, scores = model.predict_instances(np.full((64, 64, 3), 220, np.uint8))
    assert not labels.any()
    assert len(scores) == 0
    assert np.isfinite(model.semantic_maps(np.full((64, 64, 3), 220, np.uint8))).all()


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TINY, TINY_DPMSFF])
def test_on_a_gpu_the_loss_falls_in_bf16_and_some_or_no_nuclei_are_detected(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PFFNet("efficientnet_lite0", dataclasses.replace(config, batch_norm="train"), pretrained=False).cuda()
    settings = TrainingConfig(iterations=30, batch=4, crop=64, precision="bf16", log_every=1, validate_every=0)
    curve = train(model, [discs(5, seed=seed) for seed in range(4)], settings).curve
    first, last = (np.mean([row["total"] for row in part]) for part in (curve[:5], curve[-5:]))
    assert last < 0.95 * first
    image, _ = discs(5)
    for score, some in ((0.0, True), (1.0, False)):
        model.config = dataclasses.replace(model.config, score=score)
        labels, scores = model.predict_instances(image)
        assert (len(scores) > 0) == (labels.max() > 0) == some
        assert all(np.isfinite(maps).all() for maps in model.semantic_maps(image))


def test_both_names_have_their_own_defaults_and_one_may_take_the_others_switches():
    ours, theirs = PFFNetConfig(), DPMSFFConfig()
    assert (ours.fusion, ours.consistency, ours.quality) == ("attention", 1.0, 1.0)
    assert (theirs.fusion, theirs.consistency, theirs.quality) == ("paste", 0.0, 0.0)
    assert theirs == DPMSFFConfig(**{**dataclasses.asdict(ours), "fusion": "paste", "consistency": 0.0, "quality": 0.0})
    mixed = from_mapping(DPMSFFConfig, {"quality": 0.5, "strides": [4], "anchors": [[8]], "scale": 2}, "profile")
    assert (mixed.fusion, mixed.quality, mixed.anchors, mixed.scale) == ("paste", 0.5, ((8.0,),), 2.0)
    torch.manual_seed(0)
    assert models.build("dpmsff", "efficientnet_lite0", pretrained=False).config == theirs


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"fusion": "sum"}, "fusion"),
        ({"consistency": -1.0}, r"consistency: .*-1.0"),
        ({"fused": float("nan")}, "fused: .*nan"),
        ({"semantic_width": 0}, "semantic_width: .*0"),
        ({"quality_hidden": 0}, "quality_hidden"),
        ({"mask_widths": []}, "mask_widths"),
        ({"quality_widths": [2]}, "quality_widths: .*2"),
        ({"strides": [3], "anchors": [[8]]}, "strides"),
        ({"consistensy": 0.5}, "did you mean 'consistency'"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings_, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(PFFNetConfig, settings_, "profile")
