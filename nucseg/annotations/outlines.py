"""Outlines of a label map along pixel edges: exact, so that filling them again gives the same pixels.

Each 4-connected piece of a nucleus becomes one polygon, a shell and its holes; a nucleus in several pieces becomes a
multipolygon. Corners are pixel corners, (0, 0) the upper left of the image, as in QuPath; vertices in the middle of a
straight line are left out. Rings never cross and never visit a point twice, so the polygons are valid everywhere.
"""

from __future__ import annotations

import numpy as np

from nucseg.labels import check_label_map

# an edge of a pixel with the pixel on its right hand (y grows downwards): 0 east along its top, 1 south along its
# right side, 2 west along its bottom, 3 north along its left side; (row, col) offsets of start and of end
STARTS = ((0, 0), (0, 1), (1, 1), (1, 0))
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
NEIGHBOURS = ((-1, 0), (0, 1), (1, 0), (0, -1))


def trace(labels: np.ndarray) -> dict[int, list[list[np.ndarray]]]:
    """Trace the outlines of all nuclei.

    Parameters
    ----------
    labels
        (H, W) label map.

    Returns
    -------
    dict
        By id in ascending order: polygons, each a list of rings, shell first, then holes; a ring is (n, 2) int64
        x, y without repetition of the first point. Shells have a positive signed area sum(x_i y_i+1 - x_i+1 y_i) / 2,
        holes a negative one.
    """
    check_label_map(labels)
    outlines: dict[int, list[list[np.ndarray]]] = {int(id): [] for id in np.unique(labels) if id}
    if not outlines:
        return outlines
    pieces, owners = _pieces(labels)
    shells: dict[int, list[np.ndarray]] = {}
    for piece, ring in _rings(pieces):
        x, y = ring[:, 0], ring[:, 1]
        is_shell = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0
        shells.setdefault(piece, []).insert(0 if is_shell else len(shells[piece]), ring)
    for piece in sorted(shells):
        outlines[int(owners[piece])].append(shells[piece])
    return outlines


def _pieces(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the 4-connected pieces of equal labels, (H, W) int64, and give each piece's label."""
    from skimage.measure import label

    pieces = label(labels, background=0, connectivity=1).astype(np.int64)
    owners = np.zeros(pieces.max() + 1, np.int64)
    owners[pieces.ravel()] = labels.ravel()
    return pieces, owners


def _rings(pieces: np.ndarray):
    """Yield (piece, ring) for every closed outline."""
    height, width = pieces.shape
    padded = np.pad(pieces, 1)
    owner, start, end, heading = [], [], [], []
    for direction, ((row, col), (down, right), (up, side)) in enumerate(zip(STARTS, STEPS, NEIGHBOURS, strict=True)):
        beside = padded[1 + up : 1 + up + height, 1 + side : 1 + side + width]
        rows, cols = np.nonzero((pieces > 0) & (pieces != beside))
        owner.append(pieces[rows, cols])
        start.append((rows + row) * (width + 1) + cols + col)
        end.append((rows + row + down) * (width + 1) + cols + col + right)
        heading.append(np.full(len(rows), direction))
    owner, start, end, heading = map(np.concatenate, (owner, start, end, heading))
    following = _following(owner, start, end, heading, (height + 1) * (width + 1)).tolist()
    points, owners = start.tolist(), owner.tolist()
    done = bytearray(len(points))
    for first in range(len(points)):
        if done[first]:
            continue
        # walk round; when a corner comes a second time, the loop since then is a ring of its own
        path: list[int] = []
        place: dict[int, int] = {}
        edge = first
        while not done[edge]:
            done[edge] = 1
            point = points[edge]
            if point in place:
                yield owners[first], _corners(path[place[point] :], width)
                for gone in path[place[point] :]:
                    del place[gone]
                del path[len(place) :]
            place[point] = len(path)
            path.append(point)
            edge = following[edge]
        yield owners[first], _corners(path, width)


def _following(owner, start, end, heading, n_points) -> np.ndarray:
    """Index of the edge that goes on where each edge ends: to the right if there is one, so pieces stay apart."""
    key = (owner * n_points + start) * 4 + heading
    order = np.argsort(key)
    key = key[order]
    following = np.full(len(owner), -1)
    for turn in (3, 0, 1):  # left, straight on, right: the last found wins
        wanted = (owner * n_points + end) * 4 + (heading + turn) % 4
        at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
        found = key[at] == wanted
        following[found] = order[at[found]]
    return following


def _corners(path: list[int], width: int) -> np.ndarray:
    """Points of a closed walk as x, y, those in the middle of a straight line left out."""
    points = np.array(path)
    ring = np.stack([points % (width + 1), points // (width + 1)], axis=1)
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[(before != after).any(axis=1)]
