"""Whole-image prediction: overlapping tiles blended without seams, flip and rotation averaging, bounded memory.

The network fills the device; what follows it (watershed, joining of tiles) is the CPU's work and runs in processes of
its own, while the network goes on with the next image or block.

Deviation: the published HoVer-Net code sets tiles edge to edge; here they overlap and fade into each other, and every
arm is tested in the same way (REFERENCE A32).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from nucseg.models.base import Instances

if TYPE_CHECKING:
    from nucseg.models.base import Segmenter

T = TypeVar("T")


@dataclass(frozen=True)
class InferenceConfig:
    """How images larger than a crop are predicted.

    Attributes
    ----------
    tile, overlap
        Side of a tile and what neighbours share, pixels; a tile is a multiple of 32. The overlap should exceed the
        diameter of a nucleus.
    tta
        Test-time averaging: ``"none"``, ``"flips"`` (4 views) or ``"d4"`` (8 views, with rotations).
    batch
        Largest number of tiles per forward pass; halved as often as a GPU's memory is too small for it.
    precision
        ``"fp32"`` or ``"bf16"`` (autocast).
    block
        Images with a longer side are predicted in blocks of this side and their nuclei joined, in bounded memory.
    workers
        Processes for what follows the network, when there are several images or blocks: 0 = none, -1 = up to four
        beside a GPU and none without one, where network and watershed share the same cores. Each takes about 0.7 GB.
    """

    tile: int = 512
    overlap: int = 96
    tta: Literal["none", "flips", "d4"] = "none"
    batch: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    block: int = 2048
    workers: int = -1

    def __post_init__(self) -> None:
        if self.tile < 64 or self.tile % 32:
            raise ValueError(f"tile must be a multiple of 32 from 64, got {self.tile}")
        if not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(f"overlap must be 0 to half a tile, got {self.overlap}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if self.block < 2 * self.tile:
            raise ValueError(f"block must be at least two tiles ({2 * self.tile}), got {self.block}")
        if self.workers < -1:
            raise ValueError(f"workers must be -1 (automatic), 0 (none) or more, got {self.workers}")

    def processes(self, device: torch.device) -> int:
        """Return how many processes finish predictions made on a device."""
        if self.workers >= 0:
            return self.workers
        return min(4, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0


@runtime_checkable
class DenseModel(Protocol):
    """A network of maps at the input's resolution."""

    vector_channels: tuple[int, int] | None  # channels that are the x and y of a vector, if any

    def maps(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Predict for images in [0, 1] whose sides are multiples of 32."""


@torch.no_grad()
def predict_maps(model: DenseModel, image: np.ndarray, config: InferenceConfig) -> Float[np.ndarray, "c h w"]:
    """Predict the maps of an image, tile by tile.

    Tiles fade into each other by a raised cosine, but not at the image's own borders. The model is put in eval mode and
    back.

    Parameters
    ----------
    model
        Its weights say on which device all of this happens.
    image
        (H, W, 3) uint8; held on the device together with its maps, so at most `config.block` on a side for large ones.
    config
        Tiles and views.
    """
    check_image(image)
    device = next(model.parameters()).device
    height, width = image.shape[:2]
    rows, tile_h = _even(height, config.tile, config.overlap)
    cols, tile_w = _even(width, config.tile, config.overlap)
    full_h, full_w = rows[-1] + tile_h, cols[-1] + tile_w
    # Up to 31 pixels beyond the image, so that tiles are multiples of 32.
    padded = np.pad(image, ((0, full_h - height), (0, full_w - width), (0, 0)), mode="symmetric")
    pixels = torch.from_numpy(padded).to(device).permute(2, 0, 1)
    places = [(row, col) for row in rows for col in cols]
    total = None
    weight = torch.zeros(full_h, full_w, device=device)

    was_training = model.training
    model.eval()
    try:
        batch = config.batch
        while places:
            some = places[:batch]
            tiles = torch.stack([pixels[:, r : r + tile_h, c : c + tile_w] for r, c in some]).float() / 255
            try:
                maps = predict_views(model, tiles, config)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2
                continue
            places = places[batch:]
            if total is None:
                total = torch.zeros(maps.shape[1], full_h, full_w, device=device)
            for (r, c), tile_maps in zip(some, maps, strict=True):
                down = _window(tile_h, config.overlap, r > 0, r + tile_h < full_h)
                across = _window(tile_w, config.overlap, c > 0, c + tile_w < full_w)
                window = down.outer(across).to(device)
                total[:, r : r + tile_h, c : c + tile_w] += window * tile_maps
                weight[r : r + tile_h, c : c + tile_w] += window
    finally:
        model.train(was_training)
    return (total / weight)[:, :height, :width].cpu().numpy()


def predict_views(
    model: DenseModel, tiles: Float[Tensor, "b 3 h w"], config: InferenceConfig
) -> Float[Tensor, "b c h w"]:
    """Predict flipped and turned views of the tiles, turn the maps back (vectors too) and average."""
    turns = (False, True) if config.tta == "d4" else (False,)
    mirrors = (False, True) if config.tta != "none" else (False,)
    views = [(turn, down, across) for turn in turns for down in mirrors for across in mirrors]
    total = 0
    for turn, down, across in views:
        view = tiles.transpose(2, 3) if turn else tiles
        axes = [axis for axis, mirrored in ((2, down), (3, across)) if mirrored]
        view = view.flip(axes) if axes else view
        with torch.autocast(tiles.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            maps = model.maps(view.contiguous(memory_format=torch.channels_last)).float()
        maps = maps.flip(axes) if axes else maps
        if model.vector_channels is not None and (turn or axes):
            x, y = model.vector_channels
            maps = maps.clone()
            maps[:, x] *= -1 if across else 1
            maps[:, y] *= -1 if down else 1
            if turn:
                maps[:, [x, y]] = maps[:, [y, x]]
        total = total + (maps.transpose(2, 3) if turn else maps)
    return total / len(views)


def predict_instances(
    begin: Callable[[np.ndarray], Callable[[], Instances]],
    image: np.ndarray,
    config: InferenceConfig,
    workers: int = 0,
) -> Instances:
    """Segment an image of any size: at once, or beyond `config.block` pixels on a side in overlapping blocks.

    Parameters
    ----------
    begin
        Does the network's part on one block, (H, W, 3) uint8, and returns a function for the rest.
    image
        (H, W, 3) uint8, any size from 32 pixels.
    config
        Block and overlap.
    workers
        Processes that finish blocks while the network goes on; 0 = none.
    """
    check_image(image)
    if max(image.shape[:2]) <= config.block:
        return begin(image)()
    places: deque = deque()

    def begun() -> Iterator[Callable[[], Instances]]:
        for row, col, block in tiles_of(image, config.block, config.overlap):
            places.append((row, col))
            yield begin(np.ascontiguousarray(block))

    finished = run_ahead(begun(), workers)
    return merge_tiles(((*places.popleft(), found) for found in finished), image.shape[:2])


def predict_all(model: Segmenter, images: Sequence[np.ndarray], workers: int | None = None) -> Iterator[np.ndarray]:
    """Segment several images, in their order: the network works on the next ones while others are finished.

    Parameters
    ----------
    model
        Its `Segmenter.begin` runs here; what that returns runs in processes that know nothing of the device.
    images
        (H, W, 3) uint8 each.
    workers
        Number of processes; None = as the model's `InferenceConfig` says, 0 = none. A single image needs none.

    Yields
    ------
    array
        Label map (H, W) int32.
    """
    workers = workers_for(model, len(images)) if workers is None else workers
    for found in run_ahead((model.begin(image) for image in images), workers if len(images) > 1 else 0):
        yield found.labels


def workers_for(model: Segmenter, images: int) -> int:
    """Return in how many processes a model's predictions for so many images are finished (`run_ahead`)."""
    config = getattr(model, "inference", None)
    return config.processes(next(model.parameters()).device) if config and images > 1 else 0


def run_ahead(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[T]:
    """Call tasks in other processes while the next ones are being made here; results in the order of the tasks.

    At most one task more than there are workers is under way or waiting. What a task raises is raised here, with a note
    that says which task it was. The processes are fresh ones (not forks, which would break CUDA), stay for the next
    call, and end by themselves when they are no longer needed.
    """
    if workers < 1:
        for task in tasks:
            yield task()
        return
    from joblib.externals.loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=workers, timeout=120)
    waiting: deque = deque()

    def next_result(number: int) -> T:
        try:
            return waiting.popleft().result()
        except Exception as error:
            error.add_note(f"raised in a worker process, by task {number} (counted from 0)")
            raise

    done = 0
    try:
        for task in tasks:
            waiting.append(executor.submit(task))
            if len(waiting) > workers:
                yield next_result(done)
                done += 1
        while waiting:
            yield next_result(done)
            done += 1
    finally:
        for future in waiting:
            future.cancel()


def tiles_of(image: np.ndarray, tile: int, overlap: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cut an image into tiles of at most `tile` pixels a side that share `overlap` pixels: row, column, view."""
    for row, col in places_of(image.shape[:2], tile, overlap):
        yield row, col, image[row : row + tile, col : col + tile]


def places_of(shape: tuple[int, int], tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return row and column of each tile of an image of that shape, row by row."""
    rows, cols = (_inside(length, tile, overlap) for length in shape)
    return [(row, col) for row in rows for col in cols]


_NEAR = 8  # pixels; a nucleus this close to a border between tiles is less sure than the neighbour's view of it


class _Piece(NamedTuple):
    cut: bool  # by a border between tiles, or close to one
    score: float
    row: int
    col: int
    mask: np.ndarray
    window: tuple[int, int, int, int]  # of its tile: top, left, bottom, right


def merge_tiles(
    tiles: Iterable[tuple[int, int, Instances]], shape: tuple[int, int], canvas: np.ndarray | None = None
) -> Instances:
    """Join the nuclei of overlapping tiles into one label map, each nucleus once.

    Whole nuclei come before those that a tile border cuts, and among these the more certain ones. A nucleus already
    more than half covered is a duplicate; two cut pieces that agree where both tiles look are one nucleus.

    Parameters
    ----------
    tiles
        Row, column and prediction of each tile; consumed one by one.
    shape
        Of the whole image.
    canvas
        Zeros of that shape, int32, for the label map: a slide's may lie on the disk. None: it is made in memory.
    """
    pieces: list[_Piece] = []
    for row, col, (labels, scores) in tiles:
        bottom, right = row + labels.shape[0], col + labels.shape[1]
        for i, box in enumerate(ndimage.find_objects(labels)):
            if box is None:
                continue
            cut = (
                (box[0].start < _NEAR and row > 0)
                or (box[1].start < _NEAR and col > 0)
                or (box[0].stop > labels.shape[0] - _NEAR and bottom < shape[0])
                or (box[1].stop > labels.shape[1] - _NEAR and right < shape[1])
            )
            place = (row + box[0].start, col + box[1].start)
            pieces.append(_Piece(cut, float(scores[i]), *place, labels[box] == i + 1, (row, col, bottom, right)))
    pieces.sort(key=lambda piece: (piece.cut, -piece.score))

    merged = np.zeros(shape, dtype=np.int32) if canvas is None else canvas
    placed: list[_Piece] = []
    for piece in pieces:
        h, w = piece.mask.shape
        region = merged[piece.row : piece.row + h, piece.col : piece.col + w]
        below = region[piece.mask]
        area = below.size
        other, shared = _most_frequent(below)
        if other and piece.cut and placed[other - 1].cut and _agree(piece, placed[other - 1], shared):
            region[piece.mask & (region == 0)] = other
        elif 2 * np.count_nonzero(below) <= area:
            placed.append(piece)
            region[piece.mask & (region == 0)] = len(placed)
    return Instances(merged, np.array([piece.score for piece in placed], dtype=np.float32))


def _agree(piece: _Piece, other: _Piece, shared: int) -> bool:
    """Whether more than half of what lies in the other's tile is shared with the other."""
    top, left, bottom, right = other.window
    rows = slice(max(top - piece.row, 0), max(bottom - piece.row, 0))
    cols = slice(max(left - piece.col, 0), max(right - piece.col, 0))
    return 2 * shared > int(np.count_nonzero(piece.mask[rows, cols]))


def _most_frequent(ids: np.ndarray) -> tuple[int, int]:
    ids = ids[ids > 0]
    if not ids.size:
        return 0, 0
    values, counts = np.unique(ids, return_counts=True)
    return int(values[counts.argmax()]), int(counts.max())


def check_image(image: np.ndarray) -> None:
    """Raise for anything but (H, W, 3) uint8 of at least 32 pixels a side."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"image: expected a (H, W, 3) uint8 array, got {found}; drop an alpha channel, scale 16 bits down"
        )
    if min(image.shape[:2]) < 32:
        raise ValueError(f"image: at least 32 pixels a side, got {image.shape[:2]}")


def _even(length: int, tile: int, overlap: int) -> tuple[list[int], int]:
    """Starts and common side, a multiple of 32, of the fewest tiles up to `tile` that cover `length`, evenly spread."""
    count = max(1, -(-(length - overlap) // (tile - overlap)))
    side = -(-(length + (count - 1) * overlap) // count)
    side = -(-side // 32) * 32
    return [i * (side - overlap) for i in range(count)], side


def _inside(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles that cover `length` and never reach beyond it."""
    starts = list(range(0, max(length - overlap, 1), tile - overlap))
    starts[-1] = max(min(starts[-1], length - tile), 0)
    return starts


def _window(length: int, overlap: int, fade_in: bool, fade_out: bool) -> Tensor:
    """Weights that rise and fall along a raised cosine over the overlap, so that those of neighbours add up to 1."""
    ramp = torch.sin(torch.pi / 2 * (torch.arange(overlap) + 0.5) / max(overlap, 1)) ** 2
    weights = torch.ones(length)
    if fade_in:
        weights[:overlap] *= ramp
    if fade_out:
        weights[length - overlap :] *= ramp.flip(0)
    return weights
