"""f of every patch of the pool and of its sub-regions (Sec. III-A).

Each image is decoded and normalised once; crops are cut from it on the device by one gather per batch, so that no patch
ever becomes a file, and patches and sub-regions come out of one pass over the image. Sub-regions are fed at their
native size (A7), and one that several patches share (where the step divides half a patch) is computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nucseg.selection.config import SelectionConfig
from nucseg.selection.pool import bands, windows


@dataclass(frozen=True)
class PatchFeatures:
    """The pool and its features; row i of every array is patch i.

    Attributes
    ----------
    image_ids
        (n,) unicode: id of the patch's image; patches of one image are consecutive, images in the order given.
    rows, cols
        (n,) int64: upper left corner, pixels.
    size
        Side of a patch, pixels.
    features
        (n, d) float32.
    sub_features
        (n, 4, d) float32, sub-regions row-major; (n, 0, d) where they were left out.
    """

    image_ids: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    size: int
    features: np.ndarray
    sub_features: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.image_ids)
        for name in ("rows", "cols", "features", "sub_features"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"PatchFeatures.{name}: expected {n} rows, got {len(getattr(self, name))}")

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows_of(self, patches: Iterable[Any]) -> list[int]:
        """Return the rows of patches of the pool, by image, row and column.

        Raises
        ------
        KeyError
            If a patch is not one of the pool, as centre crops need not be.
        """
        place = {
            key: i
            for i, key in enumerate(zip(self.image_ids.tolist(), self.rows.tolist(), self.cols.tolist(), strict=True))
        }
        return [place[patch.image_id, patch.row, patch.col] for patch in patches]

    def only(self, kept: np.ndarray) -> PatchFeatures:
        """Return the patches that a mask (n,) bool keeps."""
        arrays = (self.image_ids, self.rows, self.cols, self.features, self.sub_features)
        image_ids, rows, cols, features, sub_features = (array[kept] for array in arrays)
        return PatchFeatures(image_ids, rows, cols, self.size, features, sub_features)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything as plain arrays by name, fit for ``np.savez`` without pickling."""
        return {name: np.asarray(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> PatchFeatures:
        """Undo `to_arrays`."""
        return cls(
            **{name: arrays[name] for name in cls.__dataclass_fields__ if name != "size"}, size=int(arrays["size"])
        )


def extract(
    samples: Sequence[Any],
    encoder: nn.Module,
    config: SelectionConfig | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
    parts: bool = True,
    places: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> PatchFeatures:
    """Compute f of every patch of the sliding-window pool and of its four sub-regions.

    Parameters
    ----------
    samples
        Objects with ``.id`` and ``.image`` (H, W, 3) uint8; sizes may differ.
    encoder
        A `nucseg.encoders.Encoder`, or any module from (b, 3, H, W) in [0, 1] to (b, d). It is left as it is: a copy
        in evaluation mode does the work. `config.normalise` does not act here, it is the encoder's property.
    config
        size, step, cover_border, tissue, batch, cpu_batch, precision.
    device
        None: CUDA where there is one.
    progress
        Called as ``progress(done, in all)`` after each batch, in passes over patches: one, with `parts` two for each.
    parts
        Whether to compute the sub-regions too, which only strategies with two levels of clusters look at: as many
        pixels again as the patches have.
    places
        Rows and columns of each image's patches where the caller has them from `windows`, which reads every image.

    Returns
    -------
    PatchFeatures
        On the host, float32. Forward passes in `config.precision` on CUDA, float32 on CPU.
    """
    config = config or SelectionConfig()
    if not len(samples):
        raise ValueError("no images to select patches from")
    device = default_device(device)
    forward, normalise = _prepare(encoder, config, device)
    places = [windows(sample, config) for sample in samples] if places is None else places
    counts = [len(rows) for rows, _ in places]
    if not any(counts):
        raise ValueError(f"no patch of {config.size} pixels shows tissue in at least {config.tissue:.0%} of it")
    features = sub_features = np.empty(0)
    first = 0
    done, passes = 0.0, sum(counts) * (2 if parts else 1)

    def tick(patches: float) -> None:
        nonlocal done
        done += patches
        if progress is not None:
            progress(min(round(done), passes), passes)

    with torch.inference_mode():
        for sample, (rows, cols) in zip(samples, places, strict=True):
            for part, top, image in bands(sample, rows, config.size):
                inside = rows[part] - top, cols[part]
                pixels = normalise(image)
                whole = _run(forward, pixels, *inside, config.size, config, device, tick)
                if not first:  # now the width is known; filling one array keeps the peak at the size of the result
                    features = np.empty((sum(counts), whole.shape[1]), np.float32)
                    sub_features = np.empty((sum(counts), 4 if parts else 0, whole.shape[1]), np.float32)
                own = slice(first, first + len(whole))
                features[own] = whole
                if parts:
                    sub_features[own] = _of_parts(forward, pixels, *inside, config, device, tick)
                first = own.stop
    return PatchFeatures(
        np.repeat([str(sample.id) for sample in samples], counts),
        np.concatenate([rows for rows, _ in places]),
        np.concatenate([cols for _, cols in places]),
        config.size,
        features,
        sub_features,
    )


def default_device(device: str | torch.device | None) -> torch.device:
    """Return `device`, or CUDA where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _prepare(
    encoder: nn.Module, config: SelectionConfig, device: torch.device
) -> tuple[nn.Module, Callable[[np.ndarray], Tensor]]:
    """Return the network, and a function from an image to the (H, W, 3) pixels that it takes, both on the device.

    An `Encoder` is taken apart so that its normalisation runs once per image, in float32, before the cast to half
    precision: [0, 1] in bfloat16 minus the mean would lose the low bits of every pixel.
    """
    kind = getattr(torch, config.precision) if device.type == "cuda" else torch.float32
    encoder = copy.deepcopy(encoder).eval().to(device)
    scale = getattr(encoder, "normalise", nn.Identity())
    net = getattr(encoder, "net", encoder).to(device=device, dtype=kind, memory_format=torch.channels_last)

    def normalise(image: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).float() / 255
        return scale(pixels.permute(2, 0, 1)[None])[0].permute(1, 2, 0).to(kind).contiguous()

    return net, normalise


def _of_parts(
    forward: nn.Module,
    pixels: Tensor,
    rows: np.ndarray,
    cols: np.ndarray,
    config: SelectionConfig,
    device: torch.device,
    tick: Callable[[float], None],
) -> np.ndarray:
    """Features of the row-major sub-regions of each patch, (n, 4, d), every distinct place computed once."""
    half = config.size // 2
    part_rows = (rows[:, None] + [0, 0, half, half]).ravel()
    part_cols = (cols[:, None] + [0, half, 0, half]).ravel()
    distinct, back = np.unique(np.stack([part_rows, part_cols]), axis=1, return_inverse=True)
    share = len(rows) / distinct.shape[1]  # of a patch, for each of them

    def ticks(crops: float) -> None:
        tick(crops * share)

    if distinct.shape[1] == len(part_rows):  # nothing is shared: leave the order, which reads the image in rows
        return _run(forward, pixels, part_rows, part_cols, half, config, device, ticks).reshape(len(rows), 4, -1)
    return _run(forward, pixels, *distinct, half, config, device, ticks)[back.reshape(len(rows), 4)]


def _run(
    forward: nn.Module,
    pixels: Tensor,
    rows: np.ndarray,
    cols: np.ndarray,
    size: int,
    config: SelectionConfig,
    device: torch.device,
    tick: Callable[[float], None],
) -> np.ndarray:
    """Features of the crops at these places, (n, d) float32 on the host; `tick` is told of each batch."""
    batch = config.cpu_batch if device.type == "cpu" else config.batch
    # Equal pixels per batch for patches and sub-regions; equal batches within an image, so that no kernel meets a stub.
    batch *= (config.size // size) ** 2
    out = []
    for crops in crop(pixels, rows, cols, size, batch):
        out.append(forward(crops).float())
        tick(len(crops))
    return torch.cat(out).cpu().numpy()


def crop(pixels: Tensor, rows: np.ndarray, cols: np.ndarray, size: int, batch: int) -> Iterator[Tensor]:
    """Yield the crops at these places in about equal batches, (b, 3, size, size) channels-last.

    `pixels` is (H, W, 3); the windows are a view, and one gather per batch copies what the network reads.
    """
    windows = pixels.unfold(0, size, 1).unfold(1, size, 1).permute(0, 1, 3, 4, 2)  # (H', W', size, size, 3), no copy
    places = [torch.from_numpy(v.astype(np.int64)).to(pixels.device) for v in (rows, cols)]
    pieces = -(-len(rows) // batch)
    for r, c in zip(*(torch.tensor_split(v, pieces) for v in places), strict=True):
        yield windows[r, c].permute(0, 3, 1, 2)
