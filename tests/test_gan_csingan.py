"""CSinGAN: every critic teaches the generator, training is reproducible and resumable, nuclei come out as nuclei."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nucseg.gan import REGISTRY, DivergenceError, DivergenceWarning, build, config_class, losses, scale_training, scales
from nucseg.gan.csingan import CSinGANConfig
from nucseg.gan.networks import Critic, ScaleGenerator, initialise

SIZE = 40
TINY = CSinGANConfig(scales=2, min_size=24, channels=8, layers=3, steps=4, masks_per_step=2, d_steps=1,
                     calibration_steps=2)  # fmt: skip


def discs(count, size, seed):
    """Label maps with a few discs each."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:size, :size]
    maps = np.zeros((count, size, size), np.int32)
    for labels in maps:
        for k in range(1, 6):
            r, c = rng.integers(4, size - 4, 2)
            labels[(rows - r) ** 2 + (cols - c) ** 2 < rng.integers(9, 30)] = k
    return maps


def patch(labels, seed, nucleus=(80, 50, 140), tissue=(225, 170, 195)):
    """Paint a label map: dark bluish nuclei on pink, with some texture."""
    rng = np.random.default_rng(seed)
    image = np.where((labels > 0)[..., None], nucleus, tissue) + rng.normal(0, 8, (*labels.shape, 3))
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def training_set():
    labels = discs(2, SIZE, 0)
    pairs = [(patch(labels[0], 0), labels[0]), (patch(labels[1], 1, (120, 90, 160), (240, 200, 215)), labels[1])]
    return pairs, np.stack([discs(3, SIZE, 1), discs(3, SIZE, 2)])


@pytest.fixture(scope="module")
def tiny(training_set):
    return build("csingan", TINY, "cpu").fit(*training_set, seed=3)


@pytest.fixture
def step_parts():
    """Networks, one batch and its masks, for the losses alone."""
    draw = torch.Generator().manual_seed(0)
    generator = ScaleGenerator(4, 6, 3)
    critics = torch.nn.ModuleDict({name: Critic(6, 3) for name in losses.REGIONS})
    for net in (generator, critics):
        initialise(net, draw)
    masks = torch.from_numpy(discs(3, 24, 5) > 0).float().unsqueeze(1)
    noise = torch.randn(2, 3, 24, 24, generator=draw)
    return generator, critics, masks[:2], masks[2:], noise, draw


def generator_gradient(weights, parts):
    generator, critics, masks, _, noise, _ = parts
    fake = scales.paint(generator, masks, noise, None)
    shown = losses.views(weights, fake[:1], masks[:1], fake, masks, 3)
    loss = losses.generator_loss({k: critics[k] for k in weights}, weights, shown)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(generator.parameters()))])


# --- the losses of Eq. 3 and 4


@pytest.mark.parametrize("alone", losses.REGIONS)
def test_each_critic_alone_moves_the_generator(alone, step_parts):
    weights = {name: float(name == alone) for name in losses.REGIONS}
    gradient = generator_gradient(weights, step_parts)
    assert torch.isfinite(gradient).all()
    assert gradient.norm() > 1e-6


@pytest.mark.parametrize("alone", ["foreground", "background"])
def test_a_component_critic_moves_only_its_own_component(alone, step_parts):
    _, critics, masks, _, noise, _ = step_parts
    fake = noise.clone().requires_grad_()
    shown = losses.views([alone], fake[:1], masks[:1], fake, masks, 3)
    loss = losses.generator_loss({alone: critics[alone]}, {alone: 1.0}, shown)
    (gradient,) = torch.autograd.grad(loss, fake)
    area = (masks if alone == "foreground" else 1 - masks).expand_as(gradient) > 0
    assert gradient[~area].abs().max() == 0
    assert gradient[area].abs().max() > 0


def test_with_beta_alone_changing_the_component_critics_changes_nothing(step_parts):
    before = generator_gradient({"global": 1.0}, step_parts)
    weighted = generator_gradient({"global": 1.0, "foreground": 0.0, "background": 0.0}, step_parts)
    for name in ("foreground", "background"):
        initialise(step_parts[1][name], torch.Generator().manual_seed(99))
    after = generator_gradient({"global": 1.0, "foreground": 0.0, "background": 0.0}, step_parts)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    torch.testing.assert_close(before, weighted, rtol=0, atol=0)


def test_changing_a_weighted_component_critic_does_change_the_generators_gradient(step_parts):
    weights = {"global": 1.0, "foreground": 1.0}
    before = generator_gradient(weights, step_parts)
    initialise(step_parts[1]["foreground"], torch.Generator().manual_seed(99))
    assert not torch.allclose(before, generator_gradient(weights, step_parts))


def test_the_critic_map_is_averaged_over_the_centre_cropped_mask():
    class Blur(torch.nn.Module):  # an unpadded 5x5 mean of the first channel, by a loop
        def forward(self, images):
            rows = [[images[:, :1, r : r + 5, c : c + 5].mean((2, 3)) for c in range(6)] for r in range(6)]
            return torch.stack([torch.stack(row, -1) for row in rows], -2)

    images, area = torch.rand(2, 3, 10, 10), (torch.rand(2, 1, 10, 10) > 0.5).float()
    total, count = 0.0, 0
    for b in range(2):
        for r in range(2, 8):
            for c in range(2, 8):
                if area[b, 0, r, c]:
                    total, count = total + images[b, 0, r - 2 : r + 3, c - 2 : c + 3].mean(), count + 1
    shown = losses.views(["foreground"], images[:1], area[:1], images, area, 2)["foreground"]
    torch.testing.assert_close(losses.score(Blur(), images, shown.fake_area), total / count)


def test_the_penalty_of_a_linear_critic_is_known(step_parts):
    # D(x) = 0.3 R + 0.4 G summed over positions: the gradient's norm over channels is 0.5 at every pixel.
    class Linear(torch.nn.Module):
        def forward(self, images):
            return 0.3 * images[:, :1] + 0.4 * images[:, 1:2]

    real, fake, mix = torch.rand(1, 3, 5, 5), torch.rand(2, 3, 5, 5), torch.rand(2, 1, 1, 1)
    penalty = losses.gradient_penalty(Linear(), real, fake, mix)
    torch.testing.assert_close(penalty, torch.tensor(0.25))


def test_a_batch_without_nuclei_leaves_losses_finite_and_the_nuclei_critic_silent(step_parts):
    _, critics, masks, real_mask, noise, _ = step_parts
    fake, real, empty = noise, noise[:1] * 0.5, torch.zeros_like(masks)
    weights = dict.fromkeys(losses.REGIONS, 1.0)
    shown = losses.views(weights, real, real_mask, fake, empty, 3, min_area=0.01)
    loss, distances, penalty = losses.critic_losses(critics, weights, shown, 0.1, torch.full((2, 1, 1, 1), 0.5))
    assert distances["foreground"] == 0
    assert losses.generator_loss({"foreground": critics["foreground"]}, {"foreground": 1.0}, shown) == 0
    assert penalty < 1e3
    gradients = torch.autograd.grad(loss, list(critics.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)


# --- the pyramid


def test_the_scales_of_a_256_px_patch_are_the_papers():
    assert CSinGANConfig().sizes(256) == (128, 153, 182, 216, 256)
    assert [CSinGANConfig().width(n) for n in range(5)] == [32, 32, 32, 32, 64]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_windows_hold_a_nucleus_each_where_they_are_put_on_nuclei(share):
    size, crop = 64, 16
    labels = np.zeros((3, size, size), np.int32)
    for i, (r, c) in enumerate([(3, 5), (40, 58), (20, 30)]):  # one small nucleus each, two of them at the rim
        labels[i, r : r + 4, c : c + 4] = 1
    images = np.zeros((1, size, size, 3), np.uint8)
    device = torch.device("cpu")
    data = scale_training.TrainingData(images, labels[:1], labels[None, 1:], (size,), device)
    config = dataclasses.replace(TINY, crop=crop, crop_on_nuclei=share, masks_per_step=2)
    buffers = scale_training.StepBuffers(data, 0, config, 4, device)
    draw, held = torch.Generator().manual_seed(0), []
    for _ in range(40):
        buffers.refill(draw)
        assert buffers.corner.min() >= 0
        assert buffers.corner.max() <= size - crop
        masks = [*labels[1:][buffers.index[0].numpy()], labels[0]]
        for mask, (r, c) in zip(masks, buffers.corner[0].tolist(), strict=True):
            held.append(mask[r : r + crop, c : c + crop].any())
    assert np.mean(held) == 1 if share else np.mean(held) < 0.3


def test_the_real_window_is_cut_where_its_reconstruction_is(training_set):
    pairs, masks = training_set
    config = dataclasses.replace(TINY, crop=16, crop_on_nuclei=1.0)
    images, labels = (np.stack(each) for each in zip(*pairs, strict=True))
    device, sizes = torch.device("cpu"), (SIZE,)
    data = scale_training.TrainingData(images, labels, masks, sizes, device)
    buffers = scale_training.StepBuffers(data, 0, config, 4, device)
    buffers.refill(torch.Generator().manual_seed(1))
    below = scale_training.Below(torch.tensor(1.0), torch.zeros(1, 3, SIZE, SIZE), None, lambda masks, noise: noise[0])
    generator, critics = ScaleGenerator(4, 4, 3), torch.nn.ModuleDict()
    critics["global"] = Critic(4, 3)
    training = scale_training.ScaleTraining(
        config, {"global": 1.0}, 0, 1, data, buffers, below, generator, critics, 1e-3, True
    )
    inputs, _, synthetic = training._batch()
    inner = slice(config.layers, -config.layers)
    torch.testing.assert_close(inputs[-1:, :1, inner, inner], training._cut(training.real_mask, first=-1))
    torch.testing.assert_close(inputs[:-1, :1, inner, inner], synthetic)


def test_the_reconstruction_is_trained_from_noise_only_where_that_is_wanted(training_set, monkeypatch):
    batches = {}
    original = scale_training.ScaleTraining._batch

    def watched(self):
        inputs, previous, mask = original(self)
        batches.setdefault((self.config.reconstruction_noise, self.n), []).append((inputs[-1], previous[-1]))
        return inputs, previous, mask

    monkeypatch.setattr(scale_training.ScaleTraining, "_batch", watched)
    for share in (0.0, 1.0):
        config = dataclasses.replace(TINY, reconstruction_noise=share)
        build("csingan", config, "cpu").fit([training_set[0][0]], training_set[1][:1], seed=0)
    for (share, n), seen in batches.items():
        for first, second in zip(seen[0], seen[1], strict=True):
            same = torch.equal(first, second)
            assert same if not share or (n == 0 and not first.any()) else not same


def test_masks_stay_binary_at_every_scale():
    mask = torch.from_numpy(discs(1, 64, 0) > 0).float().unsqueeze(1)
    for small in scales.mask_pyramid(mask, (24, 37, 64)):
        assert set(small.unique().tolist()) == {0.0, 1.0}


def test_a_window_of_the_output_is_the_output_of_the_window():
    generator = ScaleGenerator(4, 6, 3).eval()
    inputs, corner = torch.randn(2, 4, 20, 20), torch.tensor([3, 7])
    padded = generator.pad(inputs)
    whole = scales.window(generator(padded), corner, 9)
    part = generator(scales.window(padded, corner, 9 + 2 * generator.layers))
    assert part.shape[-1] == 9
    torch.testing.assert_close(part, whole)


# --- training


def test_images_have_the_masks_shape_and_losses_are_recorded_for_every_step(tiny, training_set):
    images = tiny.generate(training_set[1], seed=0)
    assert images.shape == (2, 3, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert [h.shape for h in tiny.history] == [(4, 2, len(tiny.terms))] * 2


def test_the_same_seed_gives_the_same_images_and_another_seed_does_not(tiny, training_set):
    again = build("csingan", TINY, "cpu").fit(*training_set, seed=3)
    images = tiny.generate(training_set[1], seed=5)
    np.testing.assert_array_equal(images, again.generate(training_set[1], seed=5))
    assert (images != tiny.generate(training_set[1], seed=6)).any()
    other = build("csingan", TINY, "cpu").fit(*training_set, seed=4)
    assert (images != other.generate(training_set[1], seed=5)).any()


def test_two_threads_train_the_same_gans_as_one(tiny, training_set):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        parallel = build("csingan", TINY, "cpu").fit(*training_set, seed=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for name, value in tiny.to_tensors().items():
        torch.testing.assert_close(parallel.to_tensors()[name], value, rtol=1e-3, atol=1e-4)


def test_patches_do_not_influence_each_other(tiny, training_set):
    pairs, masks = training_set
    changed = [pairs[0], (255 - pairs[1][0], pairs[1][1])]
    other = build("csingan", TINY, "cpu").fit(changed, masks, seed=3)
    np.testing.assert_array_equal(other.generate(masks)[0], tiny.generate(masks)[0])
    assert (other.generate(masks)[1] != tiny.generate(masks)[1]).any()


def test_a_resumed_training_ends_as_an_uninterrupted_one(tiny, training_set):
    saved = []
    build("csingan", TINY, "cpu").fit(*training_set, seed=3, checkpoint=saved.append)
    assert len(saved) == TINY.scales
    resumed = build("csingan", TINY, "cpu").from_tensors(saved[0]).fit(*training_set, seed=3)
    wanted = tiny.to_tensors()
    assert resumed.to_tensors().keys() == wanted.keys()
    for name, value in resumed.to_tensors().items():
        assert torch.equal(value, wanted[name]), name


def test_a_state_survives_safetensors(tiny, training_set, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file(tiny.to_tensors(), tmp_path / "gan.safetensors")
    loaded = build("csingan", TINY, "cpu").from_tensors(load_file(tmp_path / "gan.safetensors"))
    np.testing.assert_array_equal(loaded.generate(training_set[1]), tiny.generate(training_set[1]))


def test_resuming_with_another_seed_is_refused(tiny, training_set):
    loaded = build("csingan", TINY, "cpu").from_tensors(tiny.to_tensors())
    with pytest.raises(ValueError, match="seed 3"):
        loaded.fit(*training_set, seed=4)


def poison(monkeypatch, when):
    """Make a weight of one GAN NaN after its step, wherever `when(training, step)` says so."""
    original = scale_training.ScaleTraining.step

    def poisoned(self):
        original(self)
        self.steps = getattr(self, "steps", 0) + 1
        if when(self, self.steps - 1):
            with torch.no_grad():
                next(self.generator.parameters())[0] = float("nan")

    monkeypatch.setattr(scale_training.ScaleTraining, "step", poisoned)


def rate(training):
    return training.optimizer_g.param_groups[0]["lr"]


def test_one_gan_that_diverges_is_named_and_starts_again_while_the_others_go_on(tiny, training_set, monkeypatch):
    poison(monkeypatch, lambda t, step: t.n == 1 and t.i == 1 and step == 1 and rate(t) == TINY.lr)
    with pytest.warns(DivergenceWarning, match=r"CSinGAN: patch 1, scale 1, step 2: .* is nan; .*trained again"):
        gan = build("csingan", TINY, "cpu").fit(*training_set, seed=3)
    (divergence,) = gan.divergences
    assert (divergence.patch, divergence.scale, divergence.step, divergence.outcome) == (1, 1, 2, "restarted")
    assert gan.left_out == ()
    images, undisturbed = gan.generate(training_set[1]), tiny.generate(training_set[1])
    np.testing.assert_array_equal(images[0], undisturbed[0])
    assert images[1].std() > 5
    assert (images[1] != undisturbed[1]).any()
    assert all(torch.isfinite(t).all() for name, t in gan.to_tensors().items() if name != "divergences")


def test_the_second_attempt_starts_from_the_scales_start_with_a_lower_rate(training_set, monkeypatch):
    rates = []
    poison(monkeypatch, lambda t, step: step == 0 and t.i == 0 and rates.append(rate(t)) is None and len(rates) == 1)
    with pytest.warns(DivergenceWarning, match="patch 0, scale 0"):
        build("csingan", TINY, "cpu").fit(*training_set, seed=3)
    assert rates == pytest.approx([TINY.lr, TINY.lr * TINY.restart_lr, TINY.lr])


def test_a_gan_that_diverges_twice_falls_back_to_its_last_finished_scale(tiny, training_set, monkeypatch):
    poison(monkeypatch, lambda t, step: t.n == 1 and t.i == 1)
    again = pytest.warns(DivergenceWarning, match="trained again")
    with again, pytest.warns(DivergenceWarning, match="only enlarges the image of the scale before"):
        gan = build("csingan", TINY, "cpu").fit(*training_set, seed=3)
    assert [d.outcome for d in gan.divergences] == ["restarted", "skipped"]
    mask = torch.from_numpy(training_set[1][1, :1] > 0).float().unsqueeze(1)
    coarse, fine = gan.sample(1, mask, torch.Generator().manual_seed(0))
    torch.testing.assert_close(fine, scales.upsample(coarse, SIZE))
    np.testing.assert_array_equal(gan.generate(training_set[1])[0], tiny.generate(training_set[1])[0])


def test_a_gan_that_diverges_twice_at_the_coarsest_scale_is_left_out_and_remembered(training_set, monkeypatch):
    poison(monkeypatch, lambda t, step: t.n == 0 and t.i == 1)
    again = pytest.warns(DivergenceWarning, match="trained again")
    with again, pytest.warns(DivergenceWarning, match="patch 1, scale 0.*gets no synthetic images"):
        gan = build("csingan", TINY, "cpu").fit(*training_set, seed=3)
    assert gan.left_out == (1,)
    images = gan.generate(training_set[1])
    assert images[1].max() == 0
    assert images[0].std() > 5
    loaded = build("csingan", TINY, "cpu").from_tensors(gan.to_tensors())
    assert [str(d) for d in loaded.divergences] == [str(d) for d in gan.divergences]
    assert loaded.left_out == (1,)


def test_when_every_gan_diverges_nothing_is_returned(training_set, monkeypatch):
    poison(monkeypatch, lambda t, step: True)
    with (
        pytest.warns(DivergenceWarning),
        pytest.raises(DivergenceError, match="every training diverged: patch 1, scal"),
    ):
        build("csingan", TINY, "cpu").fit(*training_set, seed=3)


def test_weights_that_the_last_update_spoilt_are_noticed(training_set, monkeypatch):
    poison(monkeypatch, lambda t, step: t.n == 0 and t.i == 0 and step == TINY.steps - 1 and rate(t) > TINY.lr * 0.09)
    with pytest.warns(DivergenceWarning, match="patch 0, scale 0, step 3: weights is nan"):
        build("csingan", TINY, "cpu").fit(*training_set, seed=3)


class Operators(TorchDispatchMode):
    """Notes the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("crop", [None, 16])
def test_a_step_asks_the_device_for_nothing(training_set, monkeypatch, crop):
    original, names = scale_training.ScaleTraining.step, []

    def watched(self):
        with Operators() as operators:
            original(self)
        names.extend(operators.names)

    monkeypatch.setattr(scale_training.ScaleTraining, "step", watched)
    build("csingan", dataclasses.replace(TINY, crop=crop), "cpu").fit(*training_set)
    assert "aten::native_batch_norm_backward" in names  # it did watch
    waiting = ("item", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_to_cpu")
    assert not [name for name in names if name.removeprefix("aten::").split(".")[0] in waiting]


def test_a_penalty_at_every_second_update_weighs_as_much(training_set, monkeypatch):
    seen, original = [], scale_training.critic_losses

    def watched(critics, weights, shown, lambda_, mix):
        seen.append(0.0 if mix is None else lambda_)
        return original(critics, weights, shown, lambda_, mix)

    monkeypatch.setattr(scale_training, "critic_losses", watched)
    config = dataclasses.replace(TINY, scales=1, min_size=None, steps=1, d_steps=4, penalty_every=2)
    build("csingan", config, "cpu").fit(*training_set)
    assert seen[:4] == pytest.approx([0.2, 0.0, 0.2, 0.0])


def test_progress_ends_at_its_total(training_set):
    calls = []
    build("csingan", TINY, "cpu").fit(*training_set, progress=lambda done, total, text: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (8, 8)


def test_learned_nuclei_are_darker_and_bluer_and_the_real_pair_is_reconstructed(training_set):
    pairs, masks = training_set
    config = CSinGANConfig(scales=2, min_size=24, channels=8, layers=3, steps=70, masks_per_step=1, d_steps=1,
                           lr=2e-3)  # fmt: skip
    gan = build("csingan", config, "cpu").fit(pairs, masks, seed=0)
    images = gan.generate(masks, seed=0).astype(float)
    for i, (real, labels) in enumerate(pairs):
        inside, outside = images[i][masks[i] > 0].mean(0), images[i][masks[i] == 0].mean(0)
        assert inside.mean() < outside.mean() - 40
        blueness = inside[2] / inside.sum() - outside[2] / outside.sum()
        assert blueness > 0.03
        # close to the real patch's own colours
        assert np.abs(inside - real[labels > 0].mean(0)).max() < 40
        assert np.abs(outside - real[labels == 0].mean(0)).max() < 40
        first, last = gan.history[0][:5, i, -1].mean(), gan.history[-1][-5:, i, -1].mean()
        assert last < 0.25 * first
        mask = torch.from_numpy(labels > 0).float()[None, None]
        rebuilt = gan.reconstruct(i, mask)[-1]
        error = (rebuilt - torch.from_numpy(real).movedim(-1, 0) / 127.5 + 1).square().mean()
        assert error < 0.05


def test_without_the_component_critics_none_is_built(training_set):
    gan = build("csingan-no-cwd", TINY, "cpu")
    assert gan.weights() == {"global": 1.0}
    gan.fit(*training_set)
    assert not any("foreground" in key for key in gan.to_tensors())


# --- errors


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'csingan'"):
        build("csigan")


def test_building_one_synthesiser_imports_no_other():
    import subprocess
    import sys

    code = "import sys, nucseg.gan as g; g.build('csingan', device='cpu'); print('nucseg.gan.pix2pix' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 0.0}, "lr must be positive"), ({"min_size": 8}, "min_size"), ({"beta": -1.0}, "beta"),
     ({"beta": 0.0, "gamma": 0.0, "delta": 0.0}, "no critic"), ({"steps": 0}, "steps")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        CSinGANConfig(**change)


def test_masks_of_another_size_are_refused(training_set):
    pairs, masks = training_set
    with pytest.raises(ValueError, match=r"masks: expected \(2, count, 40, 40\)"):
        build("csingan", TINY, "cpu").fit(pairs, masks[:, :, :30, :30])


def test_generating_before_training_says_so(training_set):
    with pytest.raises(RuntimeError, match="call fit first"):
        build("csingan", TINY, "cpu").generate(training_set[1])


def test_the_registry_names_every_row_of_table_ii():
    assert set(REGISTRY) >= {"csingan", "csingan-no-cwd", "singan", "pix2pix", "cyclegan"}
    assert config_class("csingan") is CSinGANConfig
