"""The benchmark: the kinds of step do the same work, and the figures are what they are called."""

import json
from argparse import Namespace
from itertools import cycle

import pytest
import torch
from torchvision.ops import box_area, box_iou

from tar.bench import __main__ as bench
from tar.evaluation.cost import flops
from tar.training.process import Process

FLAGS = "--teacher r18 --student r18 --size 32 48 --image 32 40 --rois 16 --device cpu --batch-size 1 --threads 1"
CPU = Process(0, 1, torch.device("cpu"), "none")


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_all_kinds_do_the_work_they_name(detector):
    args = bench.parser().parse_args([*FLAGS.split(), "--detector", detector])
    losses, counted = {}, {}
    for kind, step in bench.kinds_of_step(args, CPU).items():
        torch.manual_seed(3)
        counted[kind] = flops(lambda kind=kind, step=step: losses.update({kind: [loss.item() for loss in step()]}))
    stock = losses["stock"]
    more = {kind: len(of_kind) - len(stock) for kind, of_kind in losses.items()}
    assert more == {"stock": 0, "plain": 0, "tar": 3, "floor": 0}
    for of_kind in losses.values():  # torchvision's losses, which no step before has changed
        assert sorted(of_kind[: len(stock)]) == pytest.approx(sorted(stock), rel=1e-4)
    cells = (counted["tar"] - counted["floor"]) / (6 * 9 * 256 * 256)  # a 3x3 convolution: forward, two gradients
    assert cells >= 1 and cells == int(cells)
    teachers_backbone = flops(bench.our_detector(args, "r18").backbone, torch.zeros(1, 3, 32, 64))
    assert counted["stock"] == counted["plain"] < counted["floor"] - teachers_backbone


def test_drawn_boxes_cover_42_percent_of_their_image():
    [image], [target] = bench.draw_batch(1, 60, 90)
    boxes = target["boxes"]
    assert image.shape == (3, 60, 90) and boxes.min() >= 0 and (boxes[:, 2:] <= torch.tensor([90, 60])).all()
    assert box_iou(boxes, boxes).tolist() == [[1, 0], [0, 1]]
    assert box_area(boxes).sum() / (60 * 90) == pytest.approx(0.42)


def test_kinds_of_step_take_turns_and_ratios_are_of_one_round(monkeypatch):
    """In the second round the machine is half as fast: the ratios are the same."""
    seconds, order = cycle([4.0, 1.0, 8.0, 2.0, 4.0, 1.2]), []
    monkeypatch.setattr(bench, "timed", lambda process, call: (call(), next(seconds))[1])
    kinds = {kind: lambda kind=kind: order.append(kind) for kind in ("stock", "plain")}
    steps, ratios = bench.times(Namespace(warmup=0, rounds=3, batch_size=2), CPU, kinds)
    assert order == ["stock", "plain"] * 3 and steps["stock"] == [2000, 4000, 2000]
    assert ratios == {"plain_over_stock": pytest.approx({"median": 0.25, "min": 0.25, "max": 0.3})}


def test_command_line(tmp_path, capsys, monkeypatch):
    sizes = {"tar": 6, "plain": 3, "floor": 1}
    kinds = {kind: lambda size=size: torch.ones(size, 5) @ torch.ones(5, 4) for kind, size in sizes.items()}
    monkeypatch.setattr(bench, "kinds_of_step", lambda args, process: kinds)
    bench.main([*FLAGS.split(), "--rows", "plain", "tar", "--rounds", "3", "--json", str(tmp_path / "figures.json")])
    figures, out = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert figures["flops"] == {"tar": 2 * 6 * 5 * 4, "plain": 2 * 3 * 5 * 4} and len(figures["steps"]["tar"]) == 3
    assert "tar_over_plain: " in out and "floor" not in out.split("\n\n")[1]
