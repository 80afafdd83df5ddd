"""The one training loop (Sec. III-C, IV-A), the same for every segmenter and every arm.

Deviation: the paper counts epochs (200 for Mask R-CNN, 100 for HoVer-Net); the arms hold 9, 459 or 1,059 images, so
epochs would give them different budgets. Here every arm gets the same number of iterations (REFERENCE A30). All images
stay on the device; crops, augmentation and targets of a whole batch are made there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nucseg.augment import AugmentConfig, augment
from nucseg.crops import CropPool
from nucseg.models.base import Segmenter


@dataclass(frozen=True)
class TrainingConfig:
    """Every number of a training.

    Attributes
    ----------
    iterations
        Optimiser steps, the same for every arm (A30).
    batch, crop
        Crops per step, and their side in pixels.
    optimiser
        ``"adamw"``, or ``"sgd"`` as the paper's Mask R-CNN (lr 0.005, momentum 0.9, weight decay 1e-4).
    lr, weight_decay, momentum
        Peak learning rate; decay of weights with two or more dimensions (not of biases and norms); SGD's momentum.
    schedule
        ``"constant"`` (the paper's, after the warm-up), ``"one-cycle"`` or ``"cosine-warmup"``.
    warmup
        Share of the iterations in which the rate rises.
    clip
        Largest norm of the gradient, 0 = no limit.
    precision
        ``"fp32"`` or ``"bf16"`` (autocast, weights stay fp32).
    ema
        Decay of an exponential moving average of the weights, which is then what is validated and returned; 0 = none.
    validate_every, log_every
        Iterations between validations (0 = only at the end) and between rows of the curve.
    """

    iterations: int = 5000
    batch: int = 6
    crop: int = 256
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: Literal["constant", "one-cycle", "cosine-warmup"] = "one-cycle"
    warmup: float = 0.1
    clip: float = 5.0
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: float = 0.0
    validate_every: int = 500
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.crop < 32:
            raise ValueError(f"crop must be at least 32, got {self.crop}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name in ("weight_decay", "clip", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("momentum", "ema", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


class TrainingResult(NamedTuple):
    """What a training leaves behind, beside the model, which holds its last weights."""

    curve: list[dict[str, float]]  # iteration, lr, total, each loss term, and val where it was measured
    best_iteration: int  # of the highest validation value; the last one without validation
    best_state: dict[str, Tensor]  # that model's state, on the CPU
    seconds: float
    peak_memory: int  # bytes on the device; 0 on the CPU


class TrainingDivergedError(FloatingPointError):
    """The loss is no longer a finite number."""


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
    checkpoint: Callable[[dict[str, Any]], None] | None = None,
    pair_weights: Sequence[float] | None = None,
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
        `checkpoint` gets a state (tensors and plain values, safe for ``torch.load(..., weights_only=True)``) at each
        validation; `resume_from` takes one back and goes on as if nothing had happened. Files are the caller's affair.
    pair_weights
        Relative probability of each pair, for example to draw real pairs as often as synthetic ones; None = equal.

    Raises
    ------
    TrainingDivergedError
        When the loss became NaN or infinite, with the iteration and the terms.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device, memory_format=torch.channels_last)
    crops = CropPool(pairs, augment.window(config.crop) if augment else config.crop, device, pair_weights)
    optimiser = _optimiser(model, config)
    averaged = _average_of(model, config.ema) if config.ema else None
    candidate = averaged.module if averaged else model  # what is validated and returned
    generator = torch.Generator(device).manual_seed(seed)
    curve: list[dict[str, float]] = []
    start, best_value, best_iteration, best_state, seconds = 0, -math.inf, 0, None, 0.0
    watch = _DivergenceWatch(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # networks with dropout use the global state
        torch.manual_seed(seed)
        if resume_from is not None:
            model.load_state_dict(resume_from["model"])
            optimiser.load_state_dict(resume_from["optimiser"])
            if averaged:
                averaged.load_state_dict(resume_from["averaged"])
            generator.set_state(resume_from["generator"])
            torch.set_rng_state(resume_from["rng"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(resume_from["rng_cuda"], device)
            start, seconds, curve = resume_from["iteration"], resume_from["seconds"], list(resume_from["curve"])
            best_value, best_iteration = resume_from["best_value"], resume_from["best_iteration"]
            best_state = resume_from["best_state"]
        began = time.perf_counter() - seconds

        model.train()
        for iteration in range(start + 1, config.iterations + 1):
            images, label_maps = crops.draw(config.batch, generator)
            if augment:
                images, label_maps = _augment(images, label_maps, augment, generator, config.crop)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, iteration)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                terms = model.loss(images.contiguous(memory_format=torch.channels_last), label_maps)
            total = sum(terms.values())
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            if config.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimiser.step()
            if averaged:
                averaged.update_parameters(model)
            watch.look(iteration, terms)

            last = iteration == config.iterations
            validating = last or (config.validate_every and iteration % config.validate_every == 0)
            if not (validating or iteration % config.log_every == 0):
                continue
            watch.check()  # the only place where the host waits for the device
            row = {"iteration": iteration, "lr": learning_rate(config, iteration), "total": float(total.detach())}
            row |= {name: float(term.detach()) for name, term in terms.items()}
            if validating and validate is not None:
                candidate.eval()
                row["val"] = float(validate(candidate))
                model.train()
            if validating and (row.get("val", -math.inf) > best_value or best_state is None or validate is None):
                best_value, best_iteration = row.get("val", -math.inf), iteration
                best_state = _copy(candidate.state_dict())
            curve.append(row)
            if progress:
                progress(row)
            if validating and checkpoint:
                checkpoint(
                    {
                        "model": _copy(model.state_dict()),
                        "averaged": _copy(averaged.state_dict()) if averaged else None,
                        "optimiser": optimiser.state_dict(),
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
                )
    if averaged:
        model.load_state_dict(averaged.module.state_dict())
    model.eval()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return TrainingResult(curve, best_iteration, best_state, time.perf_counter() - began, peak)


_augment = augment  # `train` has a parameter of that name


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Return the rate of an iteration, counted from 1.

    ``one-cycle`` rises from lr/25 to lr and falls to lr/25e4 along cosines, as `torch.optim.lr_scheduler.OneCycleLR`
    without its cycling momentum; ``cosine-warmup`` rises linearly and falls to 0; ``constant`` rises linearly and
    stays.
    """
    done = (iteration - 1) / max(config.iterations - 1, 1)
    rising = done < config.warmup
    share = done / config.warmup if rising else (done - config.warmup) / max(1 - config.warmup, 1e-9)
    if config.schedule == "one-cycle":
        low, high = (config.lr / 25, config.lr) if rising else (config.lr / 25e4, config.lr)
        return low + (high - low) * (1 - math.cos(math.pi * (share if rising else 1 - share))) / 2
    if rising:
        return config.lr * max(share, 1 / config.iterations)
    return config.lr if config.schedule == "constant" else config.lr * (1 + math.cos(math.pi * share)) / 2


class _DivergenceWatch:
    """Remembers, on the device and without waiting for it, the first iteration whose loss was not finite."""

    def __init__(self, device: torch.device):
        self.first = torch.zeros((), dtype=torch.int64, device=device)
        self.terms: Tensor | None = None
        self.names: list[str] = []

    def look(self, iteration: int, terms: dict[str, Tensor]) -> None:
        self.names = list(terms)
        values = torch.stack([term.detach().float() for term in terms.values()])
        new = (self.first == 0) & ~torch.isfinite(values).all()
        self.terms = values if self.terms is None else torch.where(new, values, self.terms)
        self.first = torch.where(new, iteration, self.first)

    def check(self) -> None:
        if iteration := int(self.first):
            terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, self.terms.tolist(), strict=True))
            raise TrainingDivergedError(
                f"the loss is not finite since iteration {iteration} ({terms}); "
                "lower the learning rate, lengthen the warm-up or train in fp32"
            )


def _optimiser(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)


def _average_of(model: torch.nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
