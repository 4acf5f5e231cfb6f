"""The benchmark: the kinds of step do the same work, and the figures are what they are called."""

import json
from argparse import Namespace
from itertools import cycle

import pytest
import torch

from tar.bench import __main__ as bench
from tar.bench.kinds_of_step import FLOOR, PLAIN, STOCK, TAR, KindsOfStep, draw_batch
from tar.method.step import DistillationSettings
from tar.training.process import Process

FLAGS = "--teacher r18 --student r18 --size 64 96 --image 64 80 --rois 16 --device cpu --batch-size 1 --threads 1"
CPU = Process(0, 1, torch.device("cpu"), "none")


@pytest.fixture(scope="module", params=["faster-rcnn", "retinanet"])
def kinds(request):
    return KindsOfStep(bench.parser().parse_args([*FLAGS.split(), "--detector", request.param]), CPU)


def losses_of(step, *args):
    torch.manual_seed(3)
    return [float(loss.detach()) for loss in step(*args)]


def test_all_kinds_have_the_losses_of_torchvisions_student(kinds):
    before = [p.detach().clone() for p in kinds.step.parameters()]
    stock = losses_of(kinds.stock_step)
    assert len(stock) >= 2
    for step, *args in ((kinds.ours, None), (kinds.ours, DistillationSettings()), (kinds.floor,)):
        assert sorted(losses_of(step, *args)[: len(stock)]) == pytest.approx(sorted(stock), rel=1e-4)
    for equal in (False, True):
        assert sorted(losses_of(kinds.naive, equal)[: len(stock)]) == pytest.approx(sorted(stock), rel=1e-4)
    assert not kinds.stock.backbone._forward_hooks and not kinds.teacher.backbone._forward_hooks
    assert all(torch.equal(a, b) for a, b in zip(before, kinds.step.parameters(), strict=True))  # nothing is learnt
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in kinds.step.parameters())


def test_a_tar_step_is_the_floor_and_the_adapters(kinds):
    rows = {name: kinds.rows()[name] for name in (TAR, FLOOR, "adapters", "terms")}
    rows["product"] = ("", lambda: torch.ones(4, 5) @ torch.ones(5, 4))
    counted = bench.flops(Namespace(seed=3, batch_size=1), rows)
    assert counted["product"] == 2 * 4 * 5 * 4
    assert counted["terms"] == 0 and counted["adapters"] > 0
    assert counted[TAR] == counted[FLOOR] + counted["adapters"]


def test_drawn_boxes_lie_in_their_image():
    for image, target in zip(*draw_batch(5, 60, 90), strict=True):
        assert image.dtype == torch.uint8 and image.shape == (3, 60, 90) and image.float().std() > 5
        x0, y0, x1, y1 = target["boxes"].T
        assert ((x0 >= 0) & (y0 >= 0) & (x1 <= 90) & (y1 <= 60) & (x1 > x0) & (y1 > y0)).all()
        assert target["labels"].min() >= 1


def test_kinds_of_step_take_turns_and_ratios_are_of_one_round(monkeypatch):
    """In the second round the machine is half as fast: the ratios are the same."""
    seconds, order = cycle([4.0, 1.0, 8.0, 2.0, 4.0, 1.2]), []
    monkeypatch.setattr(bench, "timed", lambda process, call: (call(), next(seconds))[1])
    rows = {name: ("", lambda name=name: order.append(name)) for name in (STOCK, PLAIN)}
    figures = bench.steps(Namespace(warmup=0, rounds=3, seed=0, batch_size=2), CPU, rows)
    assert order == [STOCK, PLAIN] * 3 and figures["steps"][STOCK] == [2000, 4000, 2000]
    assert figures["ratios"] == {"plain_over_stock": pytest.approx({"median": 0.25, "min": 0.25, "max": 0.3})}


def test_command_line(tmp_path, capsys):
    file = tmp_path / "figures.json"
    flags = ["--rows", PLAIN, TAR, "--rounds", "1", "--warmup", "0", "--amp", "none", "--parts", "steps", "flops"]
    bench.main([*FLAGS.split(), *flags, "--json", str(file)])
    figures, out = json.loads(file.read_text()), capsys.readouterr().out
    assert figures["flops"][TAR] > figures["flops"][PLAIN] and "tar_over_plain" in out
    with pytest.raises(SystemExit) as stopped:
        bench.main([*FLAGS.split(), "--rows", "warp"])
    assert stopped.value.code == 2 and "--rows: invalid choice" in capsys.readouterr().err
    peaks = bench.memory(bench.parser().parse_args(FLAGS.split()), CPU, {PLAIN: (None, None)})  # in a fresh process
    assert 0.2 < peaks[PLAIN] < 4  # GiB; torch alone takes 0.2
