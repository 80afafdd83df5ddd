"""What critics and generators of CSinGAN minimise (Sec. III-B, Eq. 3 and 4); deviations are listed in `pyramid.py`."""

from __future__ import annotations

from collections.abc import Mapping

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


def score(
    critic: nn.Module, images: Float[Tensor, "b 3 h w"], area: Float[Tensor, "b 1 h w"] | None
) -> Float[Tensor, ""]:
    """E[D(images)]: the critic's map averaged over the area (0 where the area is empty)."""
    out = critic(images)
    if area is None:
        return out.mean()
    area = centre_crop(area, out.shape[-2], out.shape[-1])
    return (out * area).sum() / area.sum().clamp(min=1)


def gradient_penalty(
    critic: nn.Module,
    real: Float[Tensor, "1 3 h w"],
    fake: Float[Tensor, "b 3 h w"],
    mix: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, ""]:
    """E[(|grad D(x^)|_2 - 1)^2] at x^ = mix x + (1 - mix) y, the norm per pixel over channels (REFERENCE A24)."""
    between = (fake + mix * (real - fake)).detach().requires_grad_()
    with for_penalty():
        out = critic(between)
    (gradient,) = torch.autograd.grad(out.sum(), between, create_graph=True)
    # The root's derivative at 0 is infinite; 1e-12 keeps it finite and is far below any gradient met.
    return ((gradient.square().sum(1).add(1e-12).sqrt() - 1) ** 2).mean()


def critic_losses(
    critics: Mapping[str, nn.Module] | nn.ModuleDict,
    weights: Mapping[str, float],
    real: Float[Tensor, "1 3 h w"],
    real_mask: Float[Tensor, "1 1 h w"] | None,
    fake: Float[Tensor, "b 3 h w"],
    fake_mask: Float[Tensor, "b 1 h w"] | None,
    mix: Float[Tensor, "b 1 1 1"],
    lambda_: float,
    masked_average: bool = True,
    min_area: float = 0.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]], Float[Tensor, ""]]:
    """L_ADV of Eq. 3, as the critics minimise it.

    Where real or fake masks leave a critic less than `min_area` of its images, it would see a constant: BatchNorm then
    divides by nothing and the penalty explodes. For that batch the critic takes the penalty on the unmasked images and
    makes no comparison.

    Returns
    -------
    loss
        The weighted sum.
    distances
        E[D(x)] - E[D(y)] of each critic, detached: its estimate of how far apart real and fake are.
    penalty
        Sum of the gradient penalties, detached.
    """
    fake = fake.detach()
    loss, penalty, distances = 0.0, 0.0, {}
    for name, critic in critics.items():
        x, y, enough = real, fake, 1.0
        x_area, y_area = area_of(real_mask, name), area_of(fake_mask, name)
        if x_area is not None:
            enough = (torch.minimum(x_area.mean(), y_area.mean()) >= min_area).float()
            x_area, y_area = torch.maximum(x_area, 1 - enough), torch.maximum(y_area, 1 - enough)
            x, y = x * x_area, y * y_area
        if not masked_average:
            x_area = y_area = None
        distance = enough * (score(critic, x, x_area) - score(critic, y, y_area))
        gp = gradient_penalty(critic, x, y, mix)
        loss = loss + weights[name] * (lambda_ * gp - distance)
        distances[name] = distance.detach()
        penalty = penalty + gp.detach()
    return loss, distances, penalty


def generator_loss(
    critics: Mapping[str, nn.Module] | nn.ModuleDict,
    weights: Mapping[str, float],
    fake: Float[Tensor, "b 3 h w"],
    fake_mask: Float[Tensor, "b 1 h w"] | None,
    masked_average: bool = True,
    min_area: float = 0.0,
) -> Float[Tensor, ""]:
    """-beta E[D_g(y)] - gamma E[D_f(y*m)] - delta E[D_b(y*(1-m))]: the adversarial part of a generator's loss."""
    loss = fake.new_zeros(())
    for name, critic in critics.items():
        area = area_of(fake_mask, name)
        if area is None:
            loss = loss - weights[name] * score(critic, fake, None)
        else:
            enough = (area.mean() >= min_area).float()
            loss = loss - weights[name] * enough * score(critic, fake * area, area if masked_average else None)
    return loss
