"""Whose weights a run starts from: the teacher's, a checkpoint's, torchvision's."""

import copy

import pytest
import torch
from small_detectors import CLASSES, pair, same, save

from tar import UserError
from tar.detectors.build import build_detector
from tar.method.proposal_sharing import box_head
from tar.training.flags import parse
from tar.training.initial_weights import read_teacher, start_from
from tar.training.process import Process


@pytest.fixture
def file(tmp_path):
    return tmp_path / "last.pth"


def test_student_weights_are_loaded_whole(file):
    model, build = save(file)
    torch.manual_seed(3)
    student = build_detector(**build)
    start_from(student, file, build, CLASSES)
    assert same(student.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("changes", "classes", "says"),
    [
        ({}, ("disc", "square", "ball"), "other classes: without ball; besides bar"),
        ({}, CLASSES[::-1], "other classes: the same names in another order"),
        ({"backbone": "r18"}, CLASSES, "not the weights of this student.*'backbone': 'r10'"),
    ],
)
def test_student_weights_of_another_student_are_refused_by_name(file, changes, classes, says):
    build = {**save(file)[1], **changes}
    with pytest.raises(UserError, match=rf"^{file}: .*{says}.*$"):
        start_from(build_detector(**build), file, build, classes)


def arguments(file, *flags):
    return parse(["--student", "r10", "--teacher", "r18", "--teacher-weights", str(file), *flags])


@pytest.mark.parametrize(("kind", "asked"), [("faster-rcnn", 4), ("retinanet", 3)])
def test_a_teacher_that_fits_is_read(file, kind, asked):
    model, build = save(file, kind, "r18", anchor_scale=3)  # of a Faster R-CNN the anchors may differ
    teacher, saved = read_teacher(arguments(file, "--detector", kind, "--anchor-scale", str(asked)), CLASSES)
    assert same(model.state_dict(), teacher.state_dict()) and saved["build"] == build and not teacher.training


@pytest.mark.parametrize(
    ("saved", "flags", "classes", "says"),
    [
        ({"kind": "retinanet"}, "", CLASSES, "detector is retinanet, not faster-rcnn"),
        ({"backbone": "r10"}, "", CLASSES, "backbone is r10, not r18"),
        ({}, "", CLASSES[:2], "classes are others: besides bar"),
        ({"kind": "retinanet", "anchor_scale": 3}, "--detector retinanet", CLASSES, "anchor.scale is 3, not 2"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_by_name(file, saved, flags, classes, says):
    save(file, **{"backbone": "r18", **saved})
    with pytest.raises(UserError, match=rf"^{file}: .*{says}.*$"):
        read_teacher(arguments(file, *flags.split()), classes)


def test_cocos_teacher_is_built_by_name(monkeypatch):
    def build(*given):
        assert given == ("retinanet", CLASSES, 64, 96)
        return "teacher", {"detector": "retinanet", "backbone": "r50", "anchor_scale": 4}

    monkeypatch.setattr("tar.training.initial_weights.build_coco_teacher", build)
    flags = ["--teacher", "r50", "--detector", "retinanet", "--size", "64", "96", "--anchor-scale"]
    assert read_teacher(arguments("coco", *flags, "4"), CLASSES)[0] == "teacher"
    with pytest.raises(UserError, match=r"^coco: .*anchor.scale is 4, not 3$"):
        read_teacher(arguments("coco", *flags, "3"), CLASSES)


def test_a_teacher_that_is_cast_once_gives_the_same_numbers():
    process, teacher = Process(0, 1, torch.device("cpu"), "bf16"), pair()[1]
    cast = copy.deepcopy(teacher)
    process.freeze(cast)
    assert cast.backbone.body.conv1.weight.dtype == torch.bfloat16
    images, regions = torch.rand(2, 3, 64, 96), [torch.tensor([[4.0, 4, 40, 50]]), torch.tensor([[9.0, 2, 90, 60]])]
    with process.autocast(), torch.no_grad():
        levels, cast_levels = teacher.backbone(images), cast.backbone(images)
        outputs = [box_head(m, f, regions, [(64, 96)] * 2) for m, f in ((teacher, levels), (cast, cast_levels))]
    assert same(levels, cast_levels)
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
