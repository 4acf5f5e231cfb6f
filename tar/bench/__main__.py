"""How long a TAR step takes, beside torchvision's stock step, a lower bound and a naive distillation.

    python -m tar.bench --teacher r101 --student r50 --size 600 1000 --batch-size 2 --json bench.json

The kinds of step take turns, so that other load on the machine meets all kinds. A ratio is of two
steps of the same round; the figure is its median over the rounds.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from tar import UserError, fail
from tar.bench.kinds_of_step import FLOOR, PLAIN, ROWS, STOCK, TAR, KindsOfStep, resident_peak
from tar.detectors.backbones import BACKBONES
from tar.detectors.build import DETECTORS
from tar.evaluation.markdown import markdown
from tar.training import checkpoint
from tar.training.parser import Parser, count, positive
from tar.training.process import TYPES, set_up

PARTS = ("steps", "flops", "memory")
RATIOS = [(TAR, STOCK), (PLAIN, STOCK), (TAR, PLAIN), (TAR, FLOOR)]
RATIOS += [("naive", TAR), ("naive equal", TAR), ("terms", TAR), ("adapters", TAR)]


def parser():
    p = Parser(prog="python -m tar.bench", description=__doc__.split("\n")[0])
    resnets = [name for name in BACKBONES if name.startswith("r") and name != "r10"]
    p.add_argument("--teacher", choices=resnets, default="r101", help="backbone (default: r101)")
    p.add_argument("--student", choices=resnets, default="r50", help="backbone (default: r50)")
    p.add_argument("--detector", choices=DETECTORS, default=DETECTORS[0], help=f"default: {DETECTORS[0]}")
    p.add_argument("--size", type=positive, nargs=2, default=[600, 1000], help="shorter side, longest side; pixels")
    p.add_argument("--image", type=positive, nargs=2, default=[375, 500], help="height, width before resizing; pixels")
    p.add_argument("--batch-size", type=positive, default=2, metavar="N", help="images a step (default: 2)")
    p.add_argument("--rois", type=positive, default=512, metavar="N", help="regions an image (default: 512)")
    p.add_argument("--rounds", type=positive, default=5, metavar="N", help="steps of each kind (default: 5)")
    p.add_argument("--warmup", type=count, default=2, metavar="N", help="rounds before the first counts (default: 2)")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help="kinds of step (default: all)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    p.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "none"), default="auto", help="default: auto")
    p.add_argument("--threads", type=count, default=0, metavar="N", help="CPU threads; 0: torch's choice")
    p.add_argument("--seed", type=count, default=0, metavar="N", help="of weights, images and regions")
    p.add_argument("--json", metavar="FILE", help="write the figures there too")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    try:
        figures = run(args, set_up(args.device, args.amp, args.threads))
        if args.json:
            checkpoint.save_json(args.json, figures)
    except UserError as error:
        fail("tar.bench", error)


def run(args, process):
    """Measures and prints the chosen parts. Returns what --json holds."""
    names = ("teacher", "student", "detector", "size", "image", "batch_size", "rois", "rounds")
    about = process.about() | {name: getattr(args, name) for name in names}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows, figures = KindsOfStep(args, process).rows(), {"about": about}
    rows = {name: row for name, row in rows.items() if name in args.rows}
    if "steps" in args.parts:
        figures |= steps(args, process, rows)
    if "flops" in args.parts:
        figures["flops"] = flops(args, rows)
        figures |= shares_of_peak(figures["flops"], figures, process) if "steps" in args.parts else {}
    if "memory" in args.parts:
        figures["memory"] = memory(args, process, rows)
    print("\n" + rows_table(rows, figures))
    if "steps" in args.parts:
        ratios = [[name, *(f"{r[k]:.3f}" for k in ("median", "min", "max"))] for name, r in figures["ratios"].items()]
        print("\n" + markdown(["ratio", "median", "min", "max"], ratios))
    return figures


def timed(process, call):
    """Seconds of a call, to the end of what it gave a GPU to do."""
    process.wait()
    started = time.perf_counter()
    call()
    process.wait()
    return time.perf_counter() - started


def steps(args, process, rows):
    """Rounds of one step of each kind: steps, {row: ms an image of each round}; ratios, {name: {median, min, max}}."""
    seconds = {name: [] for name in rows}
    for number in range(-args.warmup, args.rounds):
        for name, (_, step) in rows.items():
            torch.manual_seed(args.seed + 1000 + number)  # all kinds sample the same regions
            seconds[name].append(timed(process, step))
    seconds = {name: of_row[args.warmup :] for name, of_row in seconds.items()}
    ratios, pairs = {}, dict.fromkeys([*RATIOS, *((row, STOCK) for row in rows if row != STOCK)])
    for one, other in (pair for pair in pairs if rows.keys() >= set(pair)):
        each, name = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)], ratio_name(one, other)
        ratios[name] = {"median": median(each), "min": min(each), "max": max(each)}
    per_image = {name: [1000 * s / args.batch_size for s in row] for name, row in seconds.items()}
    return {"steps": per_image, "ratios": ratios}


def ratio_name(one, other):
    return f"{one}_over_{other}".replace(" ", "_")


def flops(args, rows):
    """FLOP an image of each kind of step: convolutions and matrix products, two a multiply-add."""
    counted = {}
    for name, (_, step) in rows.items():
        torch.manual_seed(args.seed + 1000)
        with FlopCounterMode(display=False) as counter:
            step()
        counted[name] = counter.get_total_flops() / args.batch_size
    return counted


def shares_of_peak(counted, figures, process):
    """What part of the speed of a large matrix product of its type each kind of step reaches: {row: 0 to 1}.

    On a GPU float32 is multiplied as TF32 there, as convolutions are.
    """
    n, peak, shares = 8192 if process.device.type == "cuda" else 2048, {}, {}
    for name, times in figures["steps"].items():
        kind = "none" if name in (STOCK, "naive") else process.amp
        if kind not in peak:
            a = torch.randn(n, n, device=process.device, dtype=TYPES.get(kind, torch.float32))
            peak[kind] = 2 * n**3 / min(timed(process, lambda a=a: a @ a) for _ in range(7))
        shares[name] = counted[name] / (median(times) / 1000) / peak[kind]
    return {"peak": peak, "of_peak": shares}


def memory(args, process, rows):
    """Peak memory of each kind of step, GiB: allocated on the GPU; on a CPU that of a process with this step alone."""
    peaks = {}
    for name, (_, step) in rows.items():
        if process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peaks[name] = pool.submit(resident_peak, args, name).result()
    return peaks


def rows_table(rows, figures):
    """All figures of the rows as Markdown."""
    lines = []
    for name, (what, _) in rows.items():
        line = {"row": name, "what": what}
        if "steps" in figures:
            times, ratio = figures["steps"][name], figures["ratios"].get(ratio_name(name, STOCK))
            line["ms an image"] = f"{median(times):.0f} ({min(times):.0f} to {max(times):.0f})"
            line["of stock"] = ratio and f"{ratio['median']:.2f}"
        if "flops" in figures:
            line["GFLOP an image"] = f"{figures['flops'][name] / 1e9:.0f}"
        if "of_peak" in figures:
            line["of peak"] = f"{100 * figures['of_peak'][name]:.0f}%"
        if "memory" in figures:
            line["peak memory, GiB"] = f"{figures['memory'][name]:.2f}"
        lines.append(line)
    return markdown(list(lines[0]), [list(line.values()) for line in lines])


if __name__ == "__main__":
    main()
