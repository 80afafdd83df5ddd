"""What critics and generators of CSinGAN minimise (Sec. III-B, Eq. 3 and 4); deviations are listed in `pyramid.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nucseg.gan.fast_conv import for_penalty

REGIONS = ("global", "foreground", "background")  # D_g, D_f, D_b


def area_of(mask: Float[Tensor, "b 1 h w"] | None, region: str) -> Float[Tensor, "b 1 h w"] | None:
    """Return where the critic of `region` looks: m for nuclei, 1 - m for background, None for everywhere."""
    if region == "global":
        return None
    return mask if region == "foreground" else 1 - mask


def centre_crop(area: Float[Tensor, "b 1 h w"], height: int, width: int) -> Float[Tensor, "b 1 h2 w2"]:
    """Cut the centre of `height` x `width` that an unpadded network's map stands for."""
    top, left = (area.shape[-2] - height) // 2, (area.shape[-1] - width) // 2
    return area[..., top : top + height, left : left + width]


def gradient_penalty(
    critic: nn.Module,
    real: Float[Tensor, "1 3 h w"],
    fake: Float[Tensor, "b 3 h w"],
    mix: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, ""]:
    """E[(|grad D(x^)|_2 - 1)^2] at x^ = mix x + (1 - mix) y, the norm per pixel over channels (REFERENCE A24)."""
    between = torch.lerp(fake.detach(), real.expand_as(fake), mix).requires_grad_()
    with for_penalty():
        out = critic(between)
    (gradient,) = torch.autograd.grad(out, between, torch.ones_like(out), create_graph=True)
    return (torch.linalg.vector_norm(gradient, dim=1) - 1).square().mean()


class View(NamedTuple):
    """What one critic is shown in one step, the same for all its updates."""

    real: Float[Tensor, "1 3 h w"]
    fake: Float[Tensor, "b 3 h w"]  # in the generator's graph
    real_area: Float[Tensor, "1 1 h2 w2"] | None  # what weighs its map: sums to 1 (or 0), None for a plain mean
    fake_area: Float[Tensor, "b 1 h2 w2"] | None


def views(
    regions: Iterable[str],
    real: Float[Tensor, "1 3 h w"],
    real_mask: Float[Tensor, "1 1 h w"] | None,
    fake: Float[Tensor, "b 3 h w"],
    fake_mask: Float[Tensor, "b 1 h w"] | None,
    margin: int,
    masked_average: bool = True,
    min_area: float = 0.0,
) -> dict[str, View]:
    """Mask real and fake images for each critic (Eq. 3); `margin` pixels are lost on each side of a critic's map.

    Where real or fake masks leave a critic less than `min_area` of its images, it would see a constant: BatchNorm then
    divides by nothing and the penalty explodes. For that batch it is shown the whole images and its scores count 0:
    only the penalty is left.
    """
    result = {}
    for name in regions:
        x_area, y_area = area_of(real_mask, name), area_of(fake_mask, name)
        if x_area is None:
            result[name] = View(real, fake, None, None)
            continue
        enough = (torch.minimum(x_area.mean(), y_area.mean()) >= min_area).float()
        x_area, y_area = torch.maximum(x_area, 1 - enough), torch.maximum(y_area, 1 - enough)
        weights = (_weights(area, margin, masked_average) * enough for area in (x_area, y_area))
        result[name] = View(real * x_area, fake * y_area, *weights)
    return result


def _weights(area: Float[Tensor, "b 1 h w"], margin: int, masked_average: bool) -> Float[Tensor, "b 1 h2 w2"]:
    area = centre_crop(area, area.shape[-2] - 2 * margin, area.shape[-1] - 2 * margin)
    area = area if masked_average else torch.ones_like(area)
    return area / area.sum().clamp(min=1)


def score(
    critic: nn.Module, images: Float[Tensor, "b 3 h w"], area: Float[Tensor, "b 1 h2 w2"] | None
) -> Float[Tensor, ""]:
    """E[D(images)]: the critic's map averaged with the weights `area`."""
    out = critic(images)
    return out.mean() if area is None else (out * area).sum()


def critic_losses(
    critics: Mapping[str, nn.Module] | nn.ModuleDict,
    weights: Mapping[str, float],
    shown: Mapping[str, View],
    lambda_: float,
    mix: Float[Tensor, "b 1 1 1"] | None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]], Float[Tensor, ""] | None]:
    """L_ADV of Eq. 3, as the critics minimise it; without `mix` without the gradient penalty.

    Returns
    -------
    loss
        The weighted sum.
    distances
        E[D(x)] - E[D(y)] of each critic, detached: its estimate of how far apart real and fake are.
    penalty
        Sum of the gradient penalties, detached; None without `mix`.
    """
    loss, penalty, distances = 0.0, None, {}
    for name, critic in critics.items():
        x, y, x_area, y_area = shown[name]
        y = y.detach()
        distance = score(critic, x, x_area) - score(critic, y, y_area)
        loss = loss - weights[name] * distance
        distances[name] = distance.detach()
        if mix is not None:
            gp = gradient_penalty(critic, x, y, mix)
            loss = loss + weights[name] * lambda_ * gp
            penalty = gp.detach() if penalty is None else penalty + gp.detach()
    return loss, distances, penalty


def generator_loss(
    critics: Mapping[str, nn.Module] | nn.ModuleDict, weights: Mapping[str, float], shown: Mapping[str, View]
) -> Float[Tensor, ""]:
    """-beta E[D_g(y)] - gamma E[D_f(y*m)] - delta E[D_b(y*(1-m))]: the adversarial part of a generator's loss."""
    loss = 0.0
    for name, critic in critics.items():
        loss = loss - weights[name] * score(critic, shown[name].fake, shown[name].fake_area)
    return loss
