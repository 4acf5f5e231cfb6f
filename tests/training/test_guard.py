"""Steps whose loss or gradient is not finite: they are skipped and counted, and a row of them ends the run."""

import re
from argparse import Namespace

import pytest
import torch
from small_detectors import make_step, pair, same
from test_overfitting import Easy
from tiny_runs import STEPS, call, read_log, weights_of
from torch import nn

import train
from tar.data.loader import make_loader, to_device
from tar.training import checkpoint
from tar.training.guard import Done, Guard
from tar.training.process import Process
from tar.training.run import Run

CPU = torch.device("cpu")
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


def guarded(optimizer, **scale):
    """A small net, its optimizer and its guard; scale is the fp16 scaler's where there is one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 1))
    optimizer = optimizer(net.parameters(), 0.1, fused=True, **({"momentum": 0.9} if optimizer is SGD else {}))
    return net, optimizer, Guard(net, optimizer, torch.amp.GradScaler("cpu", enabled=bool(scale), **scale), CPU)


def values_of(net):
    return {name: v.clone() for name, v in net.state_dict().items() if "num_batches" not in name}


def trained_on(optimizer, inputs):
    """Weights, statistics and optimizer state after a guarded step for each input; the guard."""
    net, optimizer, guard = guarded(optimizer)
    for x in inputs:
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        guard.step(loss)
    inner = {f"{i} {name}": v for i, row in enumerate(optimizer.state.values()) for name, v in row.items()}
    return {**values_of(net), **inner}, guard


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer, where):
    random = torch.Generator().manual_seed(1)
    good = [torch.randn(4, 1, 4, 4, generator=random) for _ in range(3)]
    bad = torch.full((4, 1, 4, 4), float("nan"))
    clean, _ = trained_on(optimizer, good)
    mixed, guard = trained_on(optimizer, [*good[:where], bad, bad, *good[where:]])
    assert same(mixed, clean)
    assert guard.total == 2 and guard.streak == (2 if where == 3 else 0)


@pytest.mark.parametrize("scale", [{}, {"init_scale": 2.0}], ids=["float32", "fp16"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_a_loss_that_is_not_finite_is_not_applied_though_its_gradient_is(optimizer, scale):
    net, _, guard = guarded(optimizer, **scale)
    before = values_of(net)
    loss = nn.functional.smooth_l1_loss(net(torch.ones(4, 1, 4, 4)), torch.full((4, 1), float("inf")))
    assert torch.isinf(loss)
    guard.scaler.scale(guard.poisoned(loss)).backward()
    assert guard.step(loss)[0] and guard.total == 1
    assert same(values_of(net), before)


def test_an_overflow_of_fp16_counts_only_where_the_scale_can_fall_no_further():
    net, _, guard = guarded(SGD, init_scale=4.0)
    bad = []
    for _ in range(4):
        for p in net.parameters():
            p.grad = torch.full_like(p, float("inf"))
        guard.scaler.scale(torch.ones(()))  # as a step does
        bad.append(bool(guard.step(torch.tensor(1.0))[0]))
    assert bad == [False, False, True, True]  # at scales 4, 2, 1, 0.5


def test_a_gradient_is_clipped_to_its_norm():
    net, _, guard = guarded(SGD)
    before = [p.detach().clone() for p in net.parameters()]
    loss = 100 * net(torch.ones(4, 1, 4, 4)).sum()
    loss.backward()
    guard.step(loss, clip_grad=0.5)
    moved = sum((p - q).square().sum() for p, q in zip(net.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_gradient_norms_are_those_of_each_weighted_term_alone():
    student, teacher = pair()
    step = make_step(student, teacher, weight_backbone=4.0, weight_cls=0.0, weight_reg=1.0)
    run = Namespace(lambda_=lambda _: 0.5, module=step, teacher=teacher, train_set=Easy(), args=Namespace(seed=0))
    run.process, run.seed_regions = Process(0, 1, CPU, "none"), lambda _: torch.manual_seed(3)
    norms = Run.gradient_norms(run, Done(False, 1, [(0, 0), (0, 1)], {}, None))
    [(images, targets)] = make_loader(Easy(), True, [[(0, 0), (0, 1)]], 0)
    for name, weight in (("loss_classifier", 1.0), ("distill_backbone", 2.0), ("distill_reg", 0.5)):
        step.zero_grad()
        torch.manual_seed(3)
        detection, distillation, _ = step(*to_device(images, targets, CPU), teacher)
        (weight * {**detection, **distillation}[name]).backward()
        total = sum(p.grad.double().square().sum() for p in step.parameters() if p.grad is not None).sqrt().item()
        assert norms[name] == pytest.approx(total, rel=1e-4) and total > 0


def test_bad_steps_in_a_row_end_the_run_in_a_line_and_it_goes_on_from_before(voc, tmp_path, monkeypatch, capsys):
    original, seen, run = train.DistillationStep.forward, [], tmp_path / "run"

    def forward(self, *args):
        detection, *rest = original(self, *args)
        seen.append(1)
        if len(seen) in (4, 5):  # the first two steps of the second epoch
            detection["loss_box_reg"] = detection["loss_box_reg"] * float("inf")
        return detection, *rest

    monkeypatch.setattr(train.DistillationStep, "forward", forward)
    flags = [*voc.flags, "--teacher-weights", voc.teacher / "last.pth", "--max-bad-steps", 2, "--output", run]
    with pytest.raises(SystemExit) as ended:
        call(train.main, *flags)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 3
    assert all(word in line for word in ("stopped at step 5", "first loss_box_reg", ".jpg", "--lr"))
    *_, logged, skipped = read_log(run)[0]
    assert [logged["bad_steps"], skipped["bad_steps"]] == [0, 1]
    told = line.split("the last finite step was 3,")[1]
    found = {name: (float(a), float(b)) for name, a, b in re.findall(r"(\w+) ([\d.e+-]+) \(([\d.e+-]+)\)", told)}
    assert found.keys() == {name for name in logged if name.startswith(("loss_", "distill_"))}
    for name, (value, norm) in found.items():
        assert value == pytest.approx(logged[name], rel=6e-3, abs=1e-4) and norm > 0
    saved = checkpoint.load(run / "last.pth")
    assert (saved["epoch"], saved["batch"]) == (1, 0)
    assert all(torch.isfinite(v).all() for v in saved["model"].values())
    call(train.main, *flags)
    assert len(read_log(run)[0]) == STEPS and same(weights_of(run), weights_of(voc.run))
