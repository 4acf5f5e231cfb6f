"""The short form of sgd_stability.py: features of trained scale, SGD, no norm in the pyramid."""

from statistics import mean

import pytest
import torch
from sgd_stability import stand_in, train
from small_detectors import KINDS

from tar.data.datasets import load_dataset
from tar.detectors.build import build_detector
from tar.method.step import DistillationStep
from tar.training.flags import build_of, distillation_settings, parse

FLAGS = """
    --recipe voc --student r10 --teacher r18 --size 64 64 --fpn-channels 128 --head-channels 64 --rois 32
    --rpn-top-n 100 50
    """
PAPERS_FORM = "--backbone-norm", "cells", "--weight-backbone", "0.1", "--clip-grad", "0"
STEPS, WARMUP = 10, 4


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder of stand-ins for ImageNet's weights, whose features are three times as large."""
    source, folder = load_dataset("shapes", limit_train=40)[0], tmp_path_factory.mktemp("stand-ins")
    images = torch.stack([source.load(0, i)[0] for i in range(8)]).float() / 255
    for name in ("r10", "r18"):
        torch.save(stand_in(name, images, 3.0), folder / f"{name}.pth")
    return folder


def run(stand_ins, detector, *more):
    """The curve of a few steps with a learning rate of 0.02 from the fourth on; the teacher is not trained."""
    source, models = load_dataset("shapes", limit_train=40)[0], []
    source.wide = None
    args = parse([*FLAGS.split(), "--detector", detector, "--backbone-weights", str(stand_ins), *more])
    for name in ("r10", "r18"):
        torch.manual_seed(0)
        model = build_detector(**build_of(args, name, len(source.classes)))
        models.append(model.to(memory_format=torch.channels_last))
    student, teacher = models[0], models[1].eval().requires_grad_(False)
    step = DistillationStep(student, distillation_settings(args), args.fpn_channels)
    return train(step, teacher, args, source, 0.02, 0, STEPS, WARMUP)


@pytest.mark.parametrize("detector", KINDS)
def test_the_papers_recipe_trains_on_features_of_trained_scale(stand_ins, detector):
    curve = run(stand_ins, detector)
    assert len(curve["bad"]) == STEPS and not any(curve["bad"])
    first, last = curve["distill_backbone"][0], curve["distill_backbone"][-5:]
    assert 0.3 < first < 1.5  # a share of the teacher's energy, whatever its size
    assert mean(last) < first
    assert sum(run(stand_ins, detector, *PAPERS_FORM)["bad"]) >= 3  # so this test can fail
