"""Training rates, side by side: our segmenters, eager and as CUDA graphs, beside torchvision's Mask R-CNN as it comes
and HoVer-Net by plain loops; our augmentation beside a plain loop.

    python tests/bench/bench_training.py [--quick] [--device cuda] [--seconds S] [--only TEXT] [--out rates.json]

Each rate is the median over three short runs, in images per second at one crop size, with everything that a step needs:
crops, augmentation, targets, forward, backward, optimiser. Compare the ratios; a rate belongs to its machine.

On a CPU, whose rate drifts, all take turns. On a GPU each has the memory to itself and leaves nothing behind (HoVer-Net
alone fills half of 80 GB). An image's seconds, peers and what a schedule is chosen by come first, and every rate is
printed and written as soon as it is there, so a run that is cut off still leaves its numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from nucseg.augment import AugmentConfig, augment
from nucseg.crops import CropPool
from nucseg.inference import InferenceConfig, predict_maps
from nucseg.models import build, config_class
from nucseg.models.hover import HoverTargets, hv_targets
from nucseg.steps import Step
from nucseg.training import TrainingConfig

# Table IV's other segmenters with the batches of the profile h100; full widths, so on a GPU or by name only.
OTHERS = {"dist": 16, "micronet": 16, "mdcnet": 32, "dpmsff": 16, "pffnet": 16}
MIRRORED = 16  # HoVer-Net's batch in h100, where its crops are mirrored outwards


def synthetic_pairs(count: int, size: int, nuclei: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make images of dark discs with their label maps."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:size, :size]
    pairs = []
    for _ in range(count):
        labels = np.zeros((size, size), dtype=np.int32)
        for i, (y, x) in enumerate(rng.uniform(0, size, (nuclei, 2))):
            labels[(yy - y) ** 2 + (xx - x) ** 2 < rng.uniform(5, 12) ** 2] = i + 1
        image = np.where(labels[..., None] > 0, (90, 60, 130), (225, 170, 205)) + rng.integers(-15, 16, (size, size, 3))
        pairs.append((image.astype(np.uint8), labels))
    return pairs


def our_training(name: str, config, encoder: str | None, pairs, batch: int, crop: int, device, **settings):
    """Return a function that does some steps of the training loop and says how many images that were."""
    device = torch.device(device)
    settings = TrainingConfig(batch=batch, crop=crop, **settings)
    model = build(name, encoder=encoder, config=config, pretrained=False).to(device)  # weights do not change the rate
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    pool, generator = CropPool(pairs, crop, device), torch.Generator(device).manual_seed(0)
    step = Step(model, pool, AugmentConfig(), settings, generator, None, None)

    def run(iterations: int) -> int:
        for _ in range(iterations):
            step(1e-4)
        return iterations * batch

    return run


def plain_hovernet_training(pairs, batch: int, crop: int, device):
    """Train HoVer-Net as public scripts do: one crop and one nucleus at a time on the host, then fp32 and Adam."""
    model = build("hovernet", pretrained=False).to(device).train()
    optimiser, one = torch.optim.Adam(model.parameters(), lr=1e-4), plain_crop(pairs, crop)

    def run(iterations: int) -> int:
        for _ in range(iterations):
            arrays = [np.stack(part) for part in zip(*(one() for _ in range(batch)), strict=True)]
            images, labels, hv = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
            inside = labels > 0
            images = images.permute(0, 3, 1, 2).float().contiguous()
            loss = sum(model.loss_on(images, HoverTargets(inside, hv.float(), torch.ones_like(inside))).values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            loss.item()  # they print it
        return iterations * batch

    return run


def torchvision_training(pairs, batch: int, crop: int, device):
    """Plain torchvision: Mask R-CNN ResNet50-FPN with its defaults, fp32, one image and one mask at a time."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2).to(device).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    rng = np.random.default_rng(0)

    def run(iterations: int) -> int:
        for _ in range(iterations):
            images, targets = [], []
            for _ in range(batch):
                image, labels = pairs[rng.integers(len(pairs))]
                row, col = rng.integers(0, labels.shape[0] - crop + 1, 2)
                image, labels = (a[row : row + crop, col : col + crop] for a in (image, labels))
                ids = [i for i in np.unique(labels) if i > 0 and np.ptp(np.nonzero(labels == i), axis=1).min() > 0]
                masks = torch.from_numpy(np.stack([labels == i for i in ids]).astype(np.uint8))
                places = [np.nonzero(mask)[::-1] for mask in masks.numpy()]
                boxes = torch.tensor([[*np.min(p, axis=1), *np.max(p, axis=1)] for p in places]).float()
                target = {"boxes": boxes, "labels": torch.ones(len(ids), dtype=torch.int64), "masks": masks}
                images.append(torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255)).to(device))
                targets.append({k: v.to(device) for k, v in target.items()})
            loss = sum(model(images, targets).values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return iterations * batch

    return run


def batch_augmentation(pairs, batch: int, crop: int, device):
    """Crops, augmentation and HoVer targets of whole batches on the device."""
    pool = CropPool(pairs, crop, torch.device(device))
    generator = torch.Generator(device).manual_seed(0)

    def run(iterations: int) -> int:
        for _ in range(iterations):
            hv_targets(augment(*pool.draw(batch, generator), AugmentConfig(), generator)[1], 30)
        return iterations * batch

    return run


def plain_crop(pairs, crop: int) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return a function that makes one augmented crop with its label map and HV map, one nucleus at a time."""
    rng = np.random.default_rng(0)

    def one() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, labels = pairs[rng.integers(len(pairs))]
        row, col = rng.integers(0, labels.shape[0] - crop + 1, 2)
        image, labels = (a[row : row + crop, col : col + crop] for a in (image, labels))
        turns = rng.integers(4)
        image, labels = np.rot90(image, turns) / 255, np.rot90(labels, turns)
        image = np.clip(image * rng.uniform(0.9, 1.1, 3) + rng.uniform(-0.1, 0.1), 0, 1)
        if rng.random() < 0.25:
            image = ndimage.gaussian_filter(image, (1, 1, 0))
        if rng.random() < 0.25:
            image = np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
        hv = np.zeros((2, crop, crop))
        for i in np.unique(labels[labels > 0]):
            place = np.nonzero(labels == i)
            for channel, p in enumerate(place[::-1]):
                offset = p - np.floor(p.mean() + 0.5)
                hv[channel][place] = offset / np.where(offset < 0, max(-offset.min(), 1), max(offset.max(), 1))
        return image, labels, hv

    return one


def plain_augmentation(pairs, batch: int, crop: int, device):
    """Do the same one crop and one nucleus at a time, as the public scripts do, and copy it to the device."""
    one = plain_crop(pairs, crop)

    def run(iterations: int) -> int:
        for _ in range(iterations):
            for arrays in zip(*(one() for _ in range(batch)), strict=True):
                torch.from_numpy(np.stack(arrays)).to(device)
        return iterations * batch

    return run


def seconds_of_an_image(model, image: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Seconds of the network, and of making instances from maps: true ones, as those of untrained weights are noise."""
    inside, hv = hv_targets(torch.from_numpy(labels[None]))
    maps = np.concatenate((inside[0, None].float().numpy(), hv[0].numpy())).astype(np.float32)
    taken = []
    for work in (lambda: predict_maps(model, image, model.inference), lambda: model.finish(maps)):
        work()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken[0], taken[1]


def rate(run: Callable[[int], int], seconds: float, device: str) -> float:
    """Images per second over about `seconds`, after the caller has warmed up."""
    done, iterations, began = 0, 2, time.perf_counter()
    while True:
        done += run(iterations)
        if device == "cuda":
            torch.cuda.synchronize()
        passed = time.perf_counter() - began
        if passed > seconds:
            return done / passed
        iterations = min(4 * iterations, 1 + int(iterations * (seconds - passed) / max(passed, 1e-3)))


def measure(contenders: dict[str, Callable], seconds: float, turns: int, device: str) -> dict[str, float]:
    """Make some contenders, let them take turns, and return the median images per second of those that can run."""
    runs, rates = {}, {}
    for turn in range(turns + 1):  # the first one is for the warm-up, and for captures
        for name, make in contenders.items():
            if turn and name not in runs:
                continue
            try:
                if turn:
                    rates.setdefault(name, []).append(rate(runs[name], seconds, device))
                else:
                    runs[name] = make()
                    runs[name](5)
            except Exception as error:  # one contender that cannot run here must not hide the others
                runs.pop(name, None)
                print(f"{name}: not run ({type(error).__name__}: {str(error)[:300]})", flush=True)
                if "captured" in str(error):  # its generator is unusable for whatever comes next in this process
                    raise
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small crops, one second each: does it run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="length of each of the three runs; 1 on a GPU, else 20")
    parser.add_argument("--only", default="", help="run only what contains this text")
    parser.add_argument("--out", type=Path, help="write the rates as JSON")
    options = parser.parse_args()
    device, quick = options.device, options.quick
    cuda = device == "cuda"
    crop, turns = (128, 1) if quick else (256, 3)
    seconds = options.seconds or (1.0 if quick or cuda else 20.0)
    pairs = synthetic_pairs(4 if quick else 12, crop if quick else 512, 12 if quick else 120)
    large, precision = (64, "bf16") if cuda else (4, "fp32")
    encoder = "efficientnet_lite2" if cuda else "efficientnet_lite0"  # of the profile h100, and of sample
    lite = config_class("hoverlite")
    narrow = lite(widths=(64, 32, 16, 16), frozen=5)

    peers = {
        "maskrcnn": "torchvision's Mask R-CNN as it comes, fp32",
        "hovernet": "HoVer-Net by plain loops, fp32",
        "hoverlite": "HoVer-Net by plain loops, fp32",
    }
    few = {"maskrcnn": 6 if cuda else 1, "hovernet": 8 if cuda else 1}
    contenders = {
        peers["maskrcnn"]: lambda: torchvision_training(pairs, few["maskrcnn"], crop, device),
        peers["hovernet"]: lambda: plain_hovernet_training(pairs, few["hovernet"], crop, device),
    }
    models = {
        "hoverlite": ("hoverlite", lite(), encoder),
        "maskrcnn": ("maskrcnn", None, encoder),
        "hovernet": ("hovernet", None, None),
        "hovernet mirrored": (
            "hovernet",
            config_class("hovernet")(mirror=True),
            None,
        ),  # as in h100: 1.9 times the pixels
        "hoverlite narrow, fixed encoder": ("hoverlite", narrow, encoder),
    }
    models |= {name: (name, None, encoder) for name in OTHERS if cuda or options.only.startswith(name)}
    ways = {
        "eager, channels-last": {},
        "graph, channels-last": {"cuda_graph": True},
        "eager": {"channels_last": False},
        "graph": {"channels_last": False, "cuda_graph": True},
        "eager, channels-last, cuDNN's trials": {"benchmark": True},
    }
    batches = {"hovernet": 32, **OTHERS} if cuda else few

    def add(title: str, way: str) -> None:
        base, settings = models[title][0], ways[way]
        if "graph" in way and not cuda:  # nothing to capture
            return
        batch = MIRRORED if "mirrored" in title and cuda else batches.get(base, large)
        contenders[f"{title} batch {batch} {precision}, {way}"] = partial(
            our_training, *models[title], pairs, batch, crop, device, precision=precision, **settings
        )

    first, second, *layouts = ways
    ours = [title for title, arguments in models.items() if arguments[0] not in OTHERS]
    for title in ours:
        add(title, first)
        add(title, second)
    contenders[f"augmentation and targets, batch {large}"] = lambda: batch_augmentation(pairs, large, crop, device)
    for base, count in few.items():
        contenders[f"{base} batch {count} fp32, {first}"] = partial(
            our_training, *models[base], pairs, count, crop, device
        )
    for title, way in ((title, way) for title in models if title not in ours for way in (first, second)):
        add(title, way)
    for title, way in ((title, way) for way in layouts for title in ours):
        add(title, way)
    contenders["augmentation and targets, plain loop"] = lambda: plain_augmentation(pairs, 4, crop, device)
    contenders = {name: make for name, make in contenders.items() if options.only in name}

    medians: dict[str, float] = {}

    def save() -> None:
        if options.out:
            options.out.write_text(json.dumps({"device": device, "crop": crop, "images_per_second": medians}, indent=1))

    print(f"{crop} px, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads; images/s")
    if any("hoverlite" in name for name in contenders):
        image, labels = np.tile(pairs[0][0], (2, 2, 1)), ndimage.label(np.tile(pairs[0][1], (2, 2)))[0]
        for tta in ("none", "d4"):
            config = lite(inference=InferenceConfig(tta=tta, precision=precision))
            model = build("hoverlite", encoder, config, pretrained=False).to(device)
            parts = seconds_of_an_image(model, image, labels)
            medians[f"seconds per {image.shape[0]} px image, averaging {tta}"] = sum(parts)
            print(f"{sum(parts):10.2f}  s for an image of {image.shape[0]} px with {labels.max()} nuclei, hoverlite, "
                  f"averaging {tta}: network {parts[0]:.2f}, instances {parts[1]:.2f}")  # fmt: skip
    for group in [[name] for name in contenders] if cuda else [list(contenders)]:
        found = measure({name: contenders[name] for name in group}, seconds, turns, device)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        medians |= found
        save()
        for name, value in found.items():
            peer = next((p for model, p in peers.items() if name.startswith(model)), "")
            ratio = f"{value / medians[peer]:8.2f} x {peer}" if peer in medians else ""
            print(f"{value:10.2f}  {name:66s}{ratio}", flush=True)
    loop, ours = (
        next((v for n, v in medians.items() if text in n), None) for text in ("targets, plain", "targets, batch")
    )
    if loop and ours:
        print(f"augmentation and targets: {ours / loop:.1f} x the plain loop")


if __name__ == "__main__":
    main()
