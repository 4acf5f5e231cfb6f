"""Two processes over gloo: a run from end to end, and the gradient of half a batch each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_equality
import pytest
import torch
import torch.distributed as dist
from beside import beside
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
from tar.distill import Shared
from tar.losses import backbone_loss, backbone_normalizer, classification_loss, regression_loss
from tar.regions import over_processes

ROOT = Path(__file__).resolve().parents[1]


# A run of two processes


@beside
def runs(folder):
    """A plain teacher, and a student distilled for half of its run, trained by two processes with one command."""
    small = "--size 64 64 --fpn-channels 16 --head-channels 32 --rois 16 --rpn-top-n 50 20 --anchor-scale 4 --workers 0"
    short = "--epochs 2 --batch-size 3 --limit-train 12 --limit-test 7 --log-every 1 --threads 1 --amp none"
    models = f"--eval-every 1 --decay-end 0.5 --device cpu --student r10 --teacher r18 --output {folder}/student"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*launch, str(ROOT / "train.py"), *f"{small} {short} {models}".split()]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    teacher = next(p for p in folder.iterdir() if p.name != "student")
    return {"teacher": teacher, "student": folder / "student", "out": done.stdout}


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_one_process_measures_what_two_measured(runs, which, tmp_path):
    result = json.loads((runs[which] / "result.json").read_text())
    figures = tmp_path / "figures.json"
    flags = [
        "--weights",
        runs[which] / "last.pth",
        "--workers",
        0,
        "--threads",
        1,
        "--device",
        "cpu",
        "--json",
        figures,
    ]
    evaluation.main([str(flag) for flag in flags])
    measured = json.loads(figures.read_text())
    assert measured["test_images"] == result["test_images"] == 7
    assert all(measured[k] == result[k] for k in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "per_class"))


def test_both_processes_share_an_epoch_and_one_writes(runs):
    for which in ("teacher", "student"):
        lines = [json.loads(line) for line in (runs[which] / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]  # 2 epochs of 12 / (2 * 3) steps
        assert len([line for line in lines if "metrics" in line]) == 2
    assert [("distill_backbone" in line, line["decay"]) for line in lines if "lr" in line] == [
        (True, 1.0),
        (True, 0.5),
        (False, 0.0),
        (False, 0.0),
    ]
    assert runs["out"].count("2 x cpu") == 1
    config = json.loads((runs["student"] / "config.json").read_text())
    assert (config["batch_size"], config["images_per_step"]) == (3, 6)


# The gradient of half a batch each


class Tiny(nn.Module):
    """The distillation's terms of fixed features, logits and deltas, scaled by trained factors."""

    def __init__(self):
        super().__init__()
        self.features = nn.Parameter(torch.tensor([1.0, 0.5, -0.3]))
        self.logits = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5]))
        self.deltas = nn.Parameter(torch.tensor([1.0, -0.5, 0.8, 1.5]))

    def forward(self, images):
        features, wanted, masks, *positive = (torch.cat([image[i] for image in images]) for i in range(8))
        logits, soft, deltas, taught, gate = positive
        cells = over_processes(masks.sum())
        energy = over_processes(backbone_normalizer([wanted], [masks]))
        count = over_processes(torch.tensor(float(len(logits))), least=1.0)
        return (
            backbone_loss([features * self.features[:, None, None]], [wanted], [masks], cells),
            backbone_loss([features * self.features[:, None, None]], [wanted], [masks], energy),
            classification_loss(logits * self.logits, soft, count),
            regression_loss(deltas * self.deltas, taught, gate > 0, count),
            classification_loss(logits * self.logits, self.smoothed(soft), count),
        )

    def smoothed(self, soft):
        """The labels of --answers smoothed, whose mean is over both processes."""
        unused = dict.fromkeys(("region", "teacher_region", "truth", "logits", "deltas", "teacher_deltas", "box_coder"))
        return Shared(soft.argmax(1), teacher_logits=soft, sigmoid=False, **unused).smoothed().teacher_logits


def image(seed, positives, boxes=True):
    """Random features [1, 3, 4, 5] of both models, a mask, and the answers for some positive regions."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 4, 5, generator=random) * boxes
    pair = [torch.randn(1, 3, 4, 5, generator=random) for _ in range(2)]
    answers = [torch.randn(positives, 4, generator=random) for _ in range(4)]
    return [*pair, mask, *answers, torch.rand(positives, generator=random).round()]


BATCHES = {
    "equal shares": [image(0, 6), image(1, 6)],
    "unequal shares": [image(2, 9), image(3, 2)],
    "one process without positives": [image(4, 5), image(5, 0)],
    "one process without boxes": [image(6, 0, boxes=False), image(7, 4)],
    "no boxes at all": [image(8, 0, boxes=False), image(9, 0, boxes=False)],
}
TERMS = ("backbone by cells", "backbone", "classification", "regression", "smoothed")


def gradients(module, images):
    """{term: its gradient with respect to all factors}, each from a pass of its own."""
    found = {}
    for number, term in enumerate(TERMS):
        module.zero_grad()
        losses = module(images)
        sum(loss * (number == i) for i, loss in enumerate(losses)).backward()
        found[term] = torch.cat([p.grad for p in module.parameters()])
    return found


def work(rank, folder):
    """One of two processes: its half of every batch, through DDP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {
        name: gradients(DistributedDataParallel(Tiny()), images[rank : rank + 1]) for name, images in BATCHES.items()
    }
    torch.save(found, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@beside
def halves(folder):
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("term", TERMS)
def test_two_halves_give_the_gradient_of_the_whole(halves, name, term):
    whole = gradients(Tiny(), BATCHES[name])[term]
    assert torch.equal(halves[0][name][term], halves[1][name][term])
    assert torch.allclose(halves[0][name][term], whole, rtol=1e-5, atol=1e-7)
    assert (whole.abs().sum() > 0) == (name != "no boxes at all")


def test_one_process_counts_for_itself():
    assert over_processes(torch.tensor(3.0)) == 3 and over_processes(torch.tensor(0.0), least=1.0) == 1


@beside
def detectors(_):
    name = "a process without boxes"  # the other batches, and four processes: python tests/parallel_equality.py
    return parallel_equality.table([1, 2], batches={name: parallel_equality.BATCHES[name]})


def test_every_term_of_whole_detectors_gives_the_gradient_of_the_whole(detectors):
    rows = detectors
    assert len(rows) == 2 * (8 + 6)
    assert max(difference for difference, _ in rows.values()) < 1e-6
    assert all(not_zero for _, not_zero in rows.values())
