"""Tiles without seams, views that turn back, nuclei counted once, the CPU's part in processes of its own."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from nucseg.inference import (
    InferenceConfig,
    merge_tiles,
    predict_all,
    predict_instances,
    predict_maps,
    predict_views,
    run_ahead,
    tiles_of,
)
from nucseg.models.base import Instances
from nucseg.models.hover import HoverConfig, HoverSegmenter, hv_targets


class Local(nn.Module):
    """Maps that depend on a neighbourhood of three pixels: brightness, and its gradient as a vector."""

    vector_channels = (1, 2)

    def __init__(self):
        super().__init__()
        kernel = torch.zeros(3, 3, 3, 3)
        kernel[0, :, 1, 1] = 1 / 3
        kernel[1, :, 1, 0], kernel[1, :, 1, 2] = -1 / 6, 1 / 6
        kernel[2, :, 0, 1], kernel[2, :, 2, 1] = -1 / 6, 1 / 6
        self.kernel = nn.Parameter(kernel)
        self.batches = []

    def maps(self, images):
        self.batches.append(tuple(images.shape))
        assert images.shape[2] % 32 == images.shape[3] % 32 == 0
        return nn.functional.conv2d(images, self.kernel, padding=1)


class Crooked(Local):
    """Answers otherwise for each orientation, as a trained network does."""

    def maps(self, images):
        ramp = torch.linspace(0, 1, images.shape[3]) + torch.linspace(0, 3, images.shape[2])[:, None] ** 2
        return super().maps(images) * (1 + ramp)


def picture(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(32, 33), (64, 64), (100, 250), (257, 129)])
@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_tiles_give_what_the_whole_image_gives(shape, overlap):
    image, model = picture(*shape), Local()
    config = InferenceConfig(tile=64, overlap=overlap, batch=3, block=4096)
    maps = predict_maps(model, image, config)
    assert maps.shape == (3, *shape)
    whole = nn.functional.conv2d(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255, model.kernel, padding=1)
    wrong = np.abs(maps - whole[0].detach().numpy())[:, 1:-1, 1:-1] > 1e-5
    # A tile's own border pixels see zeros; with an overlap their weight is next to nothing, without one they are seams.
    if overlap == 0:
        assert wrong.any() == (max(shape) > 64)
    else:
        assert np.abs(maps - whole[0].detach().numpy())[:, 1:-1, 1:-1].max() < 0.01
    assert max(b for b, *_ in model.batches) <= 3
    assert max(max(h, w) for *_, h, w in model.batches) <= 64


@pytest.mark.parametrize(("tta", "views"), [("flips", 4), ("d4", 8)])
def test_averaging_over_views_turns_maps_and_vectors_back(tta, views):
    model = Local()
    tiles = torch.rand(2, 3, 32, 64 if tta == "flips" else 32)
    config = InferenceConfig(tta=tta)
    torch.testing.assert_close(predict_views(model, tiles, config), model.maps(tiles))
    assert len(model.batches) == views + 1


def test_averaging_over_all_views_makes_a_crooked_network_follow_every_turn():
    model, config = Crooked(), InferenceConfig(tta="d4")
    tiles = torch.rand(1, 3, 32, 32)
    straight = predict_views(model, tiles, config)
    mirrored = predict_views(model, tiles.flip(3), config).flip(3)
    mirrored[:, 1] *= -1
    torch.testing.assert_close(mirrored, straight)
    turned = predict_views(model, tiles.transpose(2, 3), config).transpose(2, 3)[:, [0, 2, 1]]
    torch.testing.assert_close(turned, straight)
    assert not torch.allclose(model.maps(tiles), straight, atol=0.1)


def test_prediction_leaves_the_mode_as_it_was():
    model = Local().train()
    predict_maps(model, picture(40, 40), InferenceConfig())
    assert model.training


def discs(shape, count, seed=0):
    """A label map of separate discs of radius 7, anywhere, also across borders."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int32)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    n = 0
    for y, x in rng.uniform((0, 0), shape, (count, 2)):
        near = (yy - y) ** 2 + (xx - x) ** 2
        if not labels[near < 81].any():
            n += 1
            labels[near < 49] = n
    return labels


def as_picture(labels):
    """Hide a label map in an image: a perfect segmenter needs only to read it."""
    return np.stack((labels % 256, labels // 256, np.zeros_like(labels)), axis=-1).astype(np.uint8)


def read_picture(image):
    labels = image[..., 0] + 256 * image[..., 1].astype(np.int32)
    ids, inverse = np.unique(labels, return_inverse=True)
    inverse = inverse.reshape(labels.shape) + (ids[0] != 0)
    return Instances(inverse.astype(np.int32), np.full(len(ids[ids > 0]), 0.5, dtype=np.float32))


def begin_reading(image):
    return partial(read_picture, image)


def test_blocks_give_each_nucleus_once():
    labels = discs((300, 421), 400)
    config = InferenceConfig(tile=64, overlap=32, block=128)
    found = predict_instances(begin_reading, as_picture(labels), config)
    assert len(found.scores) == labels.max() > 100
    pairs = np.unique(np.stack((labels.ravel(), found.labels.ravel())), axis=1)
    assert pairs.shape[1] == labels.max() + 1  # one to one, pixel by pixel


def test_nuclei_larger_than_the_overlap_are_put_together():
    labels = np.zeros((128, 300), dtype=np.int32)
    labels[40:90, 20:280] = 1
    found = predict_instances(begin_reading, as_picture(labels), InferenceConfig(tile=64, overlap=32, block=128))
    assert np.array_equal(found.labels, labels)


def test_a_shifted_copy_gives_the_shifted_nuclei():
    labels = discs((256, 256), 200, seed=3)
    shifted = np.roll(labels, (37, 53), axis=(0, 1))
    config = InferenceConfig(tile=64, overlap=32, block=128)
    first = predict_instances(begin_reading, as_picture(labels), config).labels[:219, :203]
    second = predict_instances(begin_reading, as_picture(shifted), config).labels[37:, 53:]
    assert np.array_equal(first > 0, second > 0)
    inner = first[20:-20, 20:-20], second[20:-20, 20:-20]
    pairs = np.unique(np.stack([part.ravel() for part in inner]), axis=1)
    assert pairs.shape[1] == len(np.unique(inner[0])) == len(np.unique(inner[1]))


class Drawn(HoverSegmenter):
    """Reads its maps from the picture, and like a padded network knows less near the border of what it sees."""

    def __init__(self, **tiles):
        super().__init__(HoverConfig(), InferenceConfig(**tiles))
        self.weight = nn.Parameter(torch.ones(()))

    def heads(self, images):
        inner = torch.zeros(images.shape[-2:])
        inner[6:-6, 6:-6] = 1
        nucleus = inner * images[:, :1] * self.weight
        hv = inner * (2 * images[:, 1:] - 1) + 0.2 * torch.linspace(-1, 1, images.shape[-1])  # and its place matters
        return torch.cat((0.5 - nucleus, nucleus - 0.5), dim=1) * 8, hv


def drawn(labels):
    """A picture of a label map that `Drawn` can read."""
    inside, hv = hv_targets(torch.from_numpy(labels)[None])
    maps = torch.cat((inside[0][None].float(), (hv[0] + 1) / 2))
    return (maps * 255).round().byte().permute(1, 2, 0).numpy()


def touching(shape, seed):
    """Nuclei of radius 9 on a jittered grid, many of them touching."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int32)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    centres = [(y, x) for y in range(9, shape[0], 19) for x in range(9, shape[1], 19)]
    for i, centre in enumerate(centres):
        y, x = centre + rng.uniform(-2, 2, 2)
        labels[((yy - y) ** 2 + (xx - x) ** 2 < 81) & (labels == 0)] = i + 1
    return labels


@pytest.mark.parametrize("block", [4096, 192])
def test_an_image_and_its_shifted_copy_give_the_same_nuclei_each_once(block):
    whole = touching((340, 352), seed=0)
    picture = drawn(whole)
    model = Drawn(tile=96, overlap=32, batch=4, block=block, workers=0)
    found = []
    for row, col in ((0, 0), (23, 37)):
        window = (slice(row, row + 300), slice(col, col + 300))
        labels = model.predict(picture[window])
        common = labels[23 - row : 300 - row, 37 - col : 300 - col]  # the same pixels of both
        found.append(common)
    first, second = (part[20:-20, 20:-20] for part in found)
    truth = whole[23:300, 37:300][20:-20, 20:-20]
    for labels in (first, second):
        both = np.count_nonzero((labels > 0) & (truth > 0)) / np.count_nonzero((labels > 0) | (truth > 0))
        assert both > 0.97
        ids = [i for i in np.unique(truth[truth > 0]) if np.count_nonzero(truth == i) > 150]
        for i in ids:  # each nucleus is one, and no other joins it
            values, counts = np.unique(labels[truth == i], return_counts=True)
            best = values[counts.argmax()]
            assert best > 0
            iou = np.count_nonzero((labels == best) & (truth == i)) / np.count_nonzero((labels == best) | (truth == i))
            assert iou > 0.8, (i, iou)
    assert len(ids) > 60
    assert np.count_nonzero((first > 0) != (second > 0)) < 0.02 * first.size


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits():
    class Small(Local):
        def maps(self, images):
            maps = super().maps(images)
            if len(images) > 2:
                raise torch.OutOfMemoryError("no room")
            return maps

    image, config = picture(200, 200), InferenceConfig(tile=64, overlap=16, batch=9)
    model, plain = Small(), Local()
    np.testing.assert_allclose(predict_maps(model, image, config), predict_maps(plain, image, config), atol=1e-6)
    sizes = [b for b, *_ in model.batches]
    assert sizes[:3] == [9, 4, 2]
    assert max(sizes[3:]) == 2

    class Hopeless(Local):
        def maps(self, images):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        predict_maps(Hopeless(), image, config)


def test_merging_prefers_the_whole_view_to_the_cut_and_then_the_more_certain():
    shape = (64, 100)
    left, right = np.zeros((64, 64), dtype=np.int32), np.zeros((64, 64), dtype=np.int32)
    left[20:30, 50:64] = 1  # cut by the left tile's border, at 36..100 it is whole
    right[20:30, 14:40] = 1
    left[40:50, 44:54] = 2  # whole in both tiles, 1 px apart
    right[40:50, 9:19] = 2
    scores = np.array([0.9, 0.6], dtype=np.float32), np.array([0.5, 0.8], dtype=np.float32)
    merged = merge_tiles([(0, 0, Instances(left, scores[0])), (0, 36, Instances(right, scores[1]))], shape)
    assert len(merged.scores) == 2
    assert (merged.labels[20:30, 50:76] == merged.labels[25, 60]).all()
    assert merged.scores[merged.labels[25, 60] - 1] == pytest.approx(0.5)
    assert merged.scores[merged.labels[45, 48] - 1] == pytest.approx(0.8)


def test_merging_nothing_gives_an_empty_map():
    empty = Instances(np.zeros((32, 32), dtype=np.int32), np.zeros(0, dtype=np.float32))
    merged = merge_tiles([(0, 0, empty)], (40, 40))
    assert merged.labels.shape == (40, 40)
    assert not merged.labels.any()
    assert merged.scores.shape == (0,)


@pytest.mark.parametrize(("length", "tile"), [(100, 64), (300, 64), (64, 64), (40, 64), (65, 64)])
def test_tiles_cover_the_image_and_share_the_overlap(length, tile):
    covered = np.zeros((length, length), dtype=int)
    for row, col, pixels in tiles_of(np.zeros((length, length, 3), dtype=np.uint8), tile, 16):
        assert max(pixels.shape[:2]) <= tile
        covered[row : row + pixels.shape[0], col : col + pixels.shape[1]] += 1
    assert covered.min() == 1
    assert (covered[0] > 1).sum() >= 16 * (length > tile)


@pytest.mark.parametrize(
    "image", [np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3)), np.zeros((20, 40, 3), np.uint8)]
)
def test_an_image_of_another_kind_is_refused(image):
    with pytest.raises(ValueError, match="image:"):
        predict_maps(Local(), image, InferenceConfig())


@pytest.mark.parametrize("wrong", [{"tile": 100}, {"overlap": 400}, {"batch": 0}, {"block": 600}, {"workers": -2}])
def test_a_setting_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        InferenceConfig(**wrong)


def name_and_process(number):
    return number, os.getpid()


def fail():
    raise ValueError("no nucleus can be like this")


def test_tasks_run_elsewhere_in_order_while_later_ones_are_made():
    made = []

    def tasks():
        for number in range(7):
            made.append(number)
            yield partial(name_and_process, number)

    results = run_ahead(tasks(), workers=2)
    first = next(results)
    assert made == [0, 1, 2]  # two for the workers, one that waits: no more is held in memory
    rest = list(results)
    assert [number for number, _ in (first, *rest)] == list(range(7))
    processes = {process for _, process in (first, *rest)}
    assert os.getpid() not in processes
    assert {process for _, process in run_ahead(tasks(), workers=0)} == {os.getpid()}
    # The processes are there still.
    assert {process for _, process in run_ahead(tasks(), workers=2)} <= processes


def test_what_a_worker_raises_is_raised_here_and_says_which_task_it_was():
    tasks = [partial(name_and_process, 0), fail, partial(name_and_process, 2)]
    results = run_ahead(iter(tasks), workers=2)
    assert next(results)[0] == 0
    with pytest.raises(ValueError, match="no nucleus can be like this") as caught:
        next(results)
    assert caught.value.__notes__ == ["raised in a worker process, by task 1 (counted from 0)"]
    with pytest.raises(ValueError, match="no nucleus"):
        list(run_ahead(iter([fail]), workers=0))


@pytest.mark.parametrize("block", [4096, 192])
def test_several_images_give_what_each_gives_alone(block):
    images = [drawn(touching((200 + 30 * i, 220), seed=i)) for i in range(3)]
    model = Drawn(tile=96, overlap=32, block=block, workers=0)
    alone = [model.predict(image) for image in images]
    together = list(predict_all(model, images, workers=2))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len(list(predict_all(model, []))) == 0


def test_one_image_and_the_cpu_need_no_processes(monkeypatch):
    monkeypatch.setattr("joblib.externals.loky.get_reusable_executor", lambda **_: fail())
    image, model = drawn(touching((100, 100), seed=0)), Drawn(tile=96, overlap=32, block=192)
    assert len(list(predict_all(model, [image], workers=4))) == 1
    assert len(list(predict_all(model, [image, image]))) == 2
    assert InferenceConfig().processes(torch.device("cuda")) >= 0
    assert InferenceConfig(workers=3).processes(torch.device("cpu")) == 3
