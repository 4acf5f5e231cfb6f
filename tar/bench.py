"""How long a TAR step takes, beside torchvision's stock step, its own floor and a naive distillation.

    python -m tar.bench --teacher r101 --student r50 --size 600 1000 --batch-size 2 --json bench.json

The kinds of step take turns, round after round, so that whatever else the machine does meets all of them; a ratio is
the median over the rounds of two steps' ratio in the same round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from tar import UserError, checkpoint, fail
from tar.arguments import Parser, count, positive
from tar.contestants import FLOOR, PLAIN, STOCK, TAR, Contestants
from tar.machine import TYPES, set_up
from tar.models import BACKBONES, DETECTORS
from tar.surroundings import from_disk, metrics_time
from tar.tabulation import markdown

PARTS = ("steps", "flops", "memory", "deployment", "input", "evaluation", "scaling")
RATIOS = {
    "tar_over_stock": (TAR, STOCK),
    "plain_over_stock": (PLAIN, STOCK),
    "tar_over_plain": (TAR, PLAIN),
    "tar_over_floor": (TAR, FLOOR),
    "naive_over_tar": ("naive", TAR),
    "naive_equal_over_tar": ("naive equal", TAR),
    "terms_over_tar": ("terms", TAR),
    "adapters_over_tar": ("adapters", TAR),
    "alone_over_tar": ("tar alone", TAR),
    "unused_over_tar": ("tar unused", TAR),
}


def parser():
    p = Parser(prog="python -m tar.bench", description=__doc__.split("\n")[0])
    resnets = [name for name in BACKBONES if name.startswith("r") and name != "r10"]
    p.add_argument("--teacher", choices=resnets, default="r101", help="backbone (default: r101)")
    p.add_argument("--student", choices=resnets, default="r50", help="backbone (default: r50)")
    p.add_argument("--detector", choices=DETECTORS, default=DETECTORS[0], help=f"default: {DETECTORS[0]}")
    text = "shorter side and limit of the longer, pixels (default: 600 1000)"
    p.add_argument("--size", type=positive, nargs=2, metavar=("MIN", "MAX"), default=[600, 1000], help=text)
    text = "height and width of the drawn images, pixels before they are resized (default: VOC's 375 500)"
    p.add_argument("--image", type=positive, nargs=2, metavar=("H", "W"), default=[375, 500], help=text)
    p.add_argument("--batch-size", type=positive, default=2, metavar="N", help="images a process and step (default: 2)")
    p.add_argument("--rois", type=positive, default=512, metavar="N", help="regions an image (default: 512)")
    p.add_argument("--rounds", type=positive, default=5, metavar="N", help="steps of each kind (default: 5)")
    p.add_argument("--warmup", type=count, default=2, metavar="N", help="rounds before the first counts (default: 2)")
    p.add_argument("--rows", nargs="+", metavar="ROW", help="kinds of step (default: all)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    p.add_argument("--workers", type=count, default=2, metavar="N", help="loader processes (default: 2)")
    p.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "none"), default="auto", help="precision (default: auto)")
    p.add_argument("--threads", type=count, default=0, metavar="N", help="CPU threads; 0: torch's choice")
    p.add_argument("--seed", type=count, default=0, metavar="N", help="of weights, images and regions")
    p.add_argument("--json", metavar="FILE", help="write the figures there too")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        machine = set_up(args.device, args.amp, args.threads)
        figures = run(args, machine)
        if args.json and machine.main:
            checkpoint.save_json(args.json, figures)
    except UserError as error:
        fail("tar.bench", error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(args, machine):
    """Measures the parts that are asked for and prints each. Returns what --json holds."""
    about = machine.about()
    about |= {
        k: getattr(args, k) for k in ("teacher", "student", "detector", "size", "image", "batch_size", "rois", "rounds")
    }
    machine.say(", ".join(f"{k} {v}" for k, v in about.items()))
    figures = {"about": about}
    if {"steps", "flops", "deployment", "input"} & set(args.parts):
        contestants = Contestants(args, machine)
        about["covered"] = contestants.covered
        machine.say(f"boxes cover {100 * contestants.covered:.0f}% of the images")
        # what has no DDP around it is no step of a training by several processes
        rows = contestants.rows() if machine.world == 1 else contestants.rows_of_many()
        unknown = set(args.rows or ()) - rows.keys()
        if unknown:
            raise UserError(f"--rows {' '.join(sorted(unknown))}: there are {', '.join(rows)}")
        rows = {name: row for name, row in rows.items() if name in (args.rows or rows)}
        if {"adapters", "terms"} & rows.keys():
            contestants.prepare()
    if "steps" in args.parts:
        figures |= steps(args, machine, rows)
    if "flops" in args.parts:
        figures |= flops(args, machine, rows, figures.get("steps", {}))
    if "steps" in args.parts:
        machine.say("\n" + step_table(rows, figures))
        machine.say("\n" + markdown(["ratio", "median", "min", "max"], ratio_rows(figures["ratios"])))
    if "memory" in args.parts:
        figures["memory"] = memory(args, machine, rows)
    if "deployment" in args.parts:
        figures["deployment"] = deployment(args, machine, contestants)
    if "input" in args.parts:
        figures["input"] = from_disk(args, machine, contestants)
    if "evaluation" in args.parts:
        figures["evaluation"] = metrics_time(machine)
    if "scaling" in args.parts and machine.device.type == "cpu":
        figures["scaling"] = scaling(args, machine)
    return figures


def timed(machine, call):
    """Seconds of a call, to the end of what it gave a GPU to do."""
    machine.wait()
    started = time.perf_counter()
    call()
    machine.wait()
    return time.perf_counter() - started


def steps(args, machine, rows):
    """Rounds in which every kind of step is done once.

    Returns:
        steps: {row: milliseconds an image and round}; ratios: {name: {median, min, max}}.
    """
    seconds = {name: [] for name in rows}
    for number in range(-args.warmup, args.rounds):
        for name, (_, step) in rows.items():
            torch.manual_seed(args.seed + 1000 + number)  # all kinds sample the same regions
            passed = timed(machine, step)
            if number >= 0:
                seconds[name].append(passed)
    per_image = {name: [1000 * s / args.batch_size for s in row] for name, row in seconds.items()}
    pairs = {name: pair for name, pair in RATIOS.items() if all(row in rows for row in pair)}
    pairs |= {f"{row.replace(' ', '_')}_over_stock": (row, STOCK) for row in rows if STOCK in rows and row != STOCK}
    ratios = {}
    for name, (one, other) in pairs.items():
        each = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        ratios[name] = {"median": median(each), "min": min(each), "max": max(each)}
    return {"steps": per_image, "ratios": ratios}


def flops(args, machine, rows, per_image):
    """Arithmetic of each kind of step: convolutions and matrix products, two a multiply-add. On a GPU the peak of
    float32 is that of TF32, in which convolutions are done there.

    Returns:
        flops: {row: an image}; peak: {type: measured FLOP/s of a large matrix product}; mfu: {row: share of the peak
        of its type}.
    """
    counted = {}
    for name, (_, step) in rows.items():
        torch.manual_seed(args.seed + 1000)
        with FlopCounterMode(display=False) as counter:
            step()
        counted[name] = counter.get_total_flops() / args.batch_size
    peak = {kind: matmul_peak(machine, kind) for kind in {"none", machine.amp}}
    mfu = {}
    for name, times in per_image.items():
        kind = "none" if name in (STOCK, "naive") else machine.amp
        mfu[name] = counted[name] / (median(times) / 1000) / peak[kind]
    if not per_image:
        lines = [[name, f"{count / 1e9:.0f}"] for name, count in counted.items()]
        machine.say("\n" + markdown(["row", "GFLOP an image"], lines))
    machine.say(f"\nMatrix products: {', '.join(f'{k} {v / 1e12:.2f} TFLOP/s' for k, v in peak.items())}")
    return {"flops": counted, "peak": peak, "mfu": mfu}


def matmul_peak(machine, kind, repeats=7):
    """FLOP/s of the best of some products of large square matrices."""
    n = 8192 if machine.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=machine.device, dtype=TYPES.get(kind, torch.float32))
    return 2 * n**3 / min(timed(machine, lambda: a @ a) for _ in range(repeats))


def step_table(rows, figures):
    """The steps as Markdown."""
    lines = []
    for name, (what, _) in rows.items():
        times = figures["steps"][name]
        key = f"{name.replace(' ', '_')}_over_stock"
        ratio = 1.0 if name == STOCK else figures["ratios"].get(key, {}).get("median")
        line = [name, what, f"{median(times):.0f} ({min(times):.0f} to {max(times):.0f})"]
        line += [None if ratio is None else f"{ratio:.2f}"]
        if "flops" in figures:
            line += [f"{figures['flops'][name] / 1e9:.0f}", f"{100 * figures['mfu'][name]:.0f}%"]
        lines.append(line)
    header = ["row", "what", "ms an image", "of stock"] + ["GFLOP an image", "of peak"] * ("flops" in figures)
    return markdown(header, lines)


def ratio_rows(ratios):
    return [[name, *(f"{r[k]:.3f}" for k in ("median", "min", "max"))] for name, r in ratios.items()]


def again(args, *words):
    """The command that runs this program again with the same settings and some more."""
    kept = ("teacher", "student", "detector", "batch_size", "rois", "device", "amp", "seed")
    same = [word for name in kept for word in (f"--{name.replace('_', '-')}", getattr(args, name))]
    same += ["--size", *args.size, "--image", *args.image, *words]
    return ["-m", "tar.bench", *map(str, same)]


def memory(args, machine, rows):
    """Peak memory of each kind of step, GiB: on a GPU what torch allocated, else the resident size of a process that
    does that step alone, three times."""
    peaks = {}
    for name, (_, step) in rows.items():
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        elif machine.world == 1:
            words = ("--parts", "steps", "--rows", name, "--rounds", 2, "--warmup", 1, "--threads", args.threads)
            child = subprocess.Popen([sys.executable, *again(args, *words)], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise UserError(f"the process that measures the memory of {name} failed")
            peaks[name] = usage.ru_maxrss / 2**20
    machine.say("\n" + markdown(["row", "peak memory, GiB"], [[k, f"{v:.2f}"] for k, v in peaks.items()]))
    return peaks


@torch.inference_mode()
def deployment(args, machine, contestants):
    """Parameters, arithmetic, latency and throughput of both detectors in evaluation."""
    figures, batch, repeats = {}, contestants.images, 2 * args.rounds
    for title, model in (("teacher", contestants.teacher), ("student", contestants.step.student)):
        model.eval()
        with machine.autocast():
            with FlopCounterMode(display=False) as counter:
                model(batch[:1])
            one = median(timed(machine, lambda m=model: m(batch[:1])) for _ in range(repeats))
            many = median(timed(machine, lambda m=model: m(batch)) for _ in range(repeats))
        figures[title] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops": counter.get_total_flops(),
            "ms_at_batch_1": 1000 * one,
            "images_per_second": len(batch) / many,
        }
    contestants.step.train()
    lines = [
        [t, f["parameters"] / 1e6, f["flops"] / 1e9, f["ms_at_batch_1"], f["images_per_second"]]
        for t, f in figures.items()
    ]
    header = ["detector", "parameters (M)", "GFLOP an image", "ms at batch 1", f"images/s at batch {len(batch)}"]
    machine.say("\n" + markdown(header, lines))
    return figures


def scaling(args, machine):
    """Images a second of 1 and of 2 processes of one thread each, and what DDP costs the two.

    Returns:
        images_per_second: {processes: {row: of all processes}}; ratios: those of the steps of two.
    """
    rates, ratios = {}, {}
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            words = again(args, "--parts", "steps", "--rounds", args.rounds, "--warmup", args.warmup, "--threads", 1)
            words += ["--rows", PLAIN, TAR] if processes == 1 else []
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            command = [sys.executable, *torchrun, *words, "--json", str(file)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if "rror" in line] or [f"exit code {done.returncode}"]
                raise UserError(f"the run of {processes} processes failed: {said[0].strip()}")
            figures = json.loads(file.read_text())
        rates[processes] = {row: 1000 * processes / median(times) for row, times in figures["steps"].items()}
        ratios = figures["ratios"]
    lines = [[row, rates[1][row], rates[2][row], f"{rates[2][row] / rates[1][row]:.2f}"] for row in (PLAIN, TAR)]
    machine.say("\n" + markdown(["row", "images/s, 1 process", "2 processes", "ratio"], lines))
    rows = ratio_rows({name: ratios[name] for name in ("alone_over_tar", "unused_over_tar")})
    machine.say("\n" + markdown(["ratio, of 2 processes", "median", "min", "max"], rows))
    return {"images_per_second": rates, "ratios": ratios}


if __name__ == "__main__":
    main()
