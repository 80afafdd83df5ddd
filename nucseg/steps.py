"""One step of the training loop: crops, augmentation, loss, gradient, update; eagerly, or as one captured CUDA graph.

Nothing in a step makes the host wait for the device: targets, random numbers, learning rate, the average of the weights
and the watch over the loss live there. So a step of a network with fixed shapes can be captured once and replayed,
which spares the host a few thousand kernel launches.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nucseg.augment import AugmentConfig, augment
from nucseg.crops import CropPool
from nucseg.models.base import Segmenter
from nucseg.recording import recording
from nucseg.schedule import TrainingConfig

# (student, teacher, generator, share of the training done as a tensor) to loss terms on images without labels
Unlabelled = Callable[[Segmenter, Segmenter, torch.Generator, Tensor], dict[str, Tensor]]

_ALGORITHMS = 4  # that cuDNN tries for a convolution: the first ones are its best guesses, and some it has to compile
_WARM_UP = 3  # eager steps before the capture: they choose algorithms and make the optimiser's state


class Step:
    """Trains a model by one batch per call.

    Attributes
    ----------
    terms
        The loss terms of the last step, on the device; overwritten by the next one.
    captured
        Whether steps are replayed from a CUDA graph.
    recorded
        Bytes that the graph holds for itself, which count as unused by the allocator's statistics.
    """

    def __init__(
        self,
        model: Segmenter,
        crops: CropPool,
        changes: AugmentConfig | None,
        config: TrainingConfig,
        generator: torch.Generator,
        average: Average | None,
        unlabelled: Unlabelled | None,
        done: int = 0,
    ):
        self.model, self.crops, self.changes, self.config = model, crops, changes, config
        self.generator, self.average, self.unlabelled = generator, average, unlabelled
        self.device = crops.pixels.device
        self.largest_id = changes.largest_id(crops.largest_id) if changes else crops.largest_id
        self.optimiser = make_optimiser(model, config)
        self.watch = DivergenceWatch(self.device, done)
        self.terms: dict[str, Tensor] = {}
        self.recorded = 0
        self._graph: Any = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._eager_left = _WARM_UP if config.cuda_graph and self._can_be_captured() else -1

    def _can_be_captured(self) -> bool:
        # multinomial looks at its weights on the host when it draws only one
        several = min(self.config.batch, getattr(self.unlabelled, "batch", 2)) > 1
        return self.device.type == "cuda" and self.model.fixed_shapes and several

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self, rate: float) -> dict[str, Tensor]:
        """Do one step with a learning rate; return the loss terms."""
        set_rate(self.optimiser, rate)
        if self._eager_left == 0 and self._graph is None:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        elif self._eager_left > 0:
            self._eager_left -= 1
            with _beside(self._stream), self._convolutions(), recording():
                self.terms = self.run()
        else:
            with self._convolutions():
                self.terms = self.run()
        return self.terms

    def run(self) -> dict[str, Tensor]:
        """Do what a step does, kernel by kernel."""
        model, config = self.model, self.config
        images, label_maps = self.crops.draw(config.batch, self.generator)
        if self.changes:
            images, label_maps = augment(images, label_maps, self.changes, self.generator, config.crop)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        model.largest_id = self.largest_id
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            terms = model.loss(images, label_maps)
            model.largest_id = None
            if self.unlabelled:
                share = self.watch.count / config.iterations
                terms = terms | self.unlabelled(model, self.average.module, self.generator, share)
        self.optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        self.optimiser.step()
        if self.average:
            self.average.update()
        terms = {name: term.detach() for name, term in terms.items()}
        self.watch.look(terms)
        return terms

    def _convolutions(self) -> contextlib.AbstractContextManager:
        return _fastest_convolutions() if self.config.benchmark else contextlib.nullcontext()

    def _capture(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        before = self._room_for_a_recording()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        try:
            # Convolutions have been tried out in the warm-up; here their choice is only looked up.
            with self._convolutions(), recording(), torch.cuda.graph(graph, stream=self._stream):
                self.terms = self.run()
            self._graph, self.recorded = graph, torch.cuda.memory_reserved(self.device) - before
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # the end of a broken capture complains as well
                raise error.__context__ from None
            raise RuntimeError(
                f"{type(self.model).__name__}: a training step could not be captured as a CUDA graph ({error}); "
                "set cuda_graph to false"
            ) from error

    def _room_for_a_recording(self) -> int:
        """Return the bytes that the allocator keeps before a recording.

        Raises
        ------
        torch.OutOfMemoryError
            If the recording would not fit, by the peak of the steps so far: one that runs out of memory half-way can
            leave the process without its GPU.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        need = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0]
        if need > free:
            name = type(self.model).__name__
            raise torch.OutOfMemoryError(
                f"{name}: recording a step as a CUDA graph takes {need / 2**20:,.0f} MB of GPU memory beside what the "
                f"training holds, and {free / 2**20:,.0f} are free; lower batch, or set cuda_graph to false"
            )
        return torch.cuda.memory_reserved(self.device)


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run on another stream, as what comes before a capture must; always the same one, which finds its memory again."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(stream.device).wait_stream(stream)


@contextlib.contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """Let cuDNN try a few algorithms on the first step: the shapes of all others are the same."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    cudnn.benchmark, cudnn.benchmark_limit = True, _ALGORITHMS
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before


def make_optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser; on a GPU one whose step is a single kernel and whose rate lives on the device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    cuda = trained[0].is_cuda
    rate = torch.tensor(config.lr, device=trained[0].device) if cuda else config.lr
    if config.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=cuda or None)
    return torch.optim.AdamW(groups, lr=rate, fused=cuda or None, capturable=cuda)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, in place where it is a tensor."""
    for group in optimiser.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = rate
        elif group["lr"].device == group["params"][0].device:
            group["lr"].fill_(rate)
        else:  # from a checkpoint that was read to the CPU
            group["lr"] = torch.tensor(rate, device=group["params"][0].device)


class Average:
    """Exponential moving average of a model's weights and statistics, in `module`.

    Parameters
    ----------
    model
        The average starts as a copy of it.
    decay
        Share of the average that a step keeps.
    from_start
        Whether the starting weights are worth remembering. Otherwise the average is a plain mean until it is as long
        as the decay says (Tarvainen & Valpola 2017): decay <= 1 - 1 / step.
    """

    def __init__(self, model: nn.Module, decay: float, from_start: bool = False):
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.from_start = decay, from_start
        self.steps = torch.zeros((), device=next(model.parameters()).device)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # BatchNorm's counts

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present state, in three kernels and without asking the device anything."""
        self.steps += 1
        share = torch.full_like(self.steps, 1 - self.decay)
        if not self.from_start:
            share = torch.maximum(1 / self.steps, share)
        mine, theirs = (list(side) for side in zip(*self._averaged, strict=True))
        change = torch._foreach_sub(theirs, mine)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(mine, change)
        for count, value in self._copied:
            count.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy on the CPU, which `load_state_dict` takes back."""
        module = {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}
        return {"module": module, "steps": self.steps.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.steps.copy_(state["steps"])


class TrainingDivergedError(FloatingPointError):
    """The loss is no longer a finite number."""


class DivergenceWatch:
    """Remembers, on the device and without waiting for it, the first iteration whose loss was not finite.

    Attributes
    ----------
    count
        Iterations seen, on the device.
    """

    def __init__(self, device: torch.device, done: int = 0):
        self.first = torch.zeros((), dtype=torch.int64, device=device)
        self.count = torch.full_like(self.first, done)
        self.values: Tensor | None = None
        self.names: list[str] = []

    def look(self, terms: dict[str, Tensor]) -> None:
        """Take note of the terms of one more iteration."""
        self.names = list(terms)
        self.count += 1
        values = torch.stack([term.float() for term in terms.values()])
        if self.values is None:
            self.values = values.clone()
        # In place, so that a captured step goes on where the eager ones before it stopped.
        fine_so_far = self.first == 0
        new = fine_so_far & ~torch.isfinite(values).all()
        self.values.copy_(torch.where(fine_so_far, values, self.values))
        self.first.copy_(torch.where(new, self.count, self.first))

    def check(self) -> None:
        """Wait for the device, and raise if the loss was not finite."""
        if iteration := int(self.first):
            terms = ", ".join(f"{n} {v:.4g}" for n, v in zip(self.names, self.values.tolist(), strict=True))
            raise TrainingDivergedError(
                f"the loss is not finite since iteration {iteration} ({terms}); "
                "lower the learning rate, lengthen the warm-up or train in fp32"
            )
