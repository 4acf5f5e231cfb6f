"""Evaluates a checkpoint of train.py on its data set, or prints a table of runs.

python eval.py --weights runs/demo/tar/last.pth [--json FILE]
python eval.py --table voc [--results runs]
"""

import argparse
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

from tar import UserError, checkpoint, fail
from tar.data import load_test_set
from tar.evaluation import evaluate
from tar.machine import set_up
from tar.options import COCO_FILES, TABLES
from tar.runs import read_json
from tar.tables import class_table, markdown, table_text


def parser():
    """The command line of eval.py; what is not given is taken from the checkpoint's own settings."""
    p = argparse.ArgumentParser(
        description="Evaluate a checkpoint of train.py: AP, AP50, AP75 and, for voc, VOC's mAP."
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="FILE", help="checkpoint, the last.pth of a run")
    what.add_argument("--table", choices=("demo", *TABLES), help="print a table that train.py --table has run")
    p.add_argument("--results", default="runs", metavar="DIR", help="folder of the table's runs (default: runs)")
    p.add_argument("--data-path", metavar="DIR", help="folder of the data (default: as in training)")
    p.add_argument("--split", choices=("test", "val"), help="what to measure on (default: as in training)")
    for part, kind in (("JSON", "FILE"), ("images", "DIR")):
        text = f"coco: {part} to test on (default: as in training)"
        p.add_argument(f"--val-{part.lower()}", metavar=kind, help=text)
    p.add_argument("--limit-test", type=int, metavar="N", help="test images; 0: all (default: as in training)")
    p.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: as in training)")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default: 1)")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "none"), help="precision (default: as in training)")
    p.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda; auto: cuda where there is one")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: torch's choice")
    p.add_argument("--json", metavar="FILE", help="write the figures there too")
    return p


def main(argv=None):
    given = parser().parse_args(argv)
    try:
        if given.table:
            return print_tables(given.table, Path(given.results))
        model, saved = checkpoint.load_detector(given.weights)
        flags = {k: v for k, v in vars(given).items() if v is not None}
        args = Namespace(**{"data_path": "data", "voc_years": ["2007"], "split": "test", **saved["settings"], **flags})
        if args.dataset == "coco" and args.split == "val":
            raise UserError("--split val: COCO has one split to test on; give --val-json and --val-images")
        machine = set_up(args.device, args.amp, args.threads)
        if given.json and not Path(given.json).resolve().parent.is_dir():
            raise UserError(f"--json {given.json}: there is no such folder")
        files = [getattr(args, name, None) for name in COCO_FILES]
        where = {"data_path": args.data_path, "years": args.voc_years, "files": files}
        where |= {"limit": args.limit_test, "split": args.split}
        test_set = load_test_set(args.dataset, saved["classes"], **where)
        with machine.autocast():
            voc, progress = args.dataset == "voc", machine.progress("evaluating")
            metrics = evaluate(
                model.to(machine.device, memory_format=torch.channels_last),
                test_set,
                machine.device,
                voc,
                args.batch_size,
                args.workers,
                progress,
            )
        per_class = metrics.pop("per_class")
        machine.say(f"{given.weights}: {len(test_set)} {args.split} images of {args.dataset}, {machine.amp} autocast\n")
        machine.say(markdown(["figure", "percent"], [[k, v] for k, v in metrics.items()]))
        machine.say("\n" + class_table(per_class))
        if given.json and machine.main:
            about = {
                "weights": given.weights,
                "dataset": args.dataset,
                "split": args.split,
                "test_images": len(test_set),
            }
            checkpoint.save_json(given.json, {**about, **metrics, "per_class": per_class})
    except UserError as error:
        fail("eval.py", error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def print_tables(name, folder):
    """Prints what train.py --table has noted in a folder, and the results that are there."""
    found = sorted(folder.glob(f"table-{name}-*.json")) or sorted((folder / name).glob(f"table-{name}-*.json"))
    if not found:
        raise UserError(f"{folder}: no table-{name}-*.json; run train.py --table {name} first, or give --results DIR")
    for file in found:
        print(table_text(read_json(file), file.parent) + "\n")


if __name__ == "__main__":
    main()
