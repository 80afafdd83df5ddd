"""The kernels for a GPU: on one where there is one, else in Triton's interpreter (see conftest.py)."""

import math

import pytest
import torch
import torch.nn.functional as F

from nucseg import kernels, norm_act
from nucseg.gan import build, fast_conv, fast_norm, scale_training
from nucseg.gan.csingan import CSinGANConfig
from nucseg.models import decoder, hovernet
from nucseg.norm_act import NormAct, fuse
from nucseg.recording import recording

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ACTIVATIONS = {"leaky": (0.2, math.inf), "relu6": (0.0, 6.0), "none": (1.0, math.inf)}


@pytest.fixture
def everywhere(monkeypatch):
    """Let the kernels take all tensors in channels-last, also on a CPU and small ones."""

    def usable(x):
        return x.dtype != torch.float64 and x.shape[1] % 8 == 0 and x.is_contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(norm_act, "usable", usable)
    monkeypatch.setattr(decoder, "usable", usable)
    monkeypatch.setattr(fast_conv, "usable", usable)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(fast_norm, "usable", usable)
    monkeypatch.setattr(norm_act, "LARGE", 0)
    monkeypatch.setattr(scale_training, "_layout", lambda device: torch.channels_last)


@pytest.fixture
def batch_norm():
    from nucseg.kernels import batch_norm

    return batch_norm


def draw(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)
    return values.to(memory_format=torch.channels_last) if len(shape) == 4 else values


def error(ours, theirs):
    return float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm().clamp(min=1e-9))


@pytest.mark.parametrize(
    ("dtype", "channels", "activation", "tile"),
    [
        *((torch.float32, channels, name, (128, 528)) for channels in (8, 32, 88) for name in ACTIVATIONS),
        *((torch.float32, channels, "leaky", (4, 70)) for channels in (8, 48)),  # several tiles to some programs
        (torch.bfloat16, 48, "relu6", (128, 528)),
    ],
)
def test_values_and_both_derivatives_are_those_of_double_precision(
    batch_norm, monkeypatch, dtype, channels, activation, tile
):
    if not CUDA:
        monkeypatch.setattr(batch_norm, "HEIGHT", tile[0])
        monkeypatch.setattr(batch_norm, "PROGRAMS", tile[1])
    slope, cap = ACTIVATIONS[activation]
    x, g, u = (draw(3, channels, 9, 11, seed=seed).to(dtype) for seed in range(3))
    x = (2 * x + 5).contiguous(memory_format=torch.channels_last)
    weight, bias = 1 + draw(channels, seed=3), draw(channels, seed=4)
    running = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    y, norm = batch_norm.forward(x, weight, bias, slope, cap, 1e-5, (*running, 0.1))
    dx, sums = batch_norm.gradient(g, norm, slope, cap)
    second = batch_norm.second_gradient(u, g, norm, sums, slope, cap)

    exact = [value.double().requires_grad_() for value in (x, weight, bias, g)]
    means = torch.zeros(channels, device=DEVICE).double(), torch.ones(channels, device=DEVICE).double()
    z = F.batch_norm(exact[0], *means, exact[1], exact[2], True, 0.1, 1e-5)
    out = torch.where(z > 0, z.clamp(max=cap), slope * z)
    first = torch.autograd.grad(out, exact[:3], exact[3], create_graph=True)
    by = torch.autograd.grad(first[0], (exact[3], exact[0], exact[1]), u.double())
    pairs = [(y, out), *zip(running, means, strict=True), (dx, first[0]), (sums[1], first[1]), (sums[0], first[2])]
    for ours, theirs in [*pairs, *zip(second, by, strict=True)]:
        assert error(ours, theirs) < (1e-5 if ours.dtype == torch.float32 else 1e-2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    again, _ = batch_norm.forward(x, weight, bias, slope, cap, 1e-5)
    assert torch.equal(again, y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_given_statistics_stay_as_they_are(batch_norm, activation):
    slope, cap = ACTIVATIONS[activation]
    x, g = 2 * draw(3, 48, 9, 11) + 5, draw(3, 48, 9, 11, seed=1)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, mean, var = 1 + draw(48, seed=2), draw(48, seed=3), 4 + draw(48, seed=4), 1 + draw(48, seed=5) ** 2
    y, norm = batch_norm.forward_fixed(x, weight, bias, slope, cap, 1e-5, mean, var)
    dx, (db, dw) = batch_norm.gradient(g, norm, slope, cap, fixed=True)
    exact = [value.double().requires_grad_() for value in (x, weight, bias)]
    z = F.batch_norm(exact[0], mean.double(), var.double(), *exact[1:], False, 0.0, 1e-5)
    out = torch.where(z > 0, z.clamp(max=cap), slope * z)
    by = torch.autograd.grad(out, exact, g.double())
    for ours, theirs in zip((y, dx, dw, db), (out, *by), strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("widths", [(32, 32), (64, 32)])
def test_convolutions_and_both_derivatives_are_those_of_double_precision(everywhere, monkeypatch, widths):
    """By way of `fast_conv`, whose second derivatives are the same three maps; of other widths cuDNN does all."""
    from nucseg.kernels import convolution

    ran = []
    for name in ("convolve", "by_input", "by_weight"):
        work = getattr(convolution, name)
        monkeypatch.setattr(convolution, name, lambda *a, name=name, work=work: (ran.append(name), work(*a))[1])
    c, d = widths
    # More shares of pixels than programs, so that each takes several.
    monkeypatch.setattr(convolution, "PROGRAMS", convolution.PROGRAMS if CUDA else 1)
    side = 60 if CUDA else 15
    x, weight = draw(2, c, side, side - 2), draw(d, c, 3, 3, seed=1)
    assert 2 * (side - 2) * (side - 4) > convolution.PROGRAMS * convolution.SHARE
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [value.to(dtype).requires_grad_() for value in (x, weight)]
        out = fast_conv.conv2d(*inputs)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        found.append([out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    assert sorted(ran) == sorted(3 * ["convolve", "by_input", "by_weight"] if widths == (32, 32) else [])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) < (4e-3 if CUDA else 1e-5)  # Triton cuts arguments to TF32 and does not round them


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("channels", [8, 48])
def test_maps_are_enlarged_as_pytorch_does(everywhere, dtype, accuracy, channels):
    inputs = [draw(2, channels, 5, 7).to(dtype).requires_grad_() for _ in range(3)]
    expected = F.interpolate(inputs[0], scale_factor=2.0, mode="nearest")
    g = draw(2, channels, 10, 14, seed=1).to(dtype)
    expected.backward(g)
    for x, layout in zip(inputs[1:], (torch.channels_last, torch.contiguous_format), strict=True):
        got = decoder.enlarge(x)
        assert type(got.grad_fn).__name__ == "_EnlargeBackward"
        assert torch.equal(got, expected)
        assert got.is_contiguous(memory_format=torch.channels_last)
        got.backward(g.contiguous(memory_format=layout))
        assert error(x.grad, inputs[0].grad.double()) < accuracy


def test_a_mean_far_from_zero_does_not_cancel_the_variance(batch_norm):
    x = draw(2, 8, 16, 16) * 0.01 + 100
    y, norm = batch_norm.forward(
        x, torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), 1.0, math.inf, 1e-12
    )  # fmt: skip
    assert error(norm.r, 1 / x.double().var((0, 2, 3), unbiased=False).sqrt()) < 1e-3
    assert abs(float(y.std()) - 1) < 1e-2


@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Identity])
def test_the_module_trains_as_batch_norm_and_activation_do(everywhere, activation):
    x = 3 * draw(2, 16, 8, 8)
    plain = torch.nn.Sequential(torch.nn.BatchNorm2d(16), activation()).to(DEVICE)
    ours = NormAct(16, activation).to(DEVICE)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [net(value) for net, value in zip((plain, ours), inputs, strict=True)]
    assert type(outs[1].grad_fn).__name__ == "_NormActBackward"
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-3, atol=1e-4)
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value.grad, dict(plain[0].named_parameters())[name].grad, rtol=1e-3, atol=1e-3)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, plain[0].state_dict()[name])
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("activation", [torch.nn.ReLU6, torch.nn.Identity])
def test_the_module_trains_with_its_running_statistics_in_eval_mode(everywhere, activation):
    """As the encoder of a Mask R-CNN with frozen statistics does."""
    plain = torch.nn.Sequential(torch.nn.BatchNorm2d(16), activation()).to(DEVICE)
    ours = NormAct(16, activation).to(DEVICE)
    values = {"weight": 1, "bias": 0, "running_mean": 2, "running_var": 3}
    state = {name: 1 + draw(16, seed=seed).abs() for name, seed in values.items()}
    found = []
    for norm, net in ((plain[0], plain), (ours, ours)):
        norm.load_state_dict({**norm.state_dict(), **state})
        x = (3 * draw(2, 16, 8, 8)).requires_grad_()
        out = net.eval()(x)
        out.square().sum().backward()
        found.append([out, x.grad, norm.weight.grad, norm.bias.grad])
        assert torch.equal(norm.running_mean, state["running_mean"])
    assert type(found[1][0].grad_fn).__name__ == "_NormActBackward"
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), found[0][0])


@pytest.mark.parametrize("block", ["residual", "dense"])
def test_gradients_that_meet_before_a_normalisation_are_added_by_its_kernel(everywhere, monkeypatch, block):
    """In one pass, whether the other one comes from all of x, from its centre or from a slice of its channels."""
    from nucseg.kernels import batch_norm

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding flips signs before activations
    added, work = [], batch_norm.gradient
    monkeypatch.setattr(
        batch_norm, "gradient", lambda *a, **k: (added.append(k.get("beside") is not None), work(*a, **k))[1]
    )
    torch.manual_seed(0)
    net = hovernet._Residual(16, (8, 8, 32), 3, 1) if block == "residual" else hovernet._Dense(16, 3, 3)
    net = net.train().to(DEVICE, memory_format=torch.channels_last)
    state, found = net.state_dict(), []
    for dtype in (torch.float32, torch.float64):
        net = net.to(dtype)
        net.load_state_dict(state)
        net.zero_grad()
        x = draw(2, 16, 12, 11, dtype=torch.float64).to(dtype).requires_grad_()
        out = net(x)
        (out * draw(*out.shape, seed=1, dtype=torch.float64).to(dtype)).sum().backward()
        found.append([out, x.grad, *(p.grad.clone() for p in net.parameters())])
    assert sum(added) == (2 if block == "residual" else 3)
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) < (1e-3 if CUDA else 1e-5)


def test_in_a_recording_small_maps_take_the_kernels_too(everywhere, monkeypatch):
    monkeypatch.setattr(norm_act, "LARGE", 2**22)
    norm, x = NormAct(8).to(DEVICE), draw(2, 8, 4, 4).requires_grad_()
    with recording():
        assert type(norm(x).grad_fn).__name__ == "_NormActBackward"
    assert type(norm(x).grad_fn).__name__ != "_NormActBackward"


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18"])
def test_a_fused_encoder_is_the_same_network(name):
    import copy

    import timm

    net = timm.create_model(name, pretrained=False, features_only=True).train()
    fused = fuse(copy.deepcopy(net))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net(x), fused(x), strict=True))
    assert list(net.state_dict()) == list(fused.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fused.state_dict().values(), strict=True))
    assert any(isinstance(module, NormAct) for module in fused.modules()) == ("lite" in name)


def test_all_first_derivatives_may_be_differentiated(everywhere):
    """Also by way of weight and bias, which no gradient penalty asks for and the kernels do not do."""

    def second(dtype):
        x, weight, bias = (draw(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(
            [(2, 8, 5, 5), (8,), (8,)]))  # fmt: skip
        first = torch.autograd.grad(
            fast_norm.norm_relu(x, weight, bias).pow(3).sum(), (x, weight, bias), create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))

    for ours, theirs in zip(second(torch.float32), second(torch.float64), strict=True):
        assert error(ours, theirs) < 1e-4


def test_a_gan_trains_the_same_by_the_kernels(request):
    rows, cols = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
    labels = ((rows - 9) ** 2 + (cols - 10) ** 2 < 20).int().numpy()
    noise = torch.randint(0, 20, (20, 20, 3), generator=torch.Generator().manual_seed(0))
    image = (torch.from_numpy(labels)[..., None] * -120 + 220 + noise).to(torch.uint8).numpy()
    config = CSinGANConfig(
        scales=1, channels=8, layers=3, steps=2, d_steps=1, masks_per_step=1, crop=14, cuda_graph=False, tf32=False
    )
    states = []
    for ours in (False, True):
        if ours:
            request.getfixturevalue("everywhere")
        gan = build("csingan", config, DEVICE).fit([(image, labels)], labels[None, None], seed=0)
        states.append(gan.to_tensors())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert states[1][name].is_contiguous()


def test_where_triton_cannot_compile_pytorchs_kernels_do_it(batch_norm, monkeypatch):
    def no_compiler(*arguments):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(batch_norm, "forward", no_compiler)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match="PyTorch's slower ones"):
        assert not kernels.available.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.available.__wrapped__(torch.device("cuda"))
