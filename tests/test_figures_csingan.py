"""Fig. 5 shows every scale, every critic and every step."""

import io

import numpy as np
import pytest

from nucseg.figures.csingan import figure5
from nucseg.gan import build
from nucseg.gan.csingan import CSinGANConfig


@pytest.fixture(scope="module")
def trained():
    rng = np.random.default_rng(0)
    labels = np.zeros((32, 32), np.int32)
    labels[8:18, 6:16] = 1
    image = np.where((labels > 0)[..., None], (80, 50, 140), (225, 170, 195)) + rng.normal(0, 5, (32, 32, 3))
    image = image.clip(0, 255).astype(np.uint8)
    config = CSinGANConfig(
        scales=2, min_size=20, channels=4, layers=3, steps=5, masks_per_step=1, d_steps=1, calibration_steps=1
    )
    gan = build("csingan", config, "cpu").fit([(image, labels)], labels[None, None], seed=0)
    return gan, image, labels


def draw(trained):
    gan, image, labels = trained
    history = [h[:, 0].numpy() for h in gan.history]
    return figure5(gan.views(0, image, labels), gan.critic_maps(0, image, labels), history, gan.terms)


def test_the_views_hold_what_goes_in_and_comes_out_of_every_scale(trained):
    gan, image, labels = trained
    views = gan.views(0, image, labels, seed=1)
    assert [v.mask.shape for v in views] == [(20, 20), (32, 32)]
    assert [v.output.shape for v in views] == [(20, 20, 3), (32, 32, 3)]
    np.testing.assert_array_equal(views[-1].real, image)
    np.testing.assert_array_equal(views[-1].mask, labels > 0)
    assert views[0].noise.std() == pytest.approx(1, abs=0.1)
    assert views[1].noise.std() == pytest.approx(float(gan.amplitudes[1][0]), rel=0.1)


def test_a_critics_map_is_blank_where_it_does_not_look(trained):
    gan, image, labels = trained
    maps = gan.critic_maps(0, image, labels)
    inner = labels[3:-3, 3:-3] > 0  # three unpadded layers
    assert np.isfinite(maps["global"]).all()
    np.testing.assert_array_equal(np.isfinite(maps["foreground"]), inner)
    np.testing.assert_array_equal(np.isfinite(maps["background"]), ~inner)


def test_the_figure_has_a_panel_for_every_scale_critic_and_loss(trained):
    figure = draw(trained)
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    rows = [axis.get_ylabel() for part in figure.subfigs for axis in part.axes if axis.get_ylabel().startswith("n = ")]
    assert rows == ["n = 0: 20 px", "n = 1: 32 px"]
    assert sum(title.startswith("$D_") for title in titles) == 3
    figure.savefig(io.BytesIO(), format="png", dpi=40)


def test_losses_of_another_number_of_scales_are_refused(trained):
    gan, image, labels = trained
    with pytest.raises(ValueError, match="2 scales but losses of 1"):
        figure5(gan.views(0, image, labels), {}, [gan.history[0][:, 0].numpy()], gan.terms)
