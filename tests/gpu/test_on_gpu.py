"""What a GPU computes, against the CPU: losses, RoIAlign, masks, gate, frozen norm; resume, memory, waits.

    python tests/gpu/check.py a [--dry]

Without CUDA the tests are skipped. With TAR_GPU_DRY=1 (--dry) they run on the CPU: that shows that they run at all.
"""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_detectors import KINDS, batch, make_step, pair
from tiny_runs import ROOT, SMALL, call, command, weights_of
from torch.utils._pytree import tree_map
from waits import waits_of

import train
from tar.detectors.backbones import FrozenNorm
from tar.detectors.roi_align import PyramidRoIAlign
from tar.method.backbone_level import MASKS, pyramid_masks
from tar.method.regression_level import REG_GATES, regression_gate

DRY = bool(os.environ.get("TAR_GPU_DRY"))
DEVICE = "cpu" if DRY else "cuda"
pytestmark = pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="there is no GPU")


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """TF32 has 10 bits: not what is compared with the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(tensors, device=DEVICE):
    """Tensors in lists, tuples or dicts, on the device."""
    return tree_map(lambda tensor: tensor.to(device), tensors)


def losses(kind, device, amp, patch):
    """The loss terms of a step in which nothing is drawn: given proposals, and the first samples."""
    student, teacher = pair(kind)
    step = make_step(student, teacher).to(device)
    images, targets = moved(batch(), device)
    patch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
    if kind == "faster-rcnn":
        noise = torch.Generator().manual_seed(3)
        shift = [torch.rand(40, 4, generator=noise) * 0.6 - 0.3 for _ in images]  # parts of a box's sides

        def proposals(*_):
            boxes = [t["boxes"].repeat(40, 1)[:40] for t in student.resized]
            sides = [(b[:, 2:] - b[:, :2]).repeat(1, 2) for b in boxes]
            return [b + s.to(b) * side for b, s, side in zip(boxes, shift, sides, strict=True)], None

        transform = student.transform.forward

        def resized(*args):
            result = transform(*args)
            student.resized = result[1]
            return result

        patch.setattr(student.transform, "forward", resized)
        patch.setattr(student.rpn, "filter_proposals", proposals)
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        detection, distillation, _ = step(images, targets, teacher.to(device))
    return {name: value.item() for name, value in {**detection, **distillation}.items()}


@pytest.mark.parametrize(("amp", "near"), [(False, 1e-4), (True, 2e-2)], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_term(kind, amp, near, monkeypatch):
    with monkeypatch.context() as patch:
        expected = losses(kind, "cpu", False, patch)
    with monkeypatch.context() as patch:
        found = losses(kind, DEVICE, amp, patch)
    assert all(value > 1e-3 for value in expected.values())
    assert found == pytest.approx(expected, rel=near)


def test_roi_align_by_level_and_as_a_sparse_product():
    """The first image is narrow: torchvision would take a wrong stride of it, and keep it."""
    random = torch.Generator().manual_seed(0)
    pool = PyramidRoIAlign(["0", "1"], (4, 8), canonical_scale=32)
    for height, width in ((40, 1000), (128, 192)):
        sizes = [(-(-height // 32) * 32 // s, -(-width // 32) * 32 // s) for s in pool.strides]
        levels = [torch.randn(1, 3, *size, generator=random, dtype=torch.float64) for size in sizes]
        corner = torch.rand(50, 2, generator=random, dtype=torch.float64) * torch.tensor([width - 20, height - 20])
        regions = torch.cat([corner, corner + torch.rand(50, 2, generator=random) * 60 + 1], 1)
        expected = pool({str(i): level for i, level in enumerate(levels)}, [regions], [(height, width)])
        image, level = torch.zeros(50, dtype=torch.long), pool.map_levels([regions])
        assert 0 < level.sum() < 50
        found = pool.by_level(*moved([levels, regions, image, level]))
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    _, targets = batch()
    sizes, strides = [(32, 48), (16, 24)], (4, 8)
    features = [torch.zeros(2, 1, *size) for size in sizes]
    grids = [(torch.arange(h), torch.arange(w)) for h, w in sizes]
    cells = torch.cat([torch.cartesian_prod(*grid) * s for grid, s in zip(grids, strides, strict=True)])
    anchors = [torch.cat([cells.flip(1) - 8, cells.flip(1) + 8], 1).float()] * 2
    expected = pyramid_masks(targets, features, strides, kind, anchors=anchors)
    found = pyramid_masks(moved(targets), moved(features), strides, kind, anchors=moved(anchors))
    torch.testing.assert_close([level.cpu() for level in found], expected)


@pytest.mark.parametrize("kind", REG_GATES)
def test_gate(kind):
    coder = pair()[0].roi_heads.box_coder
    random = torch.Generator().manual_seed(1)
    corner, deltas = torch.rand(200, 2, generator=random) * 100, torch.randn(2, 200, 4, generator=random)
    region = torch.cat([corner, corner + 30], 1)
    gt_box = region + torch.randn(200, 4, generator=random) * 4
    rows = *deltas, region, region, gt_box
    expected = regression_gate(kind, coder, *rows)
    assert kind == "none" or 0 < expected.sum() < 200
    assert torch.equal(regression_gate(kind, coder, *moved(rows)).cpu(), expected)


def test_frozen_norm():
    norm, x = FrozenNorm(8), torch.randn(2, 8, 5, 7)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    expected = (x - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
    norm, x = norm.to(DEVICE), x.to(DEVICE)
    torch.testing.assert_close(norm(x).cpu(), expected, rtol=1e-4, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    flags = f"--device {DEVICE} --deterministic --limit-train 40 --epochs 3 --save-every 4 --student r10"
    flags = [*SMALL, *flags.split(), "--output"]
    words = [sys.executable, ROOT / "train.py", *flags, tmp_path / "killed"]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed/last.pth").exists():
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed/result.json").exists()
    for name in ("killed", "whole"):
        done = command("train.py", *flags, tmp_path / name)
        assert done.returncode == 0, done.stderr
    killed, whole = weights_of(tmp_path / "killed"), weights_of(tmp_path / "whole")
    assert all(torch.equal(killed[name], value) for name, value in whole.items())


def test_memory_that_runs_out_is_one_line(tmp_path, monkeypatch, capsys):
    if DRY:
        text = "CUDA out of memory. Tried to allocate 2.00 GiB."
        monkeypatch.setattr(train, "to_device", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError(text)))
    else:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(SystemExit) as ended:
            flags = f"--device {DEVICE} --size 1600 1600 --student r50 --output {tmp_path / 'run'}"
            call(train.main, *SMALL, *flags.split())
    finally:
        if not DRY:
            torch.cuda.set_per_process_memory_fraction(1.0)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and re.search("memory.*--batch-size", line)


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_adds_at_most_four_waits(kind):
    student, teacher = pair(kind)
    step, teacher = make_step(student, teacher, mask="full" if DRY else "gaussian").to(DEVICE), teacher.to(DEVICE)
    images, targets = moved(batch())
    found = []  # the places of a step that wait
    for one in (None, teacher, None, teacher):  # the first of each sets up
        if DRY:
            found.append(["here"] * waits_of(lambda one=one: step(images, targets, one)))
            continue
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(images, targets, one)
        torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchronizing" in str(w.message)]
        found.append([f"{Path(w.filename).name}:{w.lineno}" for w in waits])
    added = Counter(found[3]) - Counter(found[2])
    print(f"{kind}: {len(found[2])} waits in a plain step, {len(found[3])} with the distillation, which adds {added}")
    assert len(found[3]) - len(found[2]) <= 4
