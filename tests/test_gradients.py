"""python -m tar.gradients: sizes and cosines of the levels' gradients, against those of backward()."""

import pytest
import torch

from tar import gradients
from tar.distill import Levels, Step
from tar.gradients import compare, measure


@pytest.fixture
def step(student):
    torch.manual_seed(3)
    return Step(student, Levels(0.3, 1.0, 0.2), 24).train()


def of_part(step, batch, teacher, loss_of, prefix):
    """The gradient that backward() leaves in a part of the student, flat."""
    step.zero_grad()
    torch.manual_seed(5)
    detection, distillation, _ = step(*batch, teacher)
    loss_of(detection, distillation).backward()
    inside = [p for n, p in step.named_parameters() if n.startswith(f"student.{prefix}") and p.requires_grad]
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in inside])


def test_sizes_and_cosines_are_those_of_the_gradients(step, teacher, batch):
    torch.manual_seed(5)
    rows = compare(step, teacher, batch)
    heads = {("head", "cls"), ("head", "reg")}
    assert rows.keys() == {(p, n) for p in ("backbone", "pyramid") for n in ("backbone", "cls", "reg")} | heads
    own = {
        "all": lambda d, _: sum(d.values()),
        "classes": lambda d, _: d["loss_objectness"] + d["loss_classifier"],
        "boxes": lambda d, _: d["loss_rpn_box_reg"] + d["loss_box_reg"],
    }
    for part, prefix in (("backbone", "backbone.body."), ("head", "roi_heads.box_head.")):
        mine = of_part(step, batch, teacher, lambda _, d: 0.2 * d["distill_reg"], prefix)
        others = [of_part(step, batch, teacher, loss, prefix) for loss in own.values()]
        size, *cosines = rows[part, "reg"]
        assert size == pytest.approx((mine.norm() / others[0].norm()).item(), rel=1e-3)
        for cosine, other in zip(cosines, others, strict=True):
            assert cosine == pytest.approx((mine @ other / mine.norm() / other.norm()).item(), abs=1e-3)


def test_a_weight_scales_the_size_and_turns_nothing(step, teacher, batch):
    rows = []
    for weight in (0.2, 0.4):
        step.levels = Levels(0.3, 1.0, weight)
        torch.manual_seed(5)
        rows.append(compare(step, teacher, batch)["head", "reg"])
    assert rows[1][0] == pytest.approx(2 * rows[0][0], rel=1e-4)
    assert rows[1][1:] == pytest.approx(rows[0][1:], abs=1e-4)


def test_command_line(voc, capsys):
    gradients.main(["--weights", str(voc.run / "last.pth"), "--batches", "2", "--device", "cpu", "--threads", "1"])
    out = capsys.readouterr().out
    assert f"{voc.run}/last.pth" in out and out.count("| backbone |") == 4 and out.count("| reg ") == 3
    given = gradients.parser().parse_args(["--weights", "x", "--batches", "3"])
    rows = measure(voc.run / "last.pth", given, gradients.set_up("cpu", "none", 1))
    assert len(rows["backbone", "backbone"]) == len(rows["head", "cls"]) == 3


def test_a_plain_student_has_no_levels(plain, capsys):
    with pytest.raises(SystemExit) as stopped:
        gradients.main(["--weights", str(plain.run / "last.pth")])
    assert stopped.value.code == 2 and "a plain student" in capsys.readouterr().err
