"""The gradient of N processes with B / N images each against that of one process with all B, term by term.

    PYTHONPATH=.:tests python tests/method/parallel_equality.py [--processes 1 2 4]

Prints the largest relative difference, |g_N - g_1| / |g_1| over all parameters, for every loss term of both detectors
and for three batches of four images of one size (images of several sizes are padded to the largest of their process).
Region sampling takes the first regions of each kind instead of random ones; every image has as many regions as are
asked for (torchvision's losses are means over them), and another number of positives. The precision is double: in
single, a sum in another order lets a unit near zero be on or off. Batch norm is frozen, as with ImageNet weights.
"""

import argparse
import tempfile
from functools import cache

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_detectors import KINDS, detector, make_step
from torch.nn.parallel import DistributedDataParallel

BOXES = [
    [[4.0, 4, 30, 30], [20, 24, 60, 60]],
    [[10.0, 6, 22, 50], [30, 30, 44, 40], [50, 50, 54, 55]],
    [[2.0, 2, 62, 62]],
    [[33.0, 8, 57, 31]],
]
BATCHES = {  # which of the four images have boxes
    "boxes in all images": (1, 1, 1, 1),
    "a process without boxes": (1, 1, 0, 0),
    "no boxes at all": (0, 0, 0, 0),
}


@cache
def build(kind):
    """A step and its teacher. The backbone does not train: its gradient is that of the pyramid, and takes long."""
    student = detector(kind, norm="frozen", trainable_layers=0).train()
    teacher = detector(kind, seed=1, norm="frozen", fpn_channels=24).eval().requires_grad_(False)
    return make_step(student, teacher, reg_gate="none"), teacher


def batch(has_boxes):
    random = torch.Generator().manual_seed(3)
    images, targets = [torch.rand(3, 64, 64, generator=random) for _ in BOXES], []
    for boxes, has in zip(BOXES, has_boxes, strict=True):
        boxes = torch.tensor(boxes if has else []).view(-1, 4)
        targets.append({"boxes": boxes, "labels": torch.arange(len(boxes)) % 3 + 1})
    return images, targets


def gradients(kind, has_boxes, rank, world):
    """{loss term: its gradient with respect to all that is trained}, by this process's share of the images."""
    step, teacher = build(kind)
    share = slice(rank * len(BOXES) // world, (rank + 1) * len(BOXES) // world)
    wrapped = DistributedDataParallel(step) if world > 1 else step
    detection, distillation, _ = wrapped(*(part[share] for part in batch(has_boxes)), teacher)
    terms, trained, found = detection | distillation, [p for p in step.parameters() if p.requires_grad], {}
    for name, term in terms.items():
        each = torch.autograd.grad(term, trained, retain_graph=True, materialize_grads=True)
        found[name] = torch.cat([g.flatten() for g in each])
        if world > 1:  # as DDP does
            dist.all_reduce(found[name])
            found[name] /= world
    step.zero_grad()
    sum(terms.values()).backward()
    found["all, by DDP"] = torch.cat([p.grad.flatten() for p in trained])
    return found


def work(rank, processes, folder, batches):
    """What one process does of each size of group that it belongs to."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    torch.randperm = torch.arange  # so torchvision's sampler takes the first regions
    for world in [size for size in processes if size > rank]:
        if world > 1:
            where = {"init_method": f"file://{folder}/meet{world}", "rank": rank, "world_size": world}
            dist.init_process_group("gloo", **where)
        found = {(kind, name): gradients(kind, has, rank, world) for kind in KINDS for name, has in batches.items()}
        if rank == 0:
            torch.save(found, f"{folder}/{world}.pth")
        if world > 1:
            dist.destroy_process_group()


def table(processes, batches=BATCHES):
    """{(processes, detector, batch, term): (relative difference, whether the gradient is not zero)}."""
    rows, sizes = {}, sorted({1, *processes})
    with tempfile.TemporaryDirectory() as folder:
        mp.set_forkserver_preload(["torchvision"])  # imported once for all processes
        mp.start_processes(work, (sizes, folder, batches), nprocs=sizes[-1], start_method="forkserver")
        found = {n: torch.load(f"{folder}/{n}.pth", weights_only=True) for n in sizes}
    for world in processes:
        for (kind, name), terms in found[world].items():
            for term, gradient in terms.items():
                whole = found[1][kind, name][term]
                size = whole.norm().item()
                difference = (gradient - whole).norm().item()
                rows[world, kind, name, term] = (difference / size if size else difference, size > 0)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = p.parse_args()
    rows = table(args.processes)
    print(f"| detector | batch | term | {' | '.join(f'N = {n}' for n in args.processes)} |")
    print("|---|---|---|" + "---|" * len(args.processes))
    for kind, name, term in dict.fromkeys(key[1:] for key in rows):
        cells = [rows[n, kind, name, term] for n in args.processes]
        print(f"| {kind} | {name} | {term} | {' | '.join(f'{d:.1e}' if on else '0' for d, on in cells)} |")
    print(f"\nlargest: {max(d for d, _ in rows.values()):.1e}")


if __name__ == "__main__":
    main()
