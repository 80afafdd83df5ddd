"""The mean teacher: what it says where it is sure, to views that fit each other, and what becomes of its weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nucseg.augment import AugmentConfig
from nucseg.config import ConfigError, from_mapping
from nucseg.inference import InferenceConfig
from nucseg.mean_teacher import MeanTeacher, MeanTeacherConfig
from nucseg.models import build
from nucseg.models.hover import HoverConfig, HoverSegmenter
from nucseg.models.maskrcnn import MaskRCNNConfig
from nucseg.training import TrainingConfig, train

QUIET = AugmentConfig(rot90=False, flip=False, colour_probability=0.0, blur_probability=0.0, noise_probability=0.0)


class Reader(HoverSegmenter):
    """Sees nucleus in dark pixels, surely in very dark ones, and HV in the colours; one weight to train."""

    def __init__(self):
        super().__init__(HoverConfig(), InferenceConfig())
        self.weight = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.seen, self.said = [], []

    def heads(self, images):
        self.seen.append(images.detach().clone())
        images = images * self.weight
        dark = 10 * (0.5 - images[:, :1])
        self.said.append(torch.cat((-dark, dark), dim=1))
        return self.said[-1], 4 * images[:, 1:] - 2

    def predict_instances(self, image):
        raise NotImplementedError


def pictures(count=2, size=48, seed=0):
    """Coarse random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, size // 8, size // 8, 3)).astype(np.uint8)
    return list(coarse.repeat(8, axis=1).repeat(8, axis=2))


def test_a_teacher_knows_where_it_is_sure_and_its_hv_is_its_own():
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inside, hv, known = Reader().teach(image, sure=0.9)
    nucleus = torch.sigmoid(20 * (0.5 - image[:, 0]))
    assert torch.equal(inside, nucleus >= 0.5)
    assert torch.equal(known, (nucleus >= 0.9) | (nucleus <= 0.1))
    assert 0.1 < known.float().mean() < 0.95
    expected = torch.where(inside[:, None], (4 * image[:, 1:] - 2).clamp(-1, 1), 0.0)
    torch.testing.assert_close(hv, expected)
    assert not hv.requires_grad


@pytest.mark.parametrize("moves", [None, AugmentConfig(), AugmentConfig(rotate=180.0, scale=(0.8, 1.2))])
def test_student_and_teacher_see_the_same_pixels_in_the_same_places(moves):
    config = MeanTeacherConfig(strong=QUIET, sure=0.8)
    student, teacher = Reader(), Reader()
    hook = MeanTeacher(pictures(), config, batch=3, crop=32, moves=moves, device="cpu")
    terms = hook(student, teacher, torch.Generator().manual_seed(0), torch.tensor(1.0))
    assert torch.equal(student.seen[0], teacher.seen[0])  # a strong view of no strength
    assert student.seen[0].shape == (3, 3, 32, 32)
    # A student that says what the teacher says has nothing left to learn but certainty, and HV beyond [-1, 1].
    dark = teacher.said[0].softmax(dim=1)[:, 1]
    known = (dark >= 0.8) | (dark <= 0.2)
    sure = torch.where(dark >= 0.5, dark, 1 - dark)[known]
    assert terms["unlabelled_np_ce"].item() == pytest.approx(-sure.log().mean().item(), rel=1e-3)


def test_only_the_colours_of_the_strong_view_differ():
    hook = MeanTeacher(pictures(), MeanTeacherConfig(), batch=4, crop=32, moves=AugmentConfig(), device="cpu")
    student, teacher = Reader(), Reader()
    hook(student, teacher, torch.Generator().manual_seed(0), torch.tensor(1.0))
    weak, strong = teacher.seen[0].flatten(2), student.seen[0].flatten(2)
    assert not torch.allclose(weak, strong, atol=0.02)
    for a, b in zip(weak, strong, strict=True):
        assert torch.corrcoef(torch.stack((a.mean(0), b.mean(0))))[0, 1] > 0.5  # every pixel stays in its place


def test_the_student_learns_only_where_the_teacher_is_sure_and_the_teacher_learns_nothing():
    hook = MeanTeacher(pictures(), MeanTeacherConfig(sure=0.95), batch=2, crop=32, moves=None, device="cpu")
    student, teacher = Reader(), Reader()
    terms = hook(student, teacher, torch.Generator().manual_seed(0), torch.tensor(1.0))
    student.said[0].retain_grad()
    sum(terms.values()).backward()
    known = teacher.teach(teacher.seen[0], 0.95).known
    gradient = student.said[0].grad.abs().sum(dim=1)
    assert not gradient[~known].any()
    assert gradient[known].any()
    assert teacher.weight.grad is None


@pytest.mark.parametrize(("share", "weight"), [(0.0, np.exp(-5)), (0.1, np.exp(-1.25)), (0.2, 1.0), (0.9, 1.0)])
def test_the_weight_rises_over_the_ramp(share, weight):
    hook = MeanTeacher(pictures(), MeanTeacherConfig(weight=2.0), batch=2, crop=32, moves=None, device="cpu")
    student = Reader()
    runs = [
        hook(student, Reader(), torch.Generator().manual_seed(0), torch.tensor(at))["unlabelled_np_ce"].item()
        for at in (share, 1.0)
    ]
    assert runs[0] / runs[1] == pytest.approx(weight, rel=1e-4)


def labelled():
    labels = np.kron(np.arange(1, 10).reshape(3, 3) % 2, np.ones((16, 16), dtype=np.int32)).astype(np.int32)
    image = np.where(labels[..., None] > 0, 60, 200) + np.zeros(3, dtype=int)
    return (image.astype(np.uint8), labels), pictures()


def small_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build("hoverlite", config=None, pretrained=False)


def test_what_is_returned_is_the_teacher_which_starts_as_the_model_given():
    pair, images = labelled()
    config = TrainingConfig(iterations=3, batch=2, crop=32, ema=0.7, log_every=1, validate_every=0)
    weights = []

    class Watched(MeanTeacher):
        def __call__(self, student, teacher, generator, share):
            assert not teacher.training
            assert student.training
            weights.append([m.np_head[1].weight.detach().clone() for m in (student, teacher)])
            assert share.item() == pytest.approx((len(weights) - 1) / 3)
            return super().__call__(student, teacher, generator, share)

    model = small_model()
    start = model.np_head[1].weight.detach().clone()
    hook = Watched(images, MeanTeacherConfig(), 2, 32, AugmentConfig(), "cpu")
    result = train(model, [pair], config, augment=AugmentConfig(), unlabelled=hook)
    assert torch.equal(weights[0][1], start)
    torch.testing.assert_close(weights[1][1], 0.7 * start + 0.3 * weights[1][0])
    torch.testing.assert_close(weights[2][1], 0.7 * weights[1][1] + 0.3 * weights[2][0])
    assert not torch.equal(model.np_head[1].weight, weights[2][0])
    assert {"np_ce", "unlabelled_np_ce", "unlabelled_hv_gradient"} <= set(result.curve[0])
    assert result.curve[0]["total"] == pytest.approx(
        sum(v for k, v in result.curve[0].items() if k not in ("iteration", "lr", "total")), rel=1e-5
    )


def test_a_resumed_training_with_a_teacher_ends_where_an_unbroken_one_does(tmp_path):
    pair, images = labelled()
    config = TrainingConfig(iterations=4, batch=2, crop=32, ema=0.7, log_every=1, validate_every=2)
    hook = MeanTeacher(images, MeanTeacherConfig(), 2, 32, AugmentConfig(), "cpu")
    states, models = [], [small_model(), small_model(5)]
    train(
        models[0],
        [pair],
        config,
        seed=3,
        augment=AugmentConfig(),
        unlabelled=hook,
        checkpoint=lambda s: states.append(s()),
    )
    torch.save(states[1], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    train(models[1], [pair], config, seed=3, augment=AugmentConfig(), unlabelled=hook, resume_from=state)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_a_teacher_needs_an_average_and_targets_per_pixel():
    pair, images = labelled()
    hook = MeanTeacher(images, MeanTeacherConfig(), 2, 32, None, "cpu")
    with pytest.raises(ValueError, match="ema: a teacher is the average"):
        train(small_model(), [pair], TrainingConfig(iterations=1, batch=2, crop=32), unlabelled=hook)
    mask = build("maskrcnn", "efficientnet_lite0", MaskRCNNConfig(fpn_channels=16, box_widths=(8,)), pretrained=False)
    with pytest.raises(TypeError, match=r'MaskRCNN cannot learn from.*unsure: "ignore"'):
        hook(mask, mask, torch.Generator(), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("values", "name"),
    [({"decay": 1.0}, "decay"), ({"sure": 0.4}, "sure"), ({"ramp": 2.0}, "ramp"), ({"strong": {"hues": 1.0}}, "hue")],
)
def test_a_setting_out_of_range_is_refused_by_name(values, name):
    with pytest.raises(ConfigError, match=name):
        from_mapping(MeanTeacherConfig, values, "profile")


def test_moves_asked_of_the_strong_view_are_left_out():
    config = replace(MeanTeacherConfig(), strong=AugmentConfig(rotate=90.0))
    assert not MeanTeacher(pictures(), config, 2, 32, None, "cpu").strong.resamples
