"""The short form of sgd_stability.py: features of trained scale, SGD, no norm in the pyramid."""

import copy
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
CELLS = "--backbone-norm cells --weight-backbone 0.1 --clip-grad 0"
STEPS, WARMUP = 10, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{detector: (student, teacher)} from stand-ins for ImageNet's weights, their features three times as large."""
    source, folder, found = load_dataset("shapes", limit_train=40)[0], tmp_path_factory.mktemp("stand-ins"), {}
    images = torch.stack([source.load(0, i)[0] for i in range(8)]).float() / 255
    for name in ("r10", "r18"):
        torch.save(stand_in(name, images, 3.0), folder / f"{name}.pth")
    for kind in KINDS:
        args, pair = parse(f"{FLAGS} --detector {kind}".split()), []
        for name in ("r10", "r18"):
            torch.manual_seed(0)
            args.backbone_weights = str(folder / f"{name}.pth")
            pair.append(build_detector(**build_of(args, name, len(source.classes))))
        found[kind] = pair[0], pair[1].eval().requires_grad_(False)
    return found


def run(models, detector, more="", seed=0):
    """The curve of a few steps with a learning rate of 0.02 from the fourth on; the teacher is not trained."""
    source, args = load_dataset("shapes", limit_train=40)[0], parse(f"{FLAGS} --detector {detector} {more}".split())
    source.wide = None
    student, teacher = (copy.deepcopy(model).to(memory_format=torch.channels_last) for model in models[detector])
    step = DistillationStep(student, distillation_settings(args), args.fpn_channels)
    return train(step, teacher, args, source, 0.02, seed, STEPS, WARMUP)


@pytest.mark.parametrize("detector", KINDS)
def test_the_papers_recipe_trains_on_features_of_trained_scale(models, detector):
    curve = run(models, detector)
    assert len(curve["bad"]) == STEPS and not any(curve["bad"])
    first, last = curve["distill_backbone"][0], curve["distill_backbone"][-5:]
    assert 0.3 < first < 1.5  # a share of the teacher's energy, whatever its size
    assert mean(last) < first


@pytest.mark.parametrize("detector", KINDS)
def test_the_papers_own_form_does_not_without_a_clip(models, detector):
    """So that the test above is known to be one: what it tests was not finite before."""
    assert sum(run(models, detector, CELLS)["bad"]) >= 3
