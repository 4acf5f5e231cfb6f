"""Where a plain student trains with SGD, the distilled one trains too: features of trained scale, many settings.

    PYTHONPATH=. python tests/method/sgd_stability.py --data-path VOC --output FILE.json [--processes 2] [--amp none]
    PYTHONPATH=. python tests/method/sgd_stability.py --print FILE.json

ImageNet's ResNets may be out of reach, so stand-ins take their place: random weights whose batch norm is calibrated on
photographs, so that the stages' outputs have a trained network's size (root mean square 0.35 to 0.44). r101 teaches
r50, 256 channels, no norm in the pyramid, images of 160 x 213 pixels, batch 2; the learning rate is reached after 50 of
150 steps. A teacher is trained before, one for each detector and size of features. Runs of FILE.json are not repeated.
"""

import argparse
import fcntl
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2 import functional as v2

from tar.data.datasets import load_dataset
from tar.data.loader import make_loader, to_device, train_batches
from tar.detectors.backbones import build_classifier
from tar.detectors.build import DETECTORS, build_detector
from tar.evaluation.markdown import markdown
from tar.method.step import DistillationStep
from tar.training import checkpoint
from tar.training.flags import build_of, distillation_settings, parse
from tar.training.guard import Guard
from tar.training.process import Process, set_up

STEPS, WARMUP, LAST = 150, 50, 30
ALONE = Process(0, 1, torch.device("cpu"), "none")


@torch.no_grad()
def stand_in(name, images, scale=1.0, seed=1):
    """The state dict of a ResNet with calibrated batch norm, on the CPU; its outputs are `scale` times as large.

    images: float [B, 3, H, W] in 0..1, on any device; normalised here as a detector does.
    """
    torch.manual_seed(seed)
    network = build_classifier(name)
    for module in network.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            nn.init.constant_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight, 0.2 * scale)
            if module.downsample is not None:
                nn.init.constant_(module.downsample[1].weight, 0.5 * scale)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.bn1.weight.mul_(scale)  # the first stage has no shortcut of its own in r18 and r34
    network.to(images.device).train()(v2.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return network.cpu().state_dict()


def settings():
    """All runs, teachers aside: (detector, learning rate, scale of the features, seed, distilled)."""
    grid = [(d, lr, s, seed) for seed, s, lr, d in product(range(3), (1, 3), (0.02, 0.01), DETECTORS)]
    grid += [(d, 0.02, s, 0) for s in (0.3, 10) for d in DETECTORS]
    return [(*one, distilled) for one in grid for distilled in (False, True)]


def name_of(detector, lr, scale, seed, distilled):
    return f"{detector} lr {lr} scale {scale} seed {seed} {'tar' if distilled else 'plain'}"


def flags_of(detector, data_path, *more):
    words = ["--dataset", "voc", "--data-path", data_path, "--student", "r50", "--teacher", "r101"]
    return parse([str(w) for w in [*words, "--detector", detector, "--size", 160, 213, *more]])


def train(step, teacher, args, source, lr, seed, steps=STEPS, warmup=WARMUP, process=ALONE):
    """Trains for some steps; SGD and the clip as the recipe has them, the distillation at full weight.

    Returns lists with an entry a step: detection (loss), norm (of the gradient, before the clip), bad (not finite), and
    one for each distillation term.
    """
    parameters = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    guard = Guard(step, optimizer, torch.amp.GradScaler("cpu", enabled=False), process.device)
    epochs = math.ceil(steps * args.batch_size / len(source))
    batches = [b for e in range(epochs) for b in train_batches(len(source), args.batch_size, seed, e, wide=source.wide)]
    curve = {"detection": [], "norm": [], "bad": []}
    weights = step.settings.weights() if step.settings else {}
    for i, (images, targets) in enumerate(make_loader(source, True, batches[:steps], seed)):
        torch.manual_seed(seed * 1_000_003 + i)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (i + 1) / warmup)
        images, targets = to_device(images, targets, process.device)
        with process.autocast():
            detection, distillation, _ = step.train()(images, targets, teacher)
        detection = sum(detection.values())
        loss = detection + sum(w * distillation[name] for name, w in weights.items())
        optimizer.zero_grad()
        guard.poisoned(loss).backward()
        bad, norm = guard.step(loss, args.clip_grad)
        for name, value in {"detection": detection, "norm": norm, "bad": bad, **distillation}.items():
            curve.setdefault(name, []).append(round(float(value.detach()), 4))
        if guard.longest >= 3:
            break
    return curve


def photographs(data_path):
    """The training source, and 24 of its photographs in one size for the stand-ins."""
    source, _ = load_dataset("voc", data_path, limit_train=2 * STEPS, limit_test=1)
    chosen = range(0, len(source), max(len(source) // 24, 1))[:24]
    return source, torch.stack([v2.resize(source.load(0, i)[0], [160, 213]) for i in chosen]).float() / 255


def detector_of(args, backbone, scale, folder, source, seed, process):
    """A detector on its device that starts from a stand-in, which is made once."""
    file = folder / f"{backbone}-{scale}.pth"
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            torch.save(stand_in(backbone, photographs(args.data_path)[1].to(process.device), scale), file)
    torch.manual_seed(seed)
    args.backbone_weights = str(file)
    return process.place(build_detector(**build_of(args, backbone, len(source.classes))))


def teacher_of(detector, scale, data_path, folder, source, process):
    """The teacher of a detector and a size of features: trained once, then read from the folder."""
    file, args = folder / f"teacher-{detector}-{scale}.pth", flags_of(detector, data_path)
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        model = detector_of(args, "r101", scale, folder, source, 100, process)
        if not file.is_file():
            curve = train(DistillationStep(model), None, args, source, 0.01, 100, process=process)
            torch.save({"model": model.state_dict(), "curve": curve}, file)
    model.load_state_dict(torch.load(file, map_location=process.device)["model"])
    process.freeze(model.eval().requires_grad_(False))
    return model


def student_run(setting, data_path, folder, amp, more=()):
    """One run of settings(): its curve, clip, minutes, device and precision."""
    process = set_up(amp=amp, threads=1)
    detector, lr, scale, seed, distilled = setting
    args = flags_of(detector, data_path, *more)
    source, _ = photographs(data_path)
    started = time.perf_counter()
    teacher = teacher_of(detector, scale, data_path, folder, source, process) if distilled else None
    student = detector_of(args, "r50", scale, folder, source, seed, process)
    distillation = distillation_settings(args) if distilled else None
    step = process.place(DistillationStep(student, distillation, args.fpn_channels))
    curve = train(step, teacher, args, source, lr, seed, process=process)
    minutes, about = round((time.perf_counter() - started) / 60, 2), process.about()
    return {"curve": curve, "clip": args.clip_grad, "minutes": minutes, "device": about["device"], "amp": about["amp"]}


def summary(run):
    """Steps that were not finite; mean detection loss of the last; share that are clipped after the warm-up."""
    curve = run["curve"]
    after = curve["norm"][WARMUP:]
    clipped = sum(n > run["clip"] for n in after) / len(after) if run["clip"] and after else 0.0
    return int(sum(curve["bad"])), mean(curve["detection"][-LAST:]), clipped


def report(runs):
    """The table of all pairs, and what does not hold in it."""
    rows, wrong = [], []
    for *where, distilled in settings():
        name, twin = name_of(*where, False), name_of(*where, True)
        if distilled or name not in runs:
            continue
        bad, loss, clipped = summary(runs[name])
        row = [*map(str, where), str(bad), f"{loss:.2f}", f"{100 * clipped:.0f}%"]
        if twin in runs:
            its_bad, its_loss, its_clipped = summary(runs[twin])
            row += [str(its_bad), f"{its_loss:.2f}", f"{100 * its_clipped:.0f}%", f"{its_loss / loss:.2f}"]
            if not bad and (its_bad or not its_loss <= 1.15 * loss):
                wrong.append(name)
        if not bad and clipped >= 1 / 3:
            wrong.append(f"{name}: clipped")
        rows.append(row + ["-"] * (11 - len(row)))
    header = ["detector", "lr", "scale", "seed", "plain: bad", "loss", "clipped"]
    print(markdown([*header, "TAR: bad", "its loss", "its clipped", "ratio"], rows))
    where = {f"{run['device']}, {run['amp']}" for run in runs.values()}
    print(f"\n{len(rows)} pairs ({'; '.join(sorted(where))}), {len(wrong)} do not hold: {', '.join(wrong) or 'none'}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data-path", help="photographs in VOC's layout")
    p.add_argument("--output", type=Path, help="JSON file of the runs' curves, which is added to")
    p.add_argument("--print", type=Path, help="only print the table of such a file")
    p.add_argument("--work", type=Path, default=Path("runs/sgd-stability"), help="folder of stand-ins and teachers")
    p.add_argument("--processes", type=int, default=2, help="of one thread each; they share a GPU where there is one")
    p.add_argument("--amp", default="auto", help="bf16, none or auto, as train.py's")
    args = p.parse_args()
    if args.print:
        return report(json.loads(args.print.read_text()))
    args.work.mkdir(parents=True, exist_ok=True)
    runs = json.loads(args.output.read_text()) if args.output.is_file() else {}
    with ProcessPoolExecutor(args.processes) as pool:
        left = [s for s in settings() if name_of(*s) not in runs]
        futures = {pool.submit(student_run, s, args.data_path, args.work, args.amp): s for s in left}
        for future in as_completed(futures):
            runs[name_of(*futures[future])] = future.result()
            lines = (f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items())
            checkpoint.save_text(args.output, "{" + ",\n".join(lines) + "}\n")
            print(name_of(*futures[future]), *summary(future.result()), flush=True)
    return report(runs)


if __name__ == "__main__":
    main()
