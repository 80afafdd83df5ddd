"""NaiveAug (Sec. IV-A, IV-D; REFERENCE A28): the augmentation that every arm shares, a whole batch at a time on its
device.

The paper lists rotation by 90/180/270 degrees, flips, Gaussian blur, Gaussian noise and colour jitter, without sizes;
the sizes below are ours [deviation: none are printed]. Stain jitter perturbs haematoxylin and eosin themselves, in
optical density. Arbitrary rotation and scaling are off by default, as in the paper, and are there for the stronger
settings of a profile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Ruifrok and Johnston's optical densities of haematoxylin, eosin and DAB in R, G, B: one stain a row.
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


@dataclass(frozen=True)
class AugmentConfig:
    """The strength of each change; 0, False or an empty range turns one off.

    Attributes
    ----------
    rot90, flip
        Rotation by a random multiple of 90 degrees; mirroring along each axis with probability 1/2. Exact.
    rotate
        Largest arbitrary rotation, degrees (180 = any).
    scale
        Range of the enlargement, 1 = none. (0.8, 1.2) in the strong setting.
    colour_probability
        Share of images whose stain and colour are changed.
    stain
        Each stain's optical density is multiplied by 1 + U(-stain, stain).
    brightness, contrast, saturation
        Added U(-b, b); contrast and saturation multiplied by 1 + U(-c, c). In units of the [0, 1] range.
    hue
        Largest turn of the colour circle, degrees.
    blur_probability, blur_sigma
        Share of blurred images; range of the Gaussian's standard deviation, pixels.
    noise_probability, noise_sigma
        Share of images with noise; range of its standard deviation in the [0, 1] range.
    """

    rot90: bool = True
    flip: bool = True
    rotate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    colour_probability: float = 0.8
    stain: float = 0.1
    brightness: float = 0.08
    contrast: float = 0.15
    saturation: float = 0.15
    hue: float = 8.0
    blur_probability: float = 0.25
    blur_sigma: tuple[float, float] = (0.3, 1.2)
    noise_probability: float = 0.25
    noise_sigma: tuple[float, float] = (0.0, 0.03)

    def __post_init__(self) -> None:
        for name in ("colour_probability", "blur_probability", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("stain", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("rotate", "hue"):
            if not 0 <= getattr(self, name) <= 180:
                raise ValueError(f"{name} must be 0 to 180 degrees, got {getattr(self, name)}")
        for name in ("scale", "blur_sigma", "noise_sigma"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be an ascending range of numbers >= 0, got {getattr(self, name)}")
        if not 0.25 <= self.scale[0] <= self.scale[1] <= 4:
            raise ValueError(f"scale must lie in 0.25 to 4, got {self.scale}")

    @property
    def resamples(self) -> bool:
        """Whether pixels move off the grid, so that images are interpolated."""
        return self.rotate > 0 or self.scale != (1.0, 1.0)

    def window(self, size: int) -> int:
        """Return the side of the square window whose pixels suffice for an output of side `size`."""
        angle = math.radians(min(self.rotate, 45.0))
        return math.ceil(size * (math.cos(angle) + math.sin(angle)) / self.scale[0]) if self.resamples else size

    def largest_id(self, before: int) -> int:
        """Return the largest id that `augment` can make of ids up to `before`: those of mirrored nuclei are new."""
        return 10 * (before + 1) if self.resamples else before


def augment(
    images: Float[Tensor, "b 3 h w"],
    label_maps: Int[Tensor, "b h w"],
    config: AugmentConfig,
    generator: torch.Generator,
    size: int | None = None,
) -> tuple[Float[Tensor, "b 3 s t"], Int[Tensor, "b s t"]]:
    """Augment a batch, each image in its own way; nothing leaves the device.

    Parameters
    ----------
    images
        In [0, 1].
    label_maps
        Their label maps, same device. Labels move with the pixels (nearest neighbour) and keep their ids, background 0
        and unknown `nucseg.labels.IGNORE`.
    config
        What to change, and how much.
    generator
        Source of all randomness, on the CPU or on the images' device (faster, for noise).
    size
        Side of the centred square to return; None keeps the shape. With arbitrary rotation or scale, give windows of
        side ``config.window(size)``: pixels beyond a window are mirrored, and mirrored nuclei get ids of their own.

    Returns
    -------
    images, label_maps
        In [0, 1] and of the same dtypes; new tensors.
    """
    # A training's autocast would round coordinates to eight bits: pixels would land up to three places beside theirs.
    with torch.autocast(images.device.type, enabled=False):
        draw = _Draw(generator, images)
        images, label_maps = _move(images, label_maps, config, draw, size)
        if config.colour_probability > 0:
            images = _recolour(images, config, draw)
        if config.blur_probability > 0:
            images = _blur(images, draw.chance(config.blur_probability) * draw.between(*config.blur_sigma), config)
        if config.noise_probability > 0:
            sigma = draw.chance(config.noise_probability) * draw.between(*config.noise_sigma)
            images = images + sigma.view(-1, 1, 1, 1) * draw.normal(images.shape)
        return images.clamp(0, 1), label_maps


class _Draw:
    """One random number per image, drawn where the generator lives and used where the images live."""

    def __init__(self, generator: torch.Generator, like: Tensor):
        self.generator, self.batch, self.device, self.dtype = generator, len(like), like.device, like.dtype

    def between(self, low: float, high: float) -> Tensor:
        unit = torch.rand(self.batch, generator=self.generator, device=self.generator.device)
        return (low + (high - low) * unit).to(self.device, self.dtype)

    def chance(self, probability: float) -> Tensor:
        return (self.between(0.0, 1.0) < probability).to(self.dtype)

    def normal(self, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return noise.to(self.device, self.dtype)


def _move(
    images: Tensor, label_maps: Tensor, config: AugmentConfig, draw: _Draw, size: int | None
) -> tuple[Tensor, Tensor]:
    """Rotate, mirror and scale about the centre: a gather for labels, a gather or grid sample for images."""
    b, _, h, w = images.shape
    out_h, out_w = (h, w) if size is None else (size, size)
    if out_h == h and out_w == w and not (config.rot90 or config.flip or config.resamples):
        return images.clone(), label_maps.clone()

    # Output offsets from the centre (x right, y down) go through one 2x2 matrix per image to offsets in the source.
    quarters = (
        (4 * draw.between(0.0, 1.0)).floor().clamp(max=3) if config.rot90 else torch.zeros(b, device=images.device)
    )
    if out_h != out_w or h != w:
        quarters = 2 * (quarters // 2)  # a quarter turn does not keep the shape of a rectangle
    cos, sin = torch.round(torch.cos(quarters * math.pi / 2)), torch.round(torch.sin(quarters * math.pi / 2))
    mirror_x = 1 - 2 * draw.chance(0.5) if config.flip else torch.ones(b, device=images.device)
    mirror_y = 1 - 2 * draw.chance(0.5) if config.flip else torch.ones(b, device=images.device)
    matrix = torch.stack((cos * mirror_x, -sin * mirror_y, sin * mirror_x, cos * mirror_y), dim=1).view(b, 2, 2)
    if config.resamples:
        angle = draw.between(-config.rotate, config.rotate) * math.pi / 180
        zoom = torch.exp(draw.between(math.log(config.scale[0]), math.log(config.scale[1])))
        turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=1).view(b, 2, 2)
        matrix = turn @ matrix / zoom.view(b, 1, 1)

    like = {"device": images.device, "dtype": torch.float32}
    y = torch.arange(out_h, **like) - (out_h - 1) / 2
    x = torch.arange(out_w, **like) - (out_w - 1) / 2
    if (h - out_h) % 2 or (w - out_w) % 2:  # centre an even square in an odd window on whole pixels
        y, x = y + (h - out_h) % 2 / 2, x + (w - out_w) % 2 / 2
    offsets = torch.stack((x.expand(out_h, out_w), y[:, None].expand(out_h, out_w))).view(2, -1)
    source = matrix.float() @ offsets
    source_x, source_y = source[:, 0] + (w - 1) / 2, source[:, 1] + (h - 1) / 2

    column, tile_x = _mirror(source_x.round().long(), w)
    row, tile_y = _mirror(source_y.round().long(), h)
    index = row * w + column
    labels = label_maps.reshape(b, -1).gather(1, index)
    if config.resamples:
        # Beyond the window nuclei appear a second time: another id, or their centroid would lie between the two.
        tile = 3 * tile_y.clamp(-1, 1) + tile_x.clamp(-1, 1)
        fresh = labels + torch.where(tile == 0, 0, tile + 5) * (label_maps.max() + 1)
        labels = torch.where(labels > 0, fresh.to(labels.dtype), labels)  # background and unknown stay
        grid = torch.stack(((2 * source_x + 1) / w - 1, (2 * source_y + 1) / h - 1), dim=-1)
        moved = F.grid_sample(
            images, grid.view(b, out_h, out_w, 2).to(images.dtype), padding_mode="reflection", align_corners=False
        )
    else:
        moved = images.reshape(b, 3, -1).gather(2, index[:, None].expand(-1, 3, -1)).view(b, 3, out_h, out_w)
    return moved, labels.view(b, out_h, out_w)


def _mirror(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Mirror positions beyond [0, length) at the edges; also return in which mirrored tile they were."""
    tile = torch.div(position, length, rounding_mode="floor")
    inside = position - tile * length
    return torch.where(tile % 2 == 0, inside, length - 1 - inside), tile


def _recolour(images: Tensor, config: AugmentConfig, draw: _Draw) -> Tensor:
    """Jitter the stains in optical density, then hue, saturation, contrast and brightness as one affine map of RGB."""
    b = len(images)
    on = draw.chance(config.colour_probability).view(b, 1)
    eye = torch.eye(3, device=images.device, dtype=images.dtype)
    flat = images.reshape(b, 3, -1)

    to_densities, to_amounts, luminance, third, cross = _colour_constants(images.device, images.dtype)
    jitter = torch.stack(
        [draw.between(-config.stain, config.stain) for _ in range(2)] + [torch.zeros_like(on[:, 0])], 1
    )
    density_map = to_densities @ torch.diag_embed(1 + on * jitter) @ to_amounts
    density = -torch.log(flat.clamp(min=1 / 255))
    flat = torch.exp(-(density_map @ density).clamp(min=0))

    grey = luminance.expand(3, 3)
    turn = (on[:, 0] * draw.between(-config.hue, config.hue) * math.pi / 180).view(b, 1, 1)
    hue = third + turn.cos() * (eye - third) + turn.sin() * cross  # a rotation about the grey axis
    saturation = (1 + on[:, 0] * draw.between(-config.saturation, config.saturation)).view(b, 1, 1)
    contrast = (1 + on[:, 0] * draw.between(-config.contrast, config.contrast)).view(b, 1, 1)
    brightness = (on[:, 0] * draw.between(-config.brightness, config.brightness)).view(b, 1, 1)
    colour_map = contrast * ((saturation * eye + (1 - saturation) * grey) @ hue)
    centre = flat.mean(dim=(1, 2), keepdim=True)
    return ((colour_map @ (flat - centre)) + centre + brightness).view(images.shape)


@functools.cache  # copying them from the host at every step would make it wait for the device
def _colour_constants(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Stains to densities and back, luminance of RGB, and the two matrices of a turn about the grey axis."""
    stains, root = F.normalize(torch.tensor(_STAINS), dim=1), 1 / math.sqrt(3)
    cross = torch.tensor([[0, -root, root], [root, 0, -root], [-root, root, 0]])
    constants = (stains.T, torch.linalg.inv(stains.T), torch.tensor([0.299, 0.587, 0.114]),
                 torch.full((3, 3), 1 / 3), cross)  # fmt: skip
    return tuple(constant.to(device, dtype) for constant in constants)


def _blur(images: Tensor, sigma: Tensor, config: AugmentConfig) -> Tensor:
    """Blur each image with its own Gaussian (sigma 0 = leave alone), as two grouped convolutions."""
    b, c, h, w = images.shape
    radius = min(max(1, math.ceil(2.5 * config.blur_sigma[1])), h - 1, w - 1)
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma.clamp(min=0.05).view(b, 1)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)
    planes = F.pad(images, (radius,) * 4, mode="reflect").reshape(1, b * c, h + 2 * radius, w + 2 * radius)
    planes = F.conv2d(planes, kernel.view(b * c, 1, 1, -1), groups=b * c)
    return F.conv2d(planes, kernel.view(b * c, 1, -1, 1), groups=b * c).view(b, c, h, w)
