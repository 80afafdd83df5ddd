"""HoVer targets, losses, post-processing, and the two networks that use them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nuclei import ellipses, picture, two_touching
from safetensors.torch import save_file
from scipy import ndimage
from skimage.segmentation import watershed

from nucseg.inference import InferenceConfig
from nucseg.labels import IGNORE
from nucseg.models import REGISTRY, build, config_class
from nucseg.models.hover import HoverConfig, hover_losses, hv_targets, instances_from_maps
from nucseg.models.hoverlite import HoverLiteConfig
from nucseg.models.hovernet import HoverNetConfig, _Grouped
from nucseg.models.maps import mark_the_rest
from nucseg.norm_act import crop
from nucseg.training import TrainingConfig, train

SMALL = HoverLiteConfig(widths=(16, 16, 8, 8), frozen=2, inference=InferenceConfig(tile=128, overlap=32))


def hv_by_loop(labels, smallest):
    hv = np.zeros((2, *labels.shape), dtype=np.float32)
    for i in np.unique(labels[labels > 0]):
        y, x = np.nonzero(labels == i)
        if len(y) < smallest:
            continue
        for channel, place in ((0, x), (1, y)):
            offset = (place - np.floor(place.mean() + 0.5)).astype(np.float32)
            offset[offset < 0] /= max(-offset.min(), 1)
            offset[offset > 0] /= max(offset.max(), 1)
            hv[channel][y, x] = offset
    return hv


@pytest.mark.parametrize("smallest", [0, 60])
def test_targets_equal_a_loop_over_nuclei(smallest):
    maps = np.stack([ellipses(seed=s) for s in range(3)] + [np.zeros((96, 96), dtype=np.int32)])
    inside, hv = hv_targets(torch.from_numpy(maps), smallest)
    assert np.array_equal(inside.numpy(), maps > 0)
    for found, labels in zip(hv, maps, strict=True):
        np.testing.assert_allclose(found.numpy(), hv_by_loop(labels, smallest), atol=1e-6)


def test_targets_do_not_depend_on_the_ids():
    labels = ellipses()
    other = np.where(labels > 0, 5000 - labels, 0)
    first, second = (hv_targets(torch.from_numpy(maps)[None])[1] for maps in (labels, other))
    assert torch.equal(first, second)


def test_perfect_maps_cost_nothing_and_worse_ones_more():
    inside, hv = hv_targets(torch.from_numpy(ellipses())[None])
    logits = torch.stack((~inside, inside), dim=1).float() * 40
    perfect = hover_losses(logits, hv, inside, hv)
    assert all(value < 1e-3 for value in perfect.values())
    worse = hover_losses(-logits, -hv, inside, hv)
    assert all(worse[name] > 0.05 for name in perfect)
    empty = torch.zeros_like(inside)
    assert all(torch.isfinite(v) for v in hover_losses(logits, hv, empty, torch.zeros_like(hv)).values())


def test_the_gradient_term_equals_the_published_kernel():
    rng = np.random.default_rng(0)
    inside = torch.from_numpy(rng.random((1, 20, 20)) > 0.5)
    predicted, target = (torch.from_numpy(rng.random((1, 2, 20, 20), dtype=np.float32)) for _ in range(2))
    steps = np.arange(-2, 3)
    h, v = np.meshgrid(steps, steps)
    kernel = h / (h**2 + v**2 + 1e-15)
    total = 0.0
    for channel, k in ((0, kernel), (1, kernel.T)):
        a, b = (
            ndimage.correlate(maps[0, channel].numpy().astype(float), k, mode="constant")
            for maps in (predicted, target)
        )
        total += ((a - b) ** 2)[inside[0].numpy()].sum()
    expected = total / (2 * inside.sum().item())
    terms = hover_losses(torch.zeros(1, 2, 20, 20), predicted, inside, target)
    assert terms["hv_gradient"].item() == pytest.approx(expected, rel=1e-4)


def test_the_terms_do_not_depend_on_the_precision_of_the_step():
    labels = torch.from_numpy(two_touching(40))[None]
    inside, target = hv_targets(labels, 0)
    logits, hv = torch.randn(1, 2, *labels.shape[1:]), torch.randn(1, 2, *labels.shape[1:])
    exact = hover_losses(logits, hv, inside, target)
    with torch.autocast("cpu", torch.bfloat16):
        found = hover_losses(logits, hv, inside, target)
    assert found == exact


def with_hole(labels, rows=slice(20, 60), cols=slice(30, 70)):
    labels = labels.copy()
    labels[..., rows, cols] = IGNORE
    return labels


def test_what_is_said_inside_an_unknown_area_changes_no_term_and_gets_no_gradient():
    rng = torch.Generator().manual_seed(0)
    maps = torch.from_numpy(with_hole(np.stack([ellipses(seed=s) for s in range(2)])))
    known = maps != IGNORE
    inside, target = hv_targets(maps, 30)
    assert not inside[~known].any()
    logits, hv = (torch.randn(2, 2, 96, 96, generator=rng).requires_grad_() for _ in range(2))
    other = [torch.where(known[:, None], a, torch.randn(a.shape, generator=rng)) for a in (logits, hv)]
    first, second = hover_losses(logits, hv, inside, target, known), hover_losses(*other, inside, target, known)
    assert {name: v.item() for name, v in first.items()} == {name: v.item() for name, v in second.items()}
    for gradient in torch.autograd.grad(sum(first.values()), (logits, hv)):
        assert not gradient.movedim(1, -1)[~known].any()
        assert gradient.movedim(1, -1)[known].any(dim=-1).all()
    plain = hover_losses(logits, hv, inside, target)
    assert all(first[name] != plain[name] for name in first)


def test_terms_over_the_known_pixels_are_those_of_a_loop_over_them():
    rng = torch.Generator().manual_seed(1)
    maps = torch.from_numpy(with_hole(ellipses())[None])
    known, (inside, target) = maps != IGNORE, hv_targets(maps)
    logits, hv = (torch.randn(1, 2, 96, 96, generator=rng) for _ in range(2))
    got = hover_losses(logits, hv, inside, target, known)
    p, q = logits.movedim(1, -1)[known], inside[known].long()
    assert got["np_ce"].item() == pytest.approx(F.cross_entropy(p, q).item(), rel=1e-5)
    assert got["hv_mse"].item() == pytest.approx(F.mse_loss(*(a.movedim(1, -1)[known] for a in (hv, target))).item())
    share = p.softmax(dim=1)
    dice = [1 - (2 * share[q == c, c].sum() + 1e-3) / (share[:, c].sum() + (q == c).sum() + 1e-3) for c in (0, 1)]
    assert got["np_dice"].item() == pytest.approx(sum(dice).item(), rel=1e-5)


def test_without_unknown_pixels_the_terms_are_the_published_ones_to_the_last_bit():
    rng = torch.Generator().manual_seed(2)
    inside, target = hv_targets(torch.from_numpy(np.stack([ellipses(seed=s) for s in range(3)])), 30)
    logits, hv = (torch.randn(3, 2, 96, 96, generator=rng).requires_grad_() for _ in range(2))
    truth, share = torch.stack((~inside, inside), dim=1).float(), logits.softmax(dim=1)
    overlap = 2 * (share * truth).sum(dim=(0, 2, 3)) + 1e-3
    ce, mse = F.cross_entropy(logits, inside.long()), F.mse_loss(hv, target)
    dice = (1 - overlap / (share.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3)) + 1e-3)).sum()
    got = hover_losses(logits, hv, inside, target, torch.ones_like(inside))
    assert [got[name].item() for name in ("np_ce", "np_dice", "hv_mse")] == [ce.item(), dice.item(), mse.item()]
    assert torch.equal(*(torch.autograd.grad(a + b, hv)[0] for a, b in ((mse, 0), (got["hv_mse"], 0))))
    assert torch.equal(
        *(torch.autograd.grad(a + b, logits)[0] for a, b in ((ce, dice), (got["np_ce"], got["np_dice"])))
    )


def test_a_crop_of_which_nothing_is_known_costs_nothing():
    nothing = torch.full((1, 64, 64), IGNORE, dtype=torch.int32)
    model = build("hoverlite", config=SMALL, pretrained=False)
    terms = model.loss(torch.rand(1, 3, 64, 64), nothing)
    assert all(torch.isfinite(value) for value in terms.values())
    assert terms["np_ce"] == terms["hv_mse"] == terms["hv_gradient"] == 0


def test_each_nucleus_is_scaled_by_itself_whatever_lies_beside_it():
    labels = np.zeros((128, 128), dtype=np.int32)
    labels[5:40, 5:40] = ellipses(40)[:35, :35]
    alone = hv_targets(torch.from_numpy(labels)[None], 30)[1]
    crowded = labels.copy()
    crowded[50:, :] = 9000  # a giant, cut by three borders of the crop
    crowded[0:30, 60:128] = 9001  # another, in two pieces
    crowded[10:20, 80:90] = 0
    crowded[45:48, 120:128] = 9002  # and a sliver of one that lies outside
    beside = hv_targets(torch.from_numpy(crowded)[None], 30)[1]
    assert torch.equal(beside[..., :45, :55], alone[..., :45, :55])
    np.testing.assert_allclose(beside[0].numpy(), hv_by_loop(crowded, 30), atol=1e-6)
    giant = beside[0][:, 50:]
    assert (giant.min(), giant.max()) == (-1, 1)


def true_maps(labels):
    inside, hv = hv_targets(torch.from_numpy(labels)[None])
    return np.concatenate((inside.float().numpy(), hv[0].numpy()))


def mean_iou(true, pred):
    scores = []
    for i in np.unique(true[true > 0]):
        overlaps = np.bincount(pred[true == i], minlength=2)
        overlaps[0] = 0
        j = overlaps.argmax()
        scores.append(overlaps[j] / np.count_nonzero((true == i) | (pred == j)) if overlaps[j] else 0.0)
    return float(np.mean(scores))


def test_true_maps_give_back_the_nuclei_also_where_they_touch():
    labels = two_touching()
    assert ndimage.label(labels)[1] == 1
    found = instances_from_maps(true_maps(labels), HoverConfig())
    assert len(found.scores) == 2
    assert mean_iou(labels, found.labels) > 0.95
    np.testing.assert_allclose(found.scores, 1.0)


def test_crowded_nuclei_are_mostly_recovered():
    labels = np.concatenate([ellipses(seed=s) for s in range(4)], axis=1)
    labels = np.where(labels > 0, labels + 1000 * (np.arange(labels.shape[1]) // 96), 0).astype(np.int32)
    assert mean_iou(labels, instances_from_maps(true_maps(labels), HoverConfig()).labels) > 0.75


def test_an_artefact_elsewhere_does_not_change_a_nucleus():
    labels = np.pad(two_touching(), ((0, 0), (0, 100)))
    maps = true_maps(labels)
    maps[1:] *= 0.6  # an undertrained network
    plain = instances_from_maps(maps, HoverConfig()).labels
    maps[0, 30:34, 140:150] = 1
    maps[1, 30:34, 140:145], maps[1, 30:34, 145:150] = 9.0, -9.0
    disturbed = instances_from_maps(maps, HoverConfig()).labels
    assert plain.max() == 2
    assert mean_iou(plain[:, :100], disturbed[:, :100]) > 0.97


def test_a_giant_nucleus_elsewhere_changes_nothing():
    labels = np.concatenate([ellipses(seed=s) + 1000 * s * (ellipses(seed=s) > 0) for s in range(2)], axis=1)
    maps = true_maps(np.pad(labels.astype(np.int32), ((0, 210), (0, 0))))
    maps[1:] *= 0.7
    plain = instances_from_maps(maps, HoverConfig()).labels[:100]
    y, x = np.mgrid[-95:95, -90:90] / 95
    maps[0, 110:300, 6:186], maps[1:, 110:300, 6:186] = 1, np.stack((x, y)) * 0.7
    beside = instances_from_maps(maps, HoverConfig()).labels[:100]
    assert plain.max() > 15
    assert mean_iou(plain, beside) > 0.99


def test_small_holes_are_filled_and_large_ones_are_not():
    maps = true_maps(np.kron([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.ones((30, 30), dtype=np.int32)).astype(np.int32))
    maps[0, 40:44, 40:44] = 0.1
    assert instances_from_maps(maps, HoverConfig(max_hole=20)).labels[40:44, 40:44].all()
    assert not instances_from_maps(maps, HoverConfig(max_hole=10)).labels[40:44, 40:44].any()


def test_empty_and_tiny_maps():
    nothing = instances_from_maps(np.zeros((3, 40, 40), dtype=np.float32), HoverConfig())
    assert not nothing.labels.any()
    assert nothing.scores.shape == (0,)
    maps = np.zeros((3, 40, 40), dtype=np.float32)
    maps[0, 10:15, 10:15] = 0.7  # too small for a marker after opening, large enough for a nucleus
    found = instances_from_maps(maps, HoverConfig())
    assert (found.labels > 0).sum() == 25
    assert found.scores[0] == pytest.approx(0.7)
    full = instances_from_maps(np.ones((3, 40, 40), dtype=np.float32), HoverConfig())
    assert full.labels.dtype == np.int32
    assert (full.labels == 1).all()


def plain_instances(maps, config):
    """The same steps as one would write them with SciPy and scikit-image, on whole images."""

    def at_least(mask, area):
        parts, count = ndimage.label(mask)
        return np.isin(parts, np.flatnonzero(np.bincount(parts.ravel(), minlength=count + 1)[1:] >= area) + 1)

    probability, hv = maps[0], np.clip(maps[1:], -1, 1)
    mask = at_least(~at_least(probability < config.threshold, config.max_hole), config.min_marker)
    if not mask.any():
        return np.zeros(mask.shape, dtype=np.int32), np.zeros(0, dtype=np.float32)
    hv = np.clip(hv * (0.8 / max(float(np.percentile(np.abs(hv[:, mask]), 90)), 0.1)), -1, 1)
    unit = config.sigma * np.sqrt(2 * np.pi) / 2
    falls = [-unit * ndimage.gaussian_filter(component, config.sigma, order=order, truncate=4.5)
             for component, order in zip(hv, ((0, 1), (1, 0)), strict=True)]  # fmt: skip
    edge = np.clip(np.maximum(*falls), 0, 1)
    core = ndimage.binary_fill_holes(mask & (edge < config.edge))
    disc = np.hypot(*np.mgrid[-2:3, -2:3]) < 2.5
    markers, _ = ndimage.label(at_least(ndimage.binary_opening(core, disc), config.min_marker))
    labels = watershed(ndimage.gaussian_filter(edge, 0.8), mark_the_rest(markers, mask), mask=mask)
    area, total = np.bincount(labels.ravel()), np.bincount(labels.ravel(), weights=probability.ravel())
    kept = [i for i in range(1, len(area)) if area[i] >= max(config.min_area, 1)]
    number = np.zeros(len(area), dtype=np.int32)
    number[kept] = 1 + np.arange(len(kept))
    return number[labels], np.clip(total[kept] / area[kept], 0, 1).astype(np.float32)


@pytest.mark.parametrize("noise", [0, 0.1, 0.4])
@pytest.mark.parametrize("size", [(96, 96), (131, 256), (40, 33)])
def test_nuclei_and_scores_are_those_of_the_plain_steps_to_the_last_bit(size, noise):
    touching = 0
    for seed in range(8):
        labels = ellipses(256, count=20 * (seed + 1), seed=seed)[: size[0], : size[1]] if seed else np.zeros(size, int)
        rng = np.random.default_rng(seed)
        maps = true_maps(labels.astype(np.int32)) + noise * rng.normal(size=(3, *size)).astype(np.float32)
        maps = np.stack([ndimage.gaussian_filter(component, noise) for component in maps]) if noise else maps
        before = maps.copy()
        found = instances_from_maps(maps, HoverConfig())
        expected_labels, expected_scores = plain_instances(maps, HoverConfig())
        assert np.array_equal(found.labels, expected_labels)
        assert np.array_equal(found.scores, expected_scores)
        assert found.labels.dtype == np.int32
        assert np.array_equal(maps, before)
        touching += found.labels.max() > ndimage.label(found.labels)[1]
    assert touching > 0


def test_models_are_found_by_name_and_typos_are_named():
    assert {"maskrcnn", "hoverlite", "hovernet"} <= set(REGISTRY)
    assert config_class("hoverlite") is HoverLiteConfig
    with pytest.raises(ValueError, match="did you mean 'hoverlite'"):
        build("hoverlight")
    with pytest.raises(TypeError, match="takes a HoverLiteConfig, got HoverNetConfig"):
        build("hoverlite", config=HoverNetConfig())


def test_hoverlite_learns_in_forty_steps():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("hoverlite", config=SMALL)
    pairs = [picture(seed) for seed in range(4)]
    fixed = model.encoder.net.conv_stem.weight.clone()
    deep = model.encoder.net.blocks[6][0].conv_pw.weight.clone()
    config = TrainingConfig(iterations=40, batch=2, crop=64, lr=5e-3, log_every=40, validate_every=0)
    result = train(model, pairs, config, seed=1)
    assert result.curve[-1]["np_dice"] < 0.7
    assert torch.equal(model.encoder.net.conv_stem.weight, fixed)
    assert not torch.equal(model.encoder.net.blocks[6][0].conv_pw.weight, deep)
    image, labels = picture(9)
    found = model.predict_instances(image)
    assert found.labels.shape == labels.shape
    assert found.labels.max() == len(found.scores)
    overlap = np.count_nonzero((found.labels > 0) & (labels > 0))
    assert 2 * overlap / (np.count_nonzero(found.labels) + np.count_nonzero(labels)) > 0.75


@pytest.mark.parametrize("widths", [(16, 16, 8, 8), (16, 16, 8, 8, 8)])
def test_hoverlite_keeps_the_resolution_of_any_input(widths):
    model = build("hoverlite", config=HoverLiteConfig(widths=widths), pretrained=False).eval()
    with torch.no_grad():
        logits, hv = model.heads(torch.rand(1, 3, 70, 41))
    assert logits.shape == hv.shape == (1, 2, 70, 41)


def test_fixed_levels_are_the_finest_ones():
    trained = []
    for frozen in range(6):
        model = build("hoverlite", config=HoverLiteConfig(widths=(8, 8, 8, 8), frozen=frozen), pretrained=False).train()
        images = torch.rand(2, 3, 64, 64, requires_grad=True)
        needs = [level.requires_grad for level in model.encoder(images.detach())]
        assert needs == [False] * frozen + [True] * (5 - frozen)
        trained.append(sum(p.numel() for p in model.encoder.parameters() if p.requires_grad))
    assert trained == sorted(trained, reverse=True)
    assert trained[-1] == 0


@pytest.mark.parametrize(
    ("mode", "size", "out", "count"), [("fast", 256, 164, 33625412), ("original", 270, 80, 45028676)]
)
def test_hovernet_has_the_published_sizes(mode, size, out, count):
    with torch.device("meta"):  # shapes alone: no memory, no arithmetic
        model = build("hovernet", config=HoverNetConfig(mode=mode))
        logits, hv = model.heads(torch.empty(1, 3, size, size))
    assert logits.shape == hv.shape == (1, 2, out, out)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.initialised_from == "random weights"


def test_a_profile_may_name_one_encoder_for_all_segmenters():
    with torch.device("meta"):
        assert build("hovernet", encoder="efficientnet_lite0").initialised_from == "random weights"


def test_hovernet_maps_keep_the_resolution_of_any_input():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("hovernet").eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = model.maps(images)
        # Mirroring as numpy does it: 46 pixels around, and the surplus up to 8 below and on the right.
        padded = np.pad(images.numpy(), ((0, 0), (0, 0), (46, 50), (46, 50)), mode="symmetric")
        logits, hv = model.heads(torch.from_numpy(padded))
        odd = model.maps(images[..., :33, :47])
    torch.testing.assert_close(maps[:, 1:], hv[..., :64, :64])
    torch.testing.assert_close(maps[:, 0], logits.softmax(dim=1)[:, 1, :64, :64])
    assert odd.shape == (1, 3, 33, 47)
    with pytest.raises(ValueError, match="a multiple of 8 plus 0"):
        model.heads(images)


def test_the_gradient_of_a_crop_is_a_frame_of_zeros_in_the_same_layout():
    x = torch.rand(2, 3, 6, 7, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    assert torch.equal(crop(x, 2), x[..., 2:-2, 2:-2])
    assert torch.autograd.gradcheck(lambda x: crop(x, 2).square(), x)
    (gradient,) = torch.autograd.grad(crop(x, 1).square().sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_groups_are_one_convolution_with_zeros_between_them(layout):
    grouped = _Grouped(8, 6, 3, groups=2, bias=False).double().to(memory_format=layout)
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64, requires_grad=True)
    by = (x, grouped.weight)
    outs = grouped(x), torch.nn.functional.conv2d(x, grouped.dense_weight())
    assert torch.allclose(*outs)
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), by) for out in outs), strict=True):
        assert torch.allclose(ours, theirs)


def test_hovernet_overfits_one_small_crop():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("hovernet", config=HoverNetConfig(mirror=False)).train()
    image, labels = picture(size=104)
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    maps = torch.from_numpy(labels)[None]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        total = sum(model.loss(images, maps).values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        losses.append(total.item())
    assert losses[-1] < 0.6 * losses[0], losses


def test_hovernet_reads_the_published_files_layout(tmp_path, monkeypatch):
    """Under ``desc``, from a model in parallel, with decoders that are not asked for; names as in the released code."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        donor = build("hovernet")
    names = {
        "conv0./.weight", "conv0.bn.running_mean", "d0.units.0.conv1/bn.weight", "d0.units.1.preact/bn.bias",
        "d2.units.5.conv3.weight", "d3.blk_bna.bn.weight", "d1.shortcut.weight",
    }  # fmt: skip
    state = {k: v for k, v in donor.state_dict().items() if k.split(".")[0] in ("conv0", "d0", "d1", "d2", "d3")}
    assert names <= set(state)
    published = {f"module.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    published["module.decoder.np.u0.conv.weight"] = torch.zeros(2, 64, 1, 1)
    path = tmp_path / "ImageNet-ResNet50-Preact_pytorch.tar"
    torch.save({"desc": published, "epoch": 50}, path)
    model = build("hovernet", weights=path)
    assert model.initialised_from == path.name
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items() if "num_batches" not in k)
    del published["module.d2.units.5.conv3.weight"]
    torch.save({"desc": published}, path)
    with pytest.raises(RuntimeError, match=r"missing or ill-shaped \['d2.units.5.conv3.weight'\]"):
        build("hovernet", weights=path)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "preact-resnet50.safetensors")
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(tmp_path))
    assert build("hovernet").initialised_from == "preact-resnet50.safetensors"


def test_hovernet_says_which_weights_it_started_from(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        donor = build("hovernet")
        state = {k: v for k, v in donor.state_dict().items() if not k.startswith(("np", "hv", "conv_bot"))}
        path = tmp_path / "preact.pt"
        torch.save(state, path)
        torch.manual_seed(1)
        model = build("hovernet", weights=path)
    assert model.initialised_from == "preact.pt"
    assert torch.equal(model.d3.shortcut.weight, donor.d3.shortcut.weight)
    assert not torch.equal(model.conv_bot.weight, donor.conv_bot.weight)
    assert build("hovernet", weights=path, pretrained=False).initialised_from == "random weights"
    torch.save({"conv0./.weight": torch.zeros(1)}, path)
    with pytest.raises(RuntimeError, match="no weights of a pre-activation ResNet50"):
        build("hovernet", weights=path)


def test_hovernets_weights_keep_the_names_that_saved_ones_have():
    with torch.device("meta"):
        names = set(build("hovernet", pretrained=False).state_dict())
    branch = ("u3.1.units.0.0.weight", "u3.1.units.7.2.weight", "u2.1.units.3.3.bias", "u2.1.units.3.5.weight",
              "u3.1.end.0.weight", "u0.0.running_mean", "u0.2.bias")  # fmt: skip
    assert {f"{head}_branch.{name}" for head in ("np", "hv") for name in branch} <= names
    assert {"conv0./.weight", "conv0.bn.weight", "d0.units.1.preact/bn.weight", "d3.blk_bna.bn.bias"} <= names
