"""The benchmark: the kinds of step do the same work, and the figures are what they are called."""

import json
from argparse import Namespace
from itertools import cycle

import pytest
import torch
from torchvision.ops import box_area, box_iou

from tar.bench import __main__ as bench
from tar.bench.__main__ import FLOOR, PLAIN, STOCK, TAR
from tar.evaluation.cost import flops
from tar.training.process import Process

FLAGS = "--teacher r18 --student r18 --size 32 48 --image 32 40 --rois 16 --device cpu --batch-size 1 --threads 1"
CPU = Process(0, 1, torch.device("cpu"), "none")


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_all_kinds_do_the_work_they_name(detector):
    kinds = bench.kinds_of_step(bench.parser().parse_args([*FLAGS.split(), "--detector", detector]), CPU)
    losses, counted = {}, {}

    def run(name, step):
        losses[name] = [float(loss.detach()) for loss in step()]

    for name, (_, step) in kinds.items():
        torch.manual_seed(3)
        counted[name] = flops(run, name, step)
    stock = losses[STOCK]
    assert tuple(kinds) == bench.ROWS and len(stock) >= 2
    more = {STOCK: 0, PLAIN: 0, TAR: 3, FLOOR: 0, "backbone level": 1, "cls level": 1, "reg level": 1}
    assert {name: len(of_kind) - len(stock) for name, of_kind in losses.items()} == more
    for of_kind in losses.values():  # torchvision's losses, which no step before has changed
        assert sorted(of_kind[: len(stock)]) == pytest.approx(sorted(stock), rel=1e-4)
    adapters = counted[TAR] - counted[FLOOR]
    cells = adapters / (6 * 9 * 256 * 256)  # under the masks; 3x3 convolution: forward, and two gradients
    assert cells >= 1 and cells == int(cells)
    with_backbone = counted["backbone level"] - adapters  # the student, and the teacher's backbone
    assert counted[STOCK] == counted[PLAIN] < with_backbone < counted["cls level"] <= counted[FLOOR]
    assert with_backbone < counted["reg level"] <= counted[FLOOR]


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
    kinds = {name: ("", lambda name=name: order.append(name)) for name in (STOCK, PLAIN)}
    steps, ratios = bench.times(Namespace(warmup=0, rounds=3, batch_size=2), CPU, kinds)
    assert order == [STOCK, PLAIN] * 3 and steps[STOCK] == [2000, 4000, 2000]
    assert ratios == {"plain_over_stock": pytest.approx({"median": 0.25, "min": 0.25, "max": 0.3})}


def test_command_line(tmp_path, capsys, monkeypatch):
    kinds = {
        name: (name, lambda size=size: torch.ones(size, 5) @ torch.ones(5, 4)) for name, size in ((TAR, 6), (PLAIN, 3))
    }
    monkeypatch.setattr(bench, "kinds_of_step", lambda args, process: {**kinds, FLOOR: ("unwanted", None)})
    monkeypatch.setattr(bench, "peak", lambda process, amp: 1e6)
    flags = ["--rows", PLAIN, TAR, "--rounds", "3", "--amp", "none", "--json", str(tmp_path / "figures.json")]
    bench.main([*FLAGS.split(), *flags])
    figures, out = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert figures["flops"] == {TAR: 2 * 6 * 5 * 4, PLAIN: 2 * 3 * 5 * 4} and len(figures["steps"][TAR]) == 3
    ms = sorted(figures["steps"][TAR])[1]
    assert figures["of_peak"][TAR] == pytest.approx(240 / (ms / 1000) / 1e6)
    assert "tar_over_plain: " in out and "unwanted" not in out
