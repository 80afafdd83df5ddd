"""The convolution of the critics: right to the second derivative, and lazy only where nobody looks."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from nucseg.gan.fast_conv import FastConv2d, conv2d, for_penalty


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=draw, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=draw, requires_grad=True)
    return x, w


def test_the_convolution_is_pytorchs(tensors):
    torch.testing.assert_close(conv2d(*tensors), F.conv2d(*tensors))


def test_its_first_and_second_derivatives_agree_with_finite_differences(tensors):
    assert gradcheck(conv2d, tensors)
    assert gradgradcheck(conv2d, tensors)


def test_a_third_derivative_agrees_with_pytorchs(tensors):
    x, w = tensors

    def third(conv):
        y = conv(x, w).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(second.square().sum(), (x, w))

    for ours, theirs in zip(third(conv2d), third(F.conv2d), strict=True):
        torch.testing.assert_close(ours, theirs)


def penalty_gradient(net, x, context):
    between = x.detach().requires_grad_()
    if context is None:
        out = net(between)
    else:
        with context():
            out = net(between)
    (gradient,) = torch.autograd.grad(out.sum(), between, create_graph=True)
    penalty = ((gradient.square().sum(1) + 1e-12).sqrt() - 1).square().mean()
    return torch.autograd.grad(penalty, list(net.parameters()))


def test_a_penalty_has_the_same_gradient_with_and_without_the_short_cuts():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        FastConv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4, track_running_stats=False),
        torch.nn.LeakyReLU(0.2), FastConv2d(4, 1, 3),
    ).double()  # fmt: skip
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4, track_running_stats=False),
        torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(4, 1, 3),
    ).double()  # fmt: skip
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    # The last bias shifts the map and cannot move its gradient: torch has no path to it and would raise.
    for module in (net, plain):
        module[3].bias = None
    wanted = penalty_gradient(plain, x, None)
    for context in (None, for_penalty):
        for ours, theirs in zip(penalty_gradient(net, x, context), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
