"""SinGAN, pix2pix and CycleGAN: each learns on a tiny set, paints what it is given, and can be saved."""

import numpy as np
import pytest
import torch

from nucseg.gan import DivergenceError, base, build, translation
from nucseg.gan.cyclegan import CycleGANConfig, ImagePool
from nucseg.gan.networks import PatchDiscriminator
from nucseg.gan.pix2pix import Pix2PixConfig, UNet
from nucseg.gan.singan import SinGANConfig

SIZE = 32
CONFIGS = {
    "singan": SinGANConfig(scales=3, min_size=14, channels=6, layers=3, steps=6, d_steps=1, g_steps=2),
    "pix2pix": Pix2PixConfig(epochs=6, decay_epochs=3, channels=6, critic_channels=6, critic_layers=2),
    "cyclegan": CycleGANConfig(
        epochs=5, decay_epochs=2, channels=4, blocks=2, critic_channels=6, critic_layers=2, pool=3
    ),
}


@pytest.fixture(scope="module")
def training_set():
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:SIZE, :SIZE]

    def discs():
        labels = np.zeros((SIZE, SIZE), np.int32)
        for k in range(1, 4):
            r, c = rng.integers(4, SIZE - 4, 2)
            labels[(rows - r) ** 2 + (cols - c) ** 2 < 16] = k
        return labels

    pairs = []
    for _ in range(2):
        labels = discs()
        image = np.where((labels > 0)[..., None], (80, 50, 140), (225, 170, 195)) + rng.normal(0, 5, (SIZE, SIZE, 3))
        pairs.append((image.clip(0, 255).astype(np.uint8), labels))
    return pairs, np.stack([[discs() for _ in range(2)] for _ in range(2)])


@pytest.fixture(scope="module", params=list(CONFIGS))
def rival(request, training_set):
    return request.param, build(request.param, CONFIGS[request.param], "cpu").fit(*training_set, seed=1)


def test_each_rival_trains_and_paints_every_mask(rival, training_set):
    _, gan = rival
    images = gan.generate(training_set[1], seed=0)
    assert images.shape == (2, 2, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert all(torch.isfinite(h).all() and h.shape[-1] == len(gan.terms) for h in gan.history)


def test_the_same_seed_gives_the_same_images(rival, training_set):
    name, gan = rival
    again = build(name, CONFIGS[name], "cpu").fit(*training_set, seed=1)
    np.testing.assert_array_equal(gan.generate(training_set[1], seed=2), again.generate(training_set[1], seed=2))


@pytest.mark.parametrize("name", ["pix2pix", "singan"])
def test_training_leaves_the_global_generator_alone(name, training_set):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    build(name, CONFIGS[name], "cpu").fit(*training_set).generate(training_set[1])
    assert torch.equal(torch.rand(3), wanted)


def test_a_rivals_state_survives_safetensors(rival, training_set, tmp_path):
    from safetensors.torch import load_file, save_file

    name, gan = rival
    save_file(gan.to_tensors(), tmp_path / "state.safetensors")
    loaded = build(name, CONFIGS[name], "cpu").from_tensors(load_file(tmp_path / "state.safetensors"))
    np.testing.assert_array_equal(loaded.generate(training_set[1]), gan.generate(training_set[1]))


def test_pix2pix_learns_to_tell_nuclei_from_background(training_set):
    pairs, masks = training_set
    config = Pix2PixConfig(
        epochs=60, decay_epochs=20, channels=8, critic_channels=8, critic_layers=1, lr=1e-3, enlarge=1.0
    )
    gan = build("pix2pix", config, "cpu").fit(pairs, masks)
    l1 = gan.history[0][:, 0, gan.terms.index("l1")]
    assert l1[-10:].mean() < 0.5 * l1[:10].mean()
    images = gan.generate(masks).astype(float)
    assert images[masks > 0].mean() < images[masks == 0].mean() - 20


def test_cyclegan_learns_its_cycle(training_set):
    config = CycleGANConfig(
        epochs=30, decay_epochs=0, channels=6, blocks=1, critic_channels=6, critic_layers=1, lr=1e-3, enlarge=1.0
    )
    gan = build("cyclegan", config, "cpu").fit(*training_set)
    cycle = gan.history[0][:, 0, gan.terms.index("cycle")]
    assert cycle[-8:].mean() < 0.7 * cycle[:8].mean()


def test_singan_learns_to_rebuild_the_patch_and_paints_nuclei_darker(training_set):
    pairs, masks = training_set
    config = SinGANConfig(scales=3, min_size=14, channels=8, layers=3, steps=60, d_steps=1, g_steps=1, lr=2e-3, start=2)
    gan = build("singan", config, "cpu").fit(pairs, masks)
    reconstruction = gan.history[0][:, :, -1].mean(1)
    assert reconstruction[-5:].mean() < 0.5 * reconstruction[:5].mean()
    images = gan.generate(masks).astype(float)
    assert images[masks > 0].mean() < images[masks == 0].mean() - 20


def test_singan_ignores_masks_while_it_trains(training_set):
    pairs, masks = training_set
    one = build("singan", CONFIGS["singan"], "cpu").fit(pairs, masks)
    other = build("singan", CONFIGS["singan"], "cpu").fit(pairs, np.ascontiguousarray(masks[:, :, ::-1]))
    np.testing.assert_array_equal(one.generate(masks), other.generate(masks))


def test_singan_enters_the_pyramid_at_a_third():
    assert SinGANConfig().start_scale == 3
    assert SinGANConfig(start=5).start_scale == 5
    with pytest.raises(ValueError, match="start"):
        SinGANConfig(start=10)


def test_augmentation_keeps_size_and_a_binary_mask_in_register():
    mask = torch.ones(1, 1, 16, 16)
    mask[..., :8] = -1
    both = torch.cat([mask.repeat(1, 3, 1, 1) * 0.5, mask], 1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        out = translation.augment(both, 1.25, True, rng)
        assert out.shape == both.shape
        assert set(out[:, 3].unique().tolist()) == {-1.0, 1.0}
        assert ((out[:, 0] > 0) == (out[:, 3] > 0)).float().mean() > 0.95
    assert translation.augment(mask, 1.25, True, rng).shape == mask.shape


def test_the_pool_gives_back_old_images_and_holds_no_more_than_its_size():
    pool, rng = ImagePool(3), np.random.default_rng(0)
    given = [torch.full((1,), float(i)) for i in range(40)]
    returned = [pool.query(image, rng) for image in given]
    assert all(r is g for r, g in zip(returned[:3], given[:3], strict=True))
    assert any(r is not g for r, g in zip(returned, given, strict=True))
    assert len(pool.images) == 3
    assert ImagePool(0).query(given[0], rng) is given[0]


def test_the_published_sizes_are_the_originals():
    def count(net):
        return sum(p.numel() for p in net.parameters())

    # 54.4 M and 2.8 M parameters as printed by the original pix2pix with three input channels; ours has one for masks.
    assert count(UNet(3, 64, 8, 0.5)) == 54_413_955
    assert count(PatchDiscriminator(6, 64, 3, torch.nn.BatchNorm2d)) == 2_768_705
    field = 1
    for stride in (1, 1, 2, 2, 2):  # from the map back to the image, 4x4 kernels
        field = (field - 1) * stride + 4
    assert field == 70


def test_a_rivals_divergence_is_reported(training_set, monkeypatch):
    from nucseg.gan.pix2pix import Pix2Pix

    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(Pix2Pix, "_step", lambda self, *a: [nan, nan, nan])
    with pytest.raises(DivergenceError, match="Pix2Pix: network 0, step 0: critic is nan"):
        build("pix2pix", CONFIGS["pix2pix"], "cpu").fit(*training_set)


def test_a_pair_that_does_not_fit_is_named(training_set):
    (image, labels), second = training_set[0]
    with pytest.raises(ValueError, match=r"pairs\[1\] image"):
        base.check_pairs([(image, labels), (second[0].astype(float), second[1])])
    with pytest.raises(TypeError, match=r"pairs\[0\] labels"):
        base.check_pairs([(image, labels > 0)])
    with pytest.raises(ValueError, match="at least one"):
        base.check_pairs([])
