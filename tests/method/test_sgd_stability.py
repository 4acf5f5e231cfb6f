"""The short form of sgd_stability.py: features of trained scale, SGD, no norm in the pyramid."""

from statistics import mean

import pytest
import torch
from sgd_stability import stand_in, train

from tar.data.datasets import load_dataset
from tar.detectors.build import build_detector
from tar.method.step import DistillationStep
from tar.training.flags import build_of, distillation_settings, parse

FLAGS = "--recipe voc --student r10 --teacher r18 --size 96 96 --rois 64 --head-channels 256 --rpn-top-n 200 100"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of stand-ins for ImageNet's weights, their features three times as large."""
    source, folder = load_dataset("shapes")[0], tmp_path_factory.mktemp("stand-ins")
    images = torch.stack([source.load(0, i)[0] for i in range(16)]).float() / 255
    for name in ("r10", "r18"):
        torch.save(stand_in(name, images, 3.0), folder / f"{name}.pth")
    return folder


def run(weights, detector, *more):
    """20 steps with a learning rate of 0.02 from the tenth on; the teacher is not trained."""
    args = parse([*FLAGS.split(), "--detector", detector, *more])
    source = load_dataset("shapes", limit_train=40)[0]
    source.wide = None
    models = []
    for name in ("r10", "r18"):
        torch.manual_seed(0)
        args.backbone_weights = str(weights / f"{name}.pth")
        models.append(build_detector(**build_of(args, name, len(source.classes))).to(memory_format=torch.channels_last))
    student, teacher = models[0], models[1].eval().requires_grad_(False)
    step = DistillationStep(student, distillation_settings(args), args.fpn_channels)
    return train(step, teacher, args, source, 0.02, 0, 20, 10)


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_the_papers_recipe_trains_on_features_of_trained_scale(weights, detector):
    curve = run(weights, detector)
    assert len(curve["bad"]) == 20 and not any(curve["bad"])
    first, last = curve["distill_backbone"][0], curve["distill_backbone"][-5:]
    assert 0.3 < first < 1.5  # a share of the teacher's energy, whatever its size
    assert mean(last) < first


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_the_papers_own_form_does_not_without_a_clip(weights, detector):
    """So that the test above is known to be one: what it tests was not finite before."""
    curve = run(weights, detector, "--backbone-norm", "cells", "--weight-backbone", "0.1", "--clip-grad", "0")
    assert sum(curve["bad"]) >= 3
