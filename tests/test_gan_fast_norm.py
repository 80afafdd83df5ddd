"""The critics' normalisation and activation in one: right to the second derivative, and cheaper than PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from nucseg.gan.fast_norm import NormReLU, norm_relu


def plain(x, weight, bias):
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True), 0.2)


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=draw) * 2 + 1
    weight = torch.randn(3, dtype=torch.float64, generator=draw)
    bias = torch.randn(3, dtype=torch.float64, generator=draw)
    return tuple(t.requires_grad_() for t in (x, weight, bias))


def test_it_is_batch_norm_and_leaky_relu(tensors):
    torch.testing.assert_close(norm_relu(*tensors), plain(*tensors))


def test_its_first_and_second_derivatives_agree_with_finite_differences(tensors):
    assert gradcheck(norm_relu, tensors)
    assert gradgradcheck(norm_relu, tensors)


@pytest.mark.parametrize("wanted", ["x", "x weight", "weight bias"])
def test_a_second_derivative_agrees_with_pytorchs_whichever_first_derivatives_it_starts_from(tensors, wanted):
    named = dict(zip(("x", "weight", "bias"), tensors, strict=True))

    def second(function):
        out = function(*tensors).pow(3).sum()
        first = torch.autograd.grad(out, [named[name] for name in wanted.split()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for ours, theirs in zip(second(norm_relu), second(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_third_derivative_is_refused_and_not_wrong(tensors):
    x = tensors[0]
    (first,) = torch.autograd.grad(norm_relu(*tensors).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivative"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


class Count(TorchDispatchMode):
    """Counts the operators that compute something."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.name() not in ("aten::view", "aten::expand", "aten::detach", "aten::alias")
        return function(*args, **(kwargs or {}))


def test_a_penalty_takes_less_than_half_of_pytorchs_operators(tensors):
    def operators(function):
        with Count() as count:
            (gradient,) = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors[0], create_graph=True)
            torch.autograd.grad(gradient.square().sum(), tensors[1:])
        return count.calls

    assert operators(norm_relu) < 0.5 * operators(plain)


def test_the_module_starts_as_batch_norm_does():
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(4, track_running_stats=False), torch.nn.LeakyReLU(0.2))
    torch.testing.assert_close(NormReLU(4)(x), net(x))


@pytest.mark.gpu
def test_a_cuda_device_gives_the_same_derivatives(tensors):
    def second(device):
        here = tuple(t.detach().to(device).requires_grad_() for t in tensors)
        (first,) = torch.autograd.grad(norm_relu(*here).pow(3).sum(), here[0], create_graph=True)
        return [g.cpu() for g in torch.autograd.grad(first.square().sum(), here)]

    for ours, theirs in zip(second("cuda"), second("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs)
