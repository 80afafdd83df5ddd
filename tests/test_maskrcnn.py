"""Mask R-CNN: batched pieces against torchvision's and brute force, targets, painting, whole images, learning."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import nms, roi_align

from nucseg.config import ConfigError, from_mapping
from nucseg.labels import IGNORE
from nucseg.models import boxes as boxes_module
from nucseg.models import build
from nucseg.models.boxes import (
    Targets,
    batched_nms,
    decode,
    encode,
    known_cells,
    make_anchors,
    mask_targets,
    match,
    pairwise_iou,
    sample,
    targets_from_labels,
    unknown_share,
)
from nucseg.models.maskrcnn import MaskRCNN, MaskRCNNConfig
from nucseg.models.painting import nms_across, paint, spans
from nucseg.recording import recording

TINY = MaskRCNNConfig(
    strides=(4, 8), anchors=((8.0, 16.0), (24.0, 32.0)), fpn_channels=16, box_widths=(32,), mask_widths=(16,),
    mask_pool=7, rpn_samples=32, roi_samples=16, roi_fraction=0.5, train_candidates=60, train_proposals=30,
    test_candidates=300, test_proposals=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained() -> MaskRCNN:
    torch.manual_seed(0)
    return build("maskrcnn", encoder="efficientnet_lite0", config=TINY)


@pytest.fixture
def model(pretrained) -> MaskRCNN:
    return copy.deepcopy(pretrained)


def random_boxes(rng: np.random.Generator, *shape: int, extent: float = 60) -> torch.Tensor:
    corner = rng.uniform(0, extent, (*shape, 2))
    return torch.tensor(np.concatenate((corner, corner + rng.uniform(2, 25, (*shape, 2))), -1), dtype=torch.float32)


def discs(count: int, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dark discs on a bright ground, with their label map."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), 220.0) + rng.normal(0, 4, (size, size, 3))
    labels = np.zeros((size, size), np.int32)
    y, x = np.mgrid[:size, :size]
    for number in range(1, count + 1):
        r, c, radius = *rng.uniform(8, size - 8, 2), rng.uniform(5, 8)
        disc = (y - r) ** 2 + (x - c) ** 2 < radius**2
        labels[disc], image[disc] = number, (90, 50, 130)
    return image.clip(0, 255).astype(np.uint8), labels


def batch(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [discs(5, seed=seed) for seed in range(count)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image, _ in pairs])
    return images, torch.stack([torch.from_numpy(labels).long() for _, labels in pairs])


# -- targets ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_targets_equal_a_loop_over_the_ids_of_each_image(seed):
    rng = np.random.default_rng(seed)
    maps = rng.choice([0, 0, 0, 3, 8, 70000], size=(3, 7, 9)) * rng.integers(0, 2, (3, 1, 1))
    targets = targets_from_labels(torch.from_numpy(maps), 70000 if seed % 2 else None)
    for b, labels in enumerate(maps):
        ids = np.unique(labels[labels > 0])
        assert targets.valid[b].tolist() == [i < len(ids) for i in range(targets.valid.shape[1])]
        rebuilt = np.zeros_like(labels)
        for place, value in enumerate(ids):
            rows, cols = np.nonzero(labels == value)
            expected = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
            assert targets.boxes[b, place].tolist() == expected
            rebuilt[labels == value] = place + 1
        assert np.array_equal(targets.index[b].numpy(), rebuilt)


def test_nuclei_for_whom_no_place_is_left_are_unknown():
    maps = torch.tensor([[[1, 1, 0, 7], [3, 3, 0, 9]], [[0, 2, 2, 0], [0, 0, IGNORE, 0]]])
    roomy, tight = targets_from_labels(maps, most=6), targets_from_labels(maps, 9, most=2)
    assert roomy.valid.tolist() == [[True] * 4 + [False] * 2, [True] + [False] * 5]
    plain = targets_from_labels(maps)
    assert torch.equal(roomy.boxes[:, :4], plain.boxes)
    assert torch.equal(roomy.index, plain.index)
    assert tight.valid.tolist() == [[True, True], [True, False]]
    assert torch.equal(tight.boxes, plain.boxes[:, :2])
    assert tight.index.tolist() == [[[1, 1, 0, IGNORE], [2, 2, 0, IGNORE]], plain.index[1].tolist()]
    assert not roomy.boxes[:, 4:].any()


def test_fixed_shapes_change_nothing_where_all_examples_are_drawn():
    """As in a recorded step: places worked on for nothing, and suppression by a fixed number of rounds."""
    everything = {"rpn_samples": 10**5, "roi_samples": 2000, "rpn_fraction": 1.0, "roi_fraction": 0.5}
    torch.manual_seed(1)
    config = dataclasses.replace(TINY, **everything, mask_samples=1000, densest=500)
    net = build("maskrcnn", "efficientnet_lite0", config, pretrained=False).train()
    images, labels = batch()
    losses = []
    for recorded in (False, True):
        net.zero_grad()
        with recording() if recorded else contextlib.nullcontext():
            terms = net.loss(images, labels)
            sum(terms.values()).backward()
        losses.append({**terms, "gradient": net.fpn.inner_blocks[0][0].weight.grad.clone()})
    assert losses[0]["mask"] > 0
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert net.remarks() == []


def test_a_recorded_step_says_that_its_crops_are_too_full():
    net = build("maskrcnn", "efficientnet_lite0", dataclasses.replace(TINY, densest=30), pretrained=False).train()
    images, labels = batch()
    with recording():
        for _ in range(2):
            net.loss(images, labels)
    assert net.config.places_for((64, 64)) == 4  # and there are five nuclei
    assert "in 2 recorded steps" in net.remarks()[0]
    assert "crowded" not in net.state_dict()


def test_small_crops_have_places_for_nuclei_that_their_border_cuts():
    config = MaskRCNNConfig()
    assert [config.places_for((side, side)) for side in (32, 64, 256, 1024)] == [13, 29, 256, 3442]
    assert config.places_for((256, 64)) == config.places_for((64, 256)) == 86


def test_the_anchors_of_a_recorded_step_outlive_their_cache(model):
    """A replayed graph reads them where they were."""
    images, labels = batch()
    with recording():
        model.train().loss(images, labels)
    anchors = weakref.ref(model._anchors)
    boxes_module._make_anchors.cache_clear()
    assert anchors() is not None


def test_a_batch_without_nuclei_has_empty_targets_and_a_finite_loss_with_gradient(model):
    images, labels = batch()
    assert not targets_from_labels(labels * 0).valid.any()
    losses = model.train().loss(images, labels * 0)
    assert losses["rpn_box"] == losses["box"] == losses["mask"] == 0
    sum(losses.values()).backward()
    assert model.pyramid.net.conv_stem.weight.grad.abs().sum() > 0


def test_mask_targets_equal_roi_align_of_each_binary_mask():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, (2, 5, 5)).repeat(6, 1).repeat(6, 2))
    targets = targets_from_labels(labels)
    boxes = random_boxes(rng, 20, extent=12).clamp(0, 30)
    image, place = torch.tensor(rng.integers(0, 2, 20)), torch.tensor(rng.integers(0, 3, 20))
    got = mask_targets(targets.index, image, place, boxes, 9)
    for i in range(20):
        mask = (targets.index[image[i]] == place[i] + 1).float()[None, None]
        roi = torch.cat((torch.zeros(1), boxes[i]))[None]
        expected = roi_align(mask, roi, 9, 1.0, sampling_ratio=1, aligned=True)[0, 0]
        torch.testing.assert_close(got[i], expected, atol=1e-4, rtol=0)


# -- unknown pixels --------------------------------------------------------------------------------------------------


def test_unknown_pixels_are_no_nucleus_and_their_share_of_a_box_is_counted():
    rng = np.random.default_rng(6)
    maps = rng.choice([IGNORE, 0, 4], size=(2, 20, 30))
    targets = targets_from_labels(torch.from_numpy(maps))
    assert targets.valid.sum(1).tolist() == [1, 1]
    assert np.array_equal(targets.index.numpy(), np.where(maps == 4, 1, maps))
    boxes = random_boxes(rng, 2, 40, extent=25) - 3
    got = unknown_share(targets.index, boxes)
    for b in range(2):
        for i, (x1, y1, x2, y2) in enumerate(boxes[b].round().int().clamp(min=0).tolist()):
            window = maps[b, y1:y2, x1:x2]
            assert got[b, i].item() == pytest.approx((window == IGNORE).mean() if window.size else 0)


def test_a_candidate_is_background_only_where_nothing_hidden_could_make_it_a_nucleus():
    rng = np.random.default_rng(7)
    truth, candidates = random_boxes(rng, 2, 5), random_boxes(rng, 2, 300)
    candidates[:, :5] = truth
    targets = Targets(truth, torch.ones(2, 5, dtype=torch.bool), torch.zeros(0))
    unknown = torch.tensor(rng.uniform(0, 1, (2, 300)), dtype=torch.float32)
    plain, got = match(candidates, targets, 0.7, 0.3, True), match(candidates, targets, 0.7, 0.3, True, unknown)
    assert torch.equal(got.positive, plain.positive & (unknown <= 0.5))
    assert torch.equal(got.negative, plain.negative & (unknown < 0.3))
    same = match(candidates, targets, 0.7, 0.3, True, unknown * 0)
    assert all(torch.equal(a, b) for a, b in zip(same, plain, strict=True))


def test_unknown_areas_make_no_example_and_no_gradient(model, monkeypatch):
    images, labels = batch()
    labels[:, :, 24:] = IGNORE
    index = targets_from_labels(labels).index
    seen, rois = {}, []
    propose, rpn_loss, pool = model._propose, model._rpn_loss, model._pool

    def watched_loss(logits, offsets, anchors, targets):
        seen.update(logits=logits.detach().requires_grad_(), offsets=offsets.detach().requires_grad_(), anchors=anchors)
        return rpn_loss(seen["logits"], seen["offsets"], anchors, targets)

    def watched_pool(features, image, boxes, size):
        rois.append((image, boxes))
        return pool(features, image, boxes, size)

    monkeypatch.setattr(model, "_rpn_loss", watched_loss)
    monkeypatch.setattr(model, "_pool", watched_pool)
    monkeypatch.setattr(model, "_propose", propose)
    torch.manual_seed(0)
    losses = model.train().loss(images, labels)
    sum(losses.values()).backward()
    share = unknown_share(index, seen["anchors"].expand(2, -1, 4))
    assert (share >= TINY.rpn_below).any()
    assert not seen["logits"].grad[share >= TINY.rpn_below].any()
    assert seen["logits"].grad[share < TINY.rpn_below].any()
    assert not seen["offsets"].grad[share > 0.5].any()
    for image, boxes in rois:
        assert len(boxes)
        assert all(unknown_share(index, boxes[None].expand(2, -1, 4))[image, torch.arange(len(boxes))] <= 0.5)


def test_masks_are_not_taught_on_unknown_pixels(model, monkeypatch):
    images, labels = batch()
    said = []
    head = model.mask_head.forward

    def watched(pooled):
        said.append(head(pooled).detach().requires_grad_())
        return said[-1]

    monkeypatch.setattr(model.mask_head, "forward", watched)
    cut = []
    monkeypatch.setattr("nucseg.models.maskrcnn.known_cells", lambda *args: cut.append(known_cells(*args)) or cut[-1])
    for hidden in (False, True):
        if hidden:
            labels[:, 30:34] = IGNORE
        torch.manual_seed(0)
        model.train().loss(images, labels)["mask"].backward()
        gradient, known = said[-1].grad, cut[-1]
        assert known.all() == (not hidden)
        assert not gradient[~known].any()
        assert gradient[known].all()
        assert gradient.abs().sum() == pytest.approx(gradient[known].abs().sum())


# -- a fixed number of places, as on a GPU ----------------------------------------------------------------------------


def every_place(used):
    return torch.ones_like(used).nonzero(as_tuple=True)


@pytest.mark.parametrize("hidden", [False, True])
def test_places_worked_on_for_nothing_change_neither_loss_nor_gradient(model, monkeypatch, hidden):
    images, labels = batch(3)
    labels[2] = 0  # no positive place at all
    if hidden:
        labels[1] = IGNORE  # no place at all
    model.train()
    results = []
    for fixed in (False, True):
        if fixed:
            monkeypatch.setattr("nucseg.models.maskrcnn.places", every_place)
        torch.manual_seed(0)
        model.zero_grad()
        losses = model.loss(images, labels)
        sum(losses.values()).backward()
        results.append((losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, msg=name)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_step_waits_for_the_device_once_beside_the_suppression(model, monkeypatch):
    waits = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name().split("::")[1].split(".")[0]
            if name in (
                "_local_scalar_dense",
                "nonzero",
                "_unique2",
                "bincount",
                "masked_select",
                "equal",
                "lift_fresh",
            ):
                waits.append(name)
            if name in ("index", "index_put_"):
                waits.extend(name for i in args[1] if i is not None and i.dtype == torch.bool)
            return function(*args, **(kwargs or {}))

    def places(used):
        return every_slot[used.shape]

    every_slot = {shape: every_place(torch.zeros(shape)) for shape in ((2, 32), (2, 16), (2, 8))}
    monkeypatch.setattr("nucseg.models.maskrcnn.places", places)
    images, labels = batch()
    model.train().loss(images, labels)  # anchors are made once
    model.largest_id = 5
    with Count():
        sum(model.loss(images, labels).values()).backward()
    assert waits.count("_local_scalar_dense") + waits.count("equal") == len(waits), waits
    assert waits.count("_local_scalar_dense") <= 1 + waits.count("equal")


def test_proposals_of_a_diverged_network_stay_inside_the_image(model):
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(50, 4)
    offsets = torch.full((2, 50, 4), torch.nan)
    offsets[1, :, 2:] = torch.inf
    boxes, used = model._train_proposals(torch.randn(2, 50), offsets, anchors, (64, 64))
    assert not used[0].any()
    assert ((boxes >= 0) & (boxes <= 64 * model.config.scale)).all()


def test_a_crop_of_which_nothing_is_known_teaches_nothing(model):
    images, labels = batch()
    losses = model.train().loss(images, torch.full_like(labels, IGNORE))
    assert all(value == 0 for value in losses.values()), losses
    sum(losses.values()).backward()


# -- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (10.0, 5.0)])
def test_offsets_equal_torchvision_and_decode_inverts_them(weights):
    rng = np.random.default_rng(1)
    boxes, anchors = random_boxes(rng, 50), random_boxes(rng, 50)
    reference = BoxCoder((weights[0], weights[0], weights[1], weights[1]))
    offsets = encode(boxes, anchors, weights)
    torch.testing.assert_close(offsets, reference.encode_single(boxes, anchors), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode(offsets, anchors, weights), boxes, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("together", [256, 4])
@pytest.mark.parametrize(("above", "below", "keep_best"), [(0.7, 0.3, True), (0.5, 0.5, False)])
def test_matching_equals_torchvision_image_by_image(above, below, keep_best, together, monkeypatch):
    monkeypatch.setattr(boxes_module, "_TOGETHER", together)
    rng = np.random.default_rng(2)
    truth, candidates = random_boxes(rng, 3, 6), random_boxes(rng, 3, 200)
    candidates[:, :6] = truth + torch.tensor(rng.normal(0, 1, truth.shape), dtype=torch.float32)
    valid = torch.arange(6) < torch.tensor([[6], [2], [1]])
    got = match(candidates, Targets(truth, valid, torch.zeros(0)), above, below, keep_best)
    assert got.positive.any()
    for b in range(3):
        boxes = truth[b][valid[b]]
        iou = pairwise_iou(boxes[None], candidates[b][None])[0]
        expected = Matcher(above, below, keep_best)(iou)
        if keep_best:  # torchvision also takes the best of a box that touches no candidate, at IoU 0
            assert (iou.amax(1) > 0).all()
        assert torch.equal(got.positive[b], expected >= 0)
        assert torch.equal(got.negative[b], expected == Matcher.BELOW_LOW_THRESHOLD)
        assert torch.equal(got.place[b][got.positive[b]], expected[expected >= 0])


def test_batched_suppression_is_greedy_suppression():
    rng = np.random.default_rng(3)
    boxes = random_boxes(rng, 4, 150, extent=40)
    scores = torch.arange(150, 0, -1).float()
    for threshold in (0.3, 0.7):
        keep = batched_nms(boxes, threshold)
        for b in range(4):
            assert torch.equal(keep[b].nonzero()[:, 0], nms(boxes[b], scores, threshold).sort().values)
        assert torch.equal(batched_nms(boxes, threshold, 60), keep)
    keep, few = (batched_nms(boxes, 0.1, rounds) for rounds in (None, 2))
    assert (few | keep).equal(few)  # what is not settled stays
    assert not few.equal(keep)


def test_sampling_respects_count_fraction_and_kind():
    torch.manual_seed(0)
    positive = torch.zeros(3, 100, dtype=torch.bool)
    positive[0, :50] = positive[1, :4] = True
    negative = ~positive
    negative[:, 90:] = False
    index, is_positive, drawn = sample(positive, negative, 20, 0.25)
    assert is_positive.sum(1).tolist() == [5, 4, 0]
    assert drawn.sum(1).tolist() == [20, 20, 20]
    for b in range(3):
        assert positive[b, index[b][is_positive[b]]].all()
        assert negative[b, index[b][drawn[b] & ~is_positive[b]]].all()
        assert len(index[b][drawn[b]].unique()) == 20


def test_anchors_are_centred_on_their_cells():
    anchors = make_anchors([(2, 3)], (4,), ((8.0,),), (0.5, 1.0, 2.0), torch.device("cpu")).reshape(2, 3, 3, 4)
    assert anchors[1, 2, 1].tolist() == [6.0, 2.0, 14.0, 10.0]
    sides = anchors[0, 0, :, 2:] - anchors[0, 0, :, :2]
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(sides.prod(1), torch.full((3,), 64.0))


# -- one label map ---------------------------------------------------------------------------------------------------


def paint_by_full_masks(boxes, masks, shape, threshold, drop_covered, min_area):
    """The obvious way: one mask of the whole image per detection, pixel by pixel."""
    labels, kept = np.zeros(shape, np.int32), []
    for i, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        full = np.zeros(shape, bool)
        grid = masks[i].double().numpy()
        m = len(grid)
        for r in range(shape[0]):
            for c in range(shape[1]):
                if x1 <= c + 0.5 <= x2 and y1 <= r + 0.5 <= y2:
                    u = np.clip((c + 0.5 - x1) / (x2 - x1) * m - 0.5, 0, m - 1)
                    v = np.clip((r + 0.5 - y1) / (y2 - y1) * m - 0.5, 0, m - 1)
                    a, b = min(int(u), m - 2), min(int(v), m - 2)
                    fu, fv = u - a, v - b
                    top = grid[b, a] * (1 - fu) + grid[b, a + 1] * fu
                    bottom = grid[b + 1, a] * (1 - fu) + grid[b + 1, a + 1] * fu
                    full[r, c] = top * (1 - fv) + bottom * fv > threshold
        free = full & (labels == 0)
        if free.sum() >= max(1, min_area) and full.sum() - free.sum() <= drop_covered * full.sum():
            kept.append(i)
            labels[free] = len(kept)
    return labels, kept


@pytest.mark.parametrize("seed", range(3))
def test_painting_equals_full_masks_in_order_of_score(seed):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, 30, extent=40).clamp(max=48)
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)]
    scores = torch.tensor(np.sort(rng.uniform(0.5, 1, len(boxes)))[::-1].copy(), dtype=torch.float32)
    masks = torch.tensor(rng.uniform(0.2, 1, (len(boxes), 8, 8)), dtype=torch.float32)
    labels, got_scores = paint(boxes, scores, masks, (44, 48), 0.5, 0.7, 10)
    expected, kept = paint_by_full_masks(boxes, masks, (44, 48), 0.5, 0.7, 10)
    assert 3 < len(kept) < len(boxes)  # some were dropped
    assert np.array_equal(labels, expected)
    assert np.array_equal(got_scores, scores.numpy()[kept])


def test_a_whole_mask_keeps_its_box():
    labels, _ = paint(torch.tensor([[3.0, 5.0, 20.0, 11.0]]), torch.ones(1), torch.ones(1, 28, 28), (30, 40))
    rows, cols = np.nonzero(labels)
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (5, 11, 3, 20)
    assert (labels > 0).sum() == 6 * 17


def test_no_detection_gives_an_empty_map():
    labels, scores = paint(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 28, 28), (40, 50))
    assert labels.shape == (40, 50)
    assert not labels.any()
    assert scores.shape == (0,)


# -- the model -------------------------------------------------------------------------------------------------------


def test_every_layer_gets_a_gradient_and_the_loss_is_deterministic_under_a_seed(model):
    images, labels = batch()
    model.train()
    values = []
    for _ in range(2):
        torch.manual_seed(5)
        values.append({name: float(term.detach()) for name, term in model.loss(images, labels).items()})
    assert values[0] == values[1]
    assert set(values[0]) == {"rpn_score", "rpn_box", "score", "box", "mask"}
    sum(model.loss(images, labels).values()).backward()
    used = [p for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert model.pyramid.net.conv_stem.weight.grad.abs().sum() > 0
    assert {id(p) for p in (*model.fpn.parameters(), *model.rpn.parameters(), *model.mask_head.parameters())} <= {
        id(p) for p in used
    }


def test_frozen_batchnorm_keeps_its_statistics_and_trains_its_weights(model):
    images, labels = batch()
    norm = model.pyramid.net.bn1
    before = norm.running_mean.clone()
    sum(model.train().loss(images, labels).values()).backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.grad.abs().sum() > 0


def test_masks_are_learnt_on_a_bounded_number_of_positive_rois(model, monkeypatch):
    images, labels = batch(3)
    labels[2] = 0
    model.config = dataclasses.replace(TINY, mask_samples=4)
    pooled = []

    def pool(features, image, rois, size):
        pooled.append(image)
        return torch.zeros(len(image), TINY.fpn_channels, size, size)

    monkeypatch.setattr(model, "_pool", pool)
    model.train().loss(images, labels)
    boxes, masks = pooled
    assert torch.bincount(masks, minlength=3).tolist() == [4, 4, 0]
    assert torch.bincount(boxes, minlength=3).max() <= TINY.roi_samples


@pytest.fixture(scope="module")
def learnt(pretrained) -> tuple[MaskRCNN, list[float]]:
    """A model that has seen one batch of discs a few dozen times."""
    model = copy.deepcopy(pretrained).train()
    images, labels = batch(4)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    totals = []
    for _ in range(60):
        total = sum(model.loss(images, labels).values())
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        totals.append(float(total.detach()))
    return model, totals


def test_the_loss_falls(learnt):
    assert np.mean(learnt[1][-5:]) < 0.6 * np.mean(learnt[1][:5])


def test_a_prediction_is_a_label_map_with_one_score_per_id_best_first(learnt):
    image, truth = discs(5, seed=0)
    labels, scores = learnt[0].predict_instances(image)
    ids = np.unique(labels[labels > 0])
    assert labels.shape == image.shape[:2]
    assert labels.dtype == np.int32
    assert len(ids) >= 3
    assert ids.tolist() == list(range(1, len(scores) + 1))
    assert (np.diff(scores) <= 0).all()
    assert scores.min() >= TINY.score
    overlap = np.count_nonzero((labels > 0) & (truth > 0)) / np.count_nonzero((labels > 0) | (truth > 0))
    assert overlap > 0.6


def test_prediction_neither_leaves_the_training_mode_nor_changes_with_repetition(learnt):
    model, _ = learnt
    model.train()
    image, _ = discs(5, seed=1)
    first, second = model.predict_instances(image), model.predict_instances(image)
    assert model.training
    assert np.array_equal(first.labels, second.labels)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_training_and_prediction_see_the_same_scale(model, scale):
    """The proposals of a crop in training are those of the same crop as a whole image, in the image's pixels."""
    model.config = from_mapping(MaskRCNNConfig, {"scale": scale, "strides": [4, 8], "anchors": [[8, 16], [24, 32]]}, "")
    model.eval()
    images, _ = batch(1)
    seen = {}
    model.pyramid.register_forward_hook(lambda module, inputs, output: seen.setdefault("shapes", []).append(inputs[0]))
    model.loss(images, torch.zeros((1, 64, 64), dtype=torch.int64))
    model.predict_instances((images[0].permute(1, 2, 0) * 255).round().byte().numpy())
    in_training, at_test = seen["shapes"]
    assert in_training.shape == at_test.shape == (1, 3, 64 * scale, 64 * scale)
    torch.testing.assert_close(in_training, at_test, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_perfect_network_returns_the_box_and_mask_of_the_object(model, scale, monkeypatch):
    """With outputs that encode the truth, what comes out has the object's size in image pixels at any scale."""
    settings_ = {"scale": scale, "strides": [4], "anchors": [[16]], "ratios": [1.0], "min_area": 1}
    model.config = from_mapping(MaskRCNNConfig, settings_, "")
    truth = torch.tensor([[9.0, 14.0, 31.0, 26.0]])

    def propose(levels):
        anchors = make_anchors([levels[0].shape[-2:]], (4,), ((16 * scale,),), (1.0,), truth.device)
        offsets = encode((truth * scale).expand(len(anchors), 4), anchors, (1.0, 1.0))
        return torch.ones(1, len(anchors)), offsets[None], anchors

    monkeypatch.setattr(model, "_propose", propose)
    monkeypatch.setattr(model.box_head, "forward", lambda x: (torch.full((len(x),), 9.0), torch.zeros(len(x), 4)))
    monkeypatch.setattr(model.mask_head, "forward", lambda x: torch.full((len(x), 14, 14), 9.0))
    labels, scores = model.predict_instances(discs(1, size=70)[0])
    assert len(scores) == 1
    expected = np.zeros((70, 70), np.int32)
    expected[14:26, 9:31] = 1
    assert np.array_equal(labels, expected)


def test_tiles_double_and_cut_no_nucleus(learnt):
    model, _ = learnt
    image, _ = discs(16, size=160, seed=3)
    config = model.config
    try:
        whole = model.predict_instances(image)
        model.config = from_mapping(
            MaskRCNNConfig, {"tile": 96, "overlap": 48, "strides": [4, 8], "anchors": [[8, 16], [24, 32]]}, ""
        )
        tiled = model.predict_instances(image)
    finally:
        model.config = config
    assert len(whole.scores) >= 8
    assert abs(len(tiled.scores) - len(whole.scores)) <= 1
    both = np.count_nonzero((whole.labels > 0) & (tiled.labels > 0))
    # Of a briefly trained network: on most machines more than 0.9 of the pixels are the same, on one 0.897.
    assert both > 0.85 * np.count_nonzero((whole.labels > 0) | (tiled.labels > 0))


@given(st.integers(1, 400), st.integers(8, 100), st.data())
def test_tiles_own_every_pixel_once_and_see_half_the_overlap_around_it(length, tile, data):
    overlap = data.draw(st.integers(0, tile // 2))
    parts = spans(length, tile, overlap)
    owned = [x for _, _, low, high in parts for x in range(low, high)]
    assert owned == list(range(length))
    for start, end, low, high in parts:
        assert 0 <= start <= low < high <= end <= length
        assert end - start <= tile
        assert start == 0 or low - start >= overlap // 2
        assert end == length or end - high >= overlap // 2


@pytest.mark.parametrize("seed", range(3))
def test_suppression_across_tiles_equals_suppression_of_everything(seed):
    """Two tiles, each suppressed in itself and owning the boxes whose centre is on its side of the cut at 100."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, 400, extent=70) + torch.tensor([50.0, 0.0, 50.0, 0.0])
    scores = torch.tensor(rng.permutation(400), dtype=torch.float32)
    left = (boxes[:, 0] + boxes[:, 2]) / 2 < 100
    own = torch.cat(
        [part[nms(boxes[part], scores[part], 0.4)] for part in (left.nonzero()[:, 0], (~left).nonzero()[:, 0])]
    )
    boxes, scores = boxes[own], scores[own]
    got = nms_across(boxes, scores, 0.4, [100], [])
    assert len(got) < len(boxes)
    assert torch.equal(got, nms(boxes, scores, 0.4))


def test_any_size_from_32_pixels_is_predicted(learnt):
    for shape in ((32, 45), (71, 33)):
        assert learnt[0].predict_instances(np.zeros((*shape, 3), np.uint8)).labels.shape == shape


def test_resnet50_starts_from_a_file_of_weights(tmp_path):
    torch.manual_seed(1)
    state = timm.create_model("resnet50", pretrained=False).state_dict()
    torch.save(state, tmp_path / "resnet50.pth")
    model = build("maskrcnn", encoder="resnet50", config=TINY, weights=tmp_path / "resnet50.pth")
    assert torch.equal(model.pyramid.net.conv1.weight, state["conv1.weight"])
    assert torch.equal(model.pyramid.net.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])
    images, labels = batch(1)
    total = sum(model.train().loss(images, labels).values())
    total.backward()
    assert torch.isfinite(total)
    assert model.pyramid.net.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"strides": [4, 8]}, "anchors"),
        ({"strides": [4, 8], "anchors": [[8, 16], [32]]}, "anchors"),
        ({"strides": [3], "anchors": [[8]]}, "strides"),
        ({"score": 1.5}, "score"),
        ({"overlap": 600}, "overlap"),
        ({"detections": 0}, "detections"),
        ({"nmss": 0.5}, "did you mean 'nms'"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings_, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(MaskRCNNConfig, settings_, "profile")


def test_an_image_of_the_wrong_kind_is_refused(model):
    with pytest.raises(ValueError, match="image: expected"):
        model.predict_instances(np.zeros((64, 64, 3), np.float32))
