"""The benchmark: its rivals do the same work, and its figures are what they are called."""

import json
import subprocess
import sys
from argparse import Namespace
from itertools import cycle

import pytest
import torch
from beside import beside
from tiny_runs import ROOT
from torch.utils.flop_counter import FlopCounterMode

from tar import bench
from tar.contestants import FLOOR, PLAIN, STOCK, TAR, Contestants, draw_batch
from tar.distill import Levels
from tar.evaluation import coco_metrics
from tar.machine import Machine
from tar.surroundings import drawn_results

FLAGS = "--teacher r34 --student r18 --size 64 96 --image 64 80 --rois 16 --device cpu"
SMALL = FLAGS.split()
CPU = Machine(0, 1, torch.device("cpu"), "none")


@pytest.fixture(scope="module", params=["faster-rcnn", "retinanet"])
def contestants(request):
    return Contestants(bench.parser().parse_args([*SMALL, "--detector", request.param]), CPU)


def losses_of(step):
    torch.manual_seed(3)
    return [float(loss.detach()) for loss in step()]


def test_our_plain_step_has_the_losses_of_torchvision(contestants):
    stock, ours = losses_of(contestants.stock_step), losses_of(lambda: contestants.ours(None))
    assert len(stock) >= 2 and sorted(ours) == pytest.approx(sorted(stock), rel=1e-4)


def test_the_others_train_the_same_student(contestants):
    plain = losses_of(lambda: contestants.ours(None))
    assert losses_of(lambda: contestants.ours(Levels()))[: len(plain)] == pytest.approx(plain, rel=1e-6)
    assert losses_of(contestants.floor) == pytest.approx(plain, rel=1e-6)
    assert sorted(losses_of(contestants.naive)[: len(plain)]) == pytest.approx(sorted(plain), rel=1e-4)
    assert sorted(losses_of(lambda: contestants.naive(True))[: len(plain)]) == pytest.approx(sorted(plain), rel=1e-4)


def test_nothing_is_learnt(contestants):
    before = [p.detach().clone() for p in contestants.step.parameters()]
    contestants.ours(Levels())
    assert all(torch.equal(a, b) for a, b in zip(before, contestants.step.parameters(), strict=True))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in contestants.step.parameters())


def test_the_floor_lacks_the_adapters_only(contestants):
    """The arithmetic of a TAR step is the floor's and the adapters', forward and backward."""
    contestants.prepare()
    counts = {}
    for name in (TAR, FLOOR, "adapters", "terms"):
        torch.manual_seed(3)
        with FlopCounterMode(display=False) as counter:
            contestants.rows()[name][1]()
        counts[name] = counter.get_total_flops()
    assert counts["terms"] == 0 and counts["adapters"] > 0
    assert counts[TAR] == counts[FLOOR] + counts["adapters"]


def test_hooks_are_taken_off_again(contestants):
    contestants.naive()
    assert not contestants.stock.backbone._forward_hooks and not contestants.stock_teacher.backbone._forward_hooks


def test_drawn_boxes_lie_in_their_image():
    images, targets = draw_batch(5, 60, 90)
    for image, target in zip(images, targets, strict=True):
        assert image.dtype == torch.uint8 and image.shape == (3, 60, 90) and image.float().std() > 5
        x0, y0, x1, y1 = target["boxes"].T
        assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 90).all() and (y1 <= 60).all()
        assert (x1 > x0).all() and (y1 > y0).all() and target["labels"].min() >= 1


def test_kinds_of_step_take_turns_and_ratios_are_of_one_round(monkeypatch):
    """In the second round the machine is twice as slow: ratios do not notice."""
    seconds, order = cycle([4.0, 1.0, 8.0, 2.0, 4.0, 1.2]), []
    monkeypatch.setattr(bench, "timed", lambda machine, call: (call(), next(seconds))[1])
    rows = {name: ("", lambda name=name: order.append(name)) for name in (STOCK, PLAIN)}
    args = Namespace(warmup=0, rounds=3, seed=0, batch_size=2)
    figures = bench.steps(args, CPU, rows)
    assert order == [STOCK, PLAIN] * 3
    assert figures["steps"][STOCK] == [2000, 4000, 2000]
    assert figures["ratios"]["plain_over_stock"] == pytest.approx({"median": 0.25, "min": 0.25, "max": 0.3})


@beside
def benched(folder):
    file = folder / "figures.json"
    parts = ["--parts", "steps", "flops", "deployment", "input", "--rounds", "1", "--warmup", "0"]
    parts += ["--rows", "stock", "plain", "tar", "floor", "naive", "naive equal"]
    words = [*SMALL, "--threads", "1", "--amp", "none", *parts, "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "tar.bench", *words], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_command_line(benched):
    figures, out = benched
    for name in ("tar_over_stock", "plain_over_stock", "tar_over_floor", "naive_over_tar", "naive_equal_over_tar"):
        assert 0 < figures["ratios"][name]["min"] <= figures["ratios"][name]["median"]
        assert name in out
    assert figures["flops"]["naive"] > figures["flops"][TAR] > figures["flops"][PLAIN]
    assert all(share > 0 for share in figures["mfu"].values())
    assert figures["deployment"]["teacher"]["parameters"] > figures["deployment"]["student"]["parameters"]
    assert 0 <= figures["input"]["waiting"] < 1 and figures["about"]["amp"] == "none"


@beside
def two_processes(folder):
    file = folder / "figures.json"
    words = [*SMALL, "--parts", "steps", "--rounds", "1", "--warmup", "0", "--amp", "none"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tar.bench"]
    done = subprocess.run([*torchrun, *words, "--json", file], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_two_processes_train_and_say_what_ddp_costs(two_processes):
    figures = two_processes
    assert figures["steps"].keys() == {PLAIN, TAR, "tar alone", "tar unused"}
    assert {"alone_over_tar", "unused_over_tar", "tar_over_plain"} <= figures["ratios"].keys()


def test_an_unknown_row_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([*SMALL, "--rows", "warp", "--parts", "steps"])
    assert stopped.value.code == 2 and "--rows warp: there are stock" in capsys.readouterr().err


def test_metrics_are_timed_on_results_that_count():
    results = drawn_results(20, 5, 3, 10)
    metrics = coco_metrics(results, list("abcde"))
    assert 0 < metrics["AP50"] < 100 and len(results) == 20
