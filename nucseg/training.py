"""The one training loop (Sec. III-C, IV-A), the same for every segmenter and every arm.

Deviation: the paper counts epochs (200 for Mask R-CNN, 100 for HoVer-Net); the arms hold 9, 459 or 1,059 images, so
epochs would give them different budgets. Here every arm gets the same number of iterations (REFERENCE A30). All images
stay on the device; crops, augmentation and targets of a whole batch are made there.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nucseg.augment import AugmentConfig
from nucseg.crops import CropPool
from nucseg.models.base import Segmenter
from nucseg.schedule import TrainingConfig, learning_rate
from nucseg.steps import Average, Step, TrainingDivergedError, Unlabelled

__all__ = ["TrainingConfig", "TrainingDivergedError", "TrainingResult", "learning_rate", "train"]


SETTLED = 5  # steps after which no algorithm is tried and nothing recorded any more, which takes memory of its own


class TrainingResult(NamedTuple):
    """What a training leaves behind, beside the model, which holds its last weights."""

    curve: list[dict[str, float]]  # iteration, lr, total, each loss term, and val where it was measured
    best_iteration: int  # of the highest validation value; the last one without validation
    best_state: dict[str, Tensor]  # that model's state, on the CPU
    seconds: float  # all of it, those before a resumption too
    seconds_before: float  # of earlier runs that this one went on from
    peak_memory: int  # bytes on the device once the first steps are over, the recording's too; 0 on the CPU
    recorded_memory: int  # bytes of the recording alone; 0 where steps were not recorded


def train(
    model: Segmenter,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    config: TrainingConfig,
    seed: int = 0,
    augment: AugmentConfig | None = None,
    validate: Callable[[Segmenter], float] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
    resume_from: dict[str, Any] | None = None,
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
    pair_weights: Sequence[float] | None = None,
    unlabelled: Unlabelled | None = None,
) -> TrainingResult:
    """Train a segmenter on images and label maps.

    Parameters
    ----------
    model
        Trained in place; afterwards it holds the last weights (averaged ones with `config.ema`) and is in eval mode.
    pairs
        Image (H, W, 3) uint8 and label map (H, W) each, of any sizes; smaller ones than a crop are mirrored outwards.
    config
        Every number.
    seed
        Of crops, augmentation and dropout; equal seeds give equal weights on the CPU. Global random states stay as they
        are.
    augment
        None for no augmentation.
    validate
        Called with the model in eval mode; higher is better.
    device
        Where to train; None = where the model is.
    progress
        Called with each row of the curve.
    resume_from, checkpoint
        `checkpoint` is called at each row of the curve but the last with a function that returns the state (tensors and
        plain values, safe for ``torch.load(..., weights_only=True)``), and may raise to end the training;
        `resume_from` takes a state and goes on as if nothing had happened. See `nucseg.checkpoints`.
    pair_weights
        Relative probability of each pair, for example to draw real pairs as often as synthetic ones; None = equal.
    unlabelled
        Further loss terms on images without labels, from the model, its average as teacher (so `config.ema` must be
        above 0; the starting weights count as the first teacher), the generator and the share of the training done.
        See `nucseg.mean_teacher`.

    Raises
    ------
    TrainingDivergedError
        When the loss became NaN or infinite, with the iteration and the terms.
    """
    if unlabelled and not config.ema:
        raise ValueError("ema: a teacher is the average of the weights, so its decay must be above 0")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    with ThreadPoolExecutor() as pool:  # a thousand crops with normalised stains take one thread longer than a round
        prepared = pool.map(model.prepare, [image for image, _ in pairs])
        pairs = [(image, labels) for image, (_, labels) in zip(prepared, pairs, strict=True)]
    crops = CropPool(pairs, augment.window(config.crop) if augment else config.crop, device, pair_weights)
    averaged = Average(model, config.ema, from_start=unlabelled is not None) if config.ema else None
    candidate = averaged.module if averaged else model  # what is validated and returned
    generator = torch.Generator(device).manual_seed(seed)
    curve: list[dict[str, float]] = []
    start, best_value, best_iteration, best_state, seconds = 0, -math.inf, 0, None, 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # networks with dropout use the global state
        torch.manual_seed(seed)
        if resume_from is not None:
            start, seconds, curve = resume_from["iteration"], resume_from["seconds"], list(resume_from["curve"])
        step = Step(model, crops, augment, config, generator, averaged, unlabelled, start)
        if resume_from is not None:
            model.load_state_dict(resume_from["model"])
            step.optimiser.load_state_dict(resume_from["optimiser"])
            if averaged:
                averaged.load_state_dict(resume_from["averaged"])
            generator.set_state(resume_from["generator"])
            torch.set_rng_state(resume_from["rng"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(resume_from["rng_cuda"], device)
            best_value, best_iteration = resume_from["best_value"], resume_from["best_iteration"]
            best_state = resume_from["best_state"]
        began = time.perf_counter() - seconds

        def snapshot() -> dict[str, Any]:
            return {
                "model": _copy(model.state_dict()),
                "averaged": averaged.state_dict() if averaged else None,
                "optimiser": copy.deepcopy(step.optimiser.state_dict()),
                "generator": generator.get_state(),
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "iteration": iteration,
                "seconds": time.perf_counter() - began,
                "curve": list(curve),
                "best_value": best_value,
                "best_iteration": best_iteration,
                "best_state": best_state,
            }

        model.train()
        candidate.train(candidate is model)  # a teacher speaks in eval mode
        for iteration in range(start + 1, config.iterations + 1):
            rate = learning_rate(config, iteration)
            terms = step(rate)
            if device.type == "cuda" and iteration == start + SETTLED:
                torch.cuda.reset_peak_memory_stats(device)

            last = iteration == config.iterations
            validating = last or (config.validate_every and iteration % config.validate_every == 0)
            if not (validating or iteration % config.log_every == 0):
                continue
            step.watch.check()  # the only place where the host waits for the device
            row = {"iteration": iteration, "lr": rate, "total": float(sum(terms.values()))}
            row |= {name: float(term) for name, term in terms.items()}
            if validating and validate is not None:
                candidate.eval()
                row["val"] = float(validate(candidate))
                model.train()
            value = row.get("val", -math.inf)
            better = value > best_value or best_state is None or math.isnan(best_value)
            if last if validate is None else validating and better:
                best_value, best_iteration = value, iteration
                best_state = _copy(candidate.state_dict())
            curve.append(row)
            if progress:
                progress(row)
            if checkpoint and not last:
                checkpoint(snapshot)
    for remark in model.remarks():
        warnings.warn(f"{type(model).__name__}: {remark}", stacklevel=2)
    step.optimiser.zero_grad(set_to_none=True)  # gradients of a captured step would keep its memory
    if averaged:
        model.load_state_dict(averaged.module.state_dict())
    model.eval()
    peak = torch.cuda.max_memory_allocated(device) + step.recorded if device.type == "cuda" else 0
    taken = time.perf_counter() - began
    return TrainingResult(curve, best_iteration, best_state, taken, seconds, peak, step.recorded)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
