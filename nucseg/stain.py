"""Stain normalisation: every image in the colours of one reference, so that a segmenter meets no new ones.

Not the paper's. Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009: in
optical density, a pixel of H&E is the sum of two stains, each a fixed colour times an amount. The two colours of an
image are the extreme directions of its pixels in the plane in which they vary most; its amounts are scaled to those of
the reference, and shown in the reference's colours.

Written here, though libraries have it: they hold several copies of a whole image in double precision. Colours and
amounts are measured on a sample of the pixels, and the image is then recoloured in bands, whatever its size.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

# Of Macenko's reference, as it is in common use: haematoxylin and eosin in optical density (red, green, blue), one a
# column, and the amount that 99 % of an image's pixels stay below.
REFERENCE = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
AMOUNTS = np.array([1.9705, 1.0308])

SAMPLE = 200_000  # pixels from which colours and amounts are measured
BAND = 4_000_000  # pixels recoloured at a time
TISSUE = 0.1  # optical density of a channel from which a pixel is tissue; Macenko: 0.15 in decimal logarithms of 240
LEAST = 500  # sampled pixels of tissue, without which there is nothing to measure
APART = np.cos(np.deg2rad(5.0))  # cosine between two stains that are one


def normalise(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return an H&E image in the reference's colours; a new array.

    An image with hardly any tissue is returned as it is. Of one in which two stains cannot be told apart, only the
    amounts are scaled.

    Parameters
    ----------
    image
        The more of a slide it shows, the better its stains are known: a patch of 256 pixels is enough as a rule.

    Raises
    ------
    ValueError
        For another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: expected a (H, W, 3) uint8 array, got {image.shape} {image.dtype}")
    flat = image.reshape(-1, 3)
    seen = flat[:: max(1, len(flat) // SAMPLE)]
    # The glass of this very image: scanners differ in what they call white.
    white = np.percentile(seen, 99, axis=0).clip(128, 255)
    # Of each channel's 256 values: no logarithm is taken twice.
    density = np.maximum(-np.log(np.maximum(np.arange(256), 1)[:, None] / white), 0)
    channels = np.arange(3)
    seen = density[seen, channels]
    tissue = seen[(seen > TISSUE).any(axis=1)]
    if len(tissue) < LEAST:
        return image.copy()
    stains = stain_colours(tissue)
    amounts = np.linalg.pinv(stains)  # from densities to amounts
    scale = AMOUNTS / np.percentile(seen @ amounts.T, 99, axis=0).clip(1e-3)
    to_amounts = (scale[:, None] * amounts).astype(np.float32)
    density, reference = density.astype(np.float32), REFERENCE.astype(np.float32)

    result = np.empty_like(flat)
    for start in range(0, len(flat), BAND):
        part = density[flat[start : start + BAND], channels]
        part = np.maximum(part @ to_amounts.T, 0) @ reference.T
        result[start : start + BAND] = np.rint(255 * np.exp(-part))
    return result.reshape(image.shape)


def stain_colours(tissue: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "3 2"]:
    """Return the colours of haematoxylin and eosin in optical density, of length 1, from densities of tissue.

    They are the directions between which 98 % of the densities lie, in the plane of the two largest eigenvectors of
    their covariance; haematoxylin is the one that takes more red. Two that are less than five degrees apart are no two
    stains: the reference's are returned then.
    """
    plane = np.linalg.eigh(np.cov(tissue.T))[1][:, [2, 1]]
    plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)
    angles = np.arctan2(tissue @ plane[:, 1], tissue @ plane[:, 0])
    colours = np.stack([plane @ (np.cos(a), np.sin(a)) for a in np.percentile(angles, (1, 99))], axis=1)
    if colours[:, 0] @ colours[:, 1] > APART:
        return REFERENCE / np.linalg.norm(REFERENCE, axis=0)
    return colours[:, np.argsort(-colours[0], kind="stable")]
