"""Trains a detector, or distils one from a teacher with task adaptive regularization (arXiv:2006.13108).

    python train.py                                                    the demonstration, nothing needed
    torchrun --nproc_per_node=8 train.py --teacher r101 --student r50 --dataset voc       the paper's

The file reads from top to bottom: which runs there are to do, then one run: build, wrap in DDP, loop, save.
"""

import math
import os
import shutil
import time
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist

from tar import UserError, checkpoint, fail, options
from tar.check import check, report
from tar.data import load_dataset, make_loader, to_device, train_batches
from tar.distill import Step
from tar.evaluation import cost_of_distillation, evaluate, latency
from tar.faults import Done, Guard, Stopped, StopSignals, diverged, gradient_norms, out_of_memory
from tar.machine import set_up
from tar.models import build_detector
from tar.progress import Progress
from tar.runs import append_line, begin_run, changed, find_run, read_json, run_name, settings_of, teacher_of
from tar.schedule import decay, learning_rate
from tar.tables import run_table
from tar.tabulation import cell, figures_table
from tar.teacher import inherit, read_teacher, start_from


def main(argv=None):
    args = options.parse(argv)
    try:
        machine = set_up(args.device, args.amp, args.threads, args.deterministic)
        with StopSignals() as machine.signals:
            if args.check_data:
                check_data(args, machine)
            elif args.table or not args.student:  # a table of the paper, or the demonstration
                run_table(args, machine, distil)
            else:
                results, folder = distil(args, machine)
                machine.say("\n" + figures_table(results))
                machine.say(f"\nRun: {folder}. Next: python eval.py --weights {folder / 'last.pth'}")
    except (UserError, Stopped) as error:
        fail("train.py", error)
    except torch.OutOfMemoryError as error:
        fail("train.py", out_of_memory(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def distil(args, machine, parent=None, name=None, title=None):
    """One student, and its teacher first where it has none yet.

    Args:
        parent: folder of the runs; default that of --output, or runs/.
        name: of the run's folder; default --output's, or one made of the settings.
        title: what the run is called while it trains; default its models.

    Returns:
        {title: result.json's dict} of the teacher, if it was trained here, and the student; the student's folder.
    """
    results = {}
    if parent is None:
        parent, name = (Path(args.output).parent, Path(args.output).name) if args.output else (Path("runs"), name)
    data = data_of(args, machine)
    if args.teacher and not args.teacher_weights:
        if args.backbone_weights not in ("imagenet", "none"):
            raise UserError(
                f"--backbone-weights {args.backbone_weights} fits the student only: train the teacher first "
                f"(train.py --student {args.teacher} --backbone-weights FILE) and give --teacher-weights"
            )
        teacher_args = teacher_of(args)
        teacher_args.output = parent / run_name(teacher_args, machine)
        machine.say(f"Teacher {args.teacher}: {teacher_args.output}")
        results[f"teacher {args.teacher}"] = train(teacher_args, data, machine, f"teacher {args.teacher}")
        args = changed(args, teacher_weights=teacher_args.output / "last.pth")
    folder = parent / (name or run_name(args, machine))
    results[title_of(args)] = train(changed(args, output=folder), data, machine, title or title_of(args))
    return results, folder


def data_of(args, machine):
    """The training and the test source of the flags; read once for all runs of a table."""
    given = {name: getattr(args, name) for name in ("limit_train", "limit_test", "split", "keep_empty")}
    given |= {"seed": args.seed if args.dataset == "shapes" else 0, "download": args.download and machine.main}
    given |= {"data_path": args.data_path, "years": args.voc_years}
    given["files"] = [getattr(args, name) for name in options.COCO_FILES]
    key = (args.dataset, repr(given))
    if key not in _sources:
        _sources.clear()
        _sources[key] = machine.in_turn(load_dataset, args.dataset, **given)
        report(_sources[key], machine)
    return _sources[key]


_sources = {}
TIMED = 24  # batches on which the cost of a distillation is measured


def check_data(args, machine):
    """--check-data: a summary of both sets, and an error if some images cannot be used."""
    sets = zip(("training set", f"{args.split} set"), data_of(args, machine), strict=True)
    broken = sum(check(source, title, machine, args.workers) for title, source in sets)
    if broken:
        text = f"{broken} images of {args.data_path} cannot be used; replace them or take them off the lists"
        raise UserError(text).for_all()
    machine.say("\nEvery image can be used.")


def region_seed(seed, step, machine):
    """The seed of a step's region sampling in this process."""
    return (seed * 1_000_003 + step) * machine.world + machine.rank


def title_of(args):
    return f"TAR {args.student} from {args.teacher}" if args.teacher else f"plain {args.student}"


def train(args, data, machine, title):
    """One run, from the flags to result.json; goes on where an earlier one stopped, returns at once if it had ended.

    Args:
        args: flags with student and output set; with teacher, also teacher_weights.
        data: the training and the test source.
        title: what the run is called in what is printed.

    Returns:
        dict: what result.json holds.
    """
    train_set, test_set = data
    output, settings = Path(args.output), settings_of(args, machine)
    result = machine.in_turn(find_run, output, settings)
    if result:
        machine.say(f"{title}: {output} has ended, AP {cell(result['AP'])}")
        return machine.shared(result)

    saved = machine.in_turn(read_run, output, settings, machine.say)
    build = options.build_of(args, args.student, len(train_set.classes))
    torch.manual_seed(args.seed)  # every process starts from the same weights
    fresh = saved is None
    student = machine.in_turn(build_detector, **build if fresh else {**build, "backbone_weights": "none"})
    if fresh and args.student_weights:
        machine.in_turn(start_from, student, args.student_weights, build, train_set.classes)
    if args.sync_bn and machine.device.type != "cuda":
        raise UserError(
            "--sync-bn: torch shares batch norm's statistics between GPUs only; leave it out on the CPU"
        ).for_all()
    levels = options.levels_of(args) if args.teacher else None
    heir = student if fresh and args.inherit else None
    teacher = load_teacher(args, data, machine, heir) if args.teacher else None
    step_module = Step(student, levels, teacher.backbone.out_channels if teacher else None)
    machine.place(step_module).train()
    if args.sync_bn:
        step_module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(step_module)
    if args.compile:
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise UserError("--compile: torch.compile needs a C++ compiler; install g++, or leave it out").for_all()
        for model in (student, teacher) if teacher else (student,):
            model.backbone.compile()

    parameters = [p for p in step_module.parameters() if p.requires_grad]
    images_per_step = args.batch_size * machine.world
    base_lr = args.lr * images_per_step / 16
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, base_lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    else:
        optimizer = torch.optim.AdamW(parameters, base_lr, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp == "fp16")
    at = {"epoch": 0, "batch": 0, "seconds": 0.0, "metrics": {}}  # where the run is
    at |= {"sums": {}, "counts": {}, "loss": math.nan, "bad_steps": 0, "streak": 0}  # and what is logged next
    if saved:
        student.load_state_dict(saved["model"])
        step_module.adapters.load_state_dict(saved["adapters"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        at = {name: saved[name] for name in at}
        at["sums"] = {name: value.to(machine.device) for name, value in at["sums"].items()}
    guard = Guard(step_module, optimizer, scaler, machine.device)
    guard.total += at["bad_steps"]
    guard.streak += at["streak"]
    wrapped = machine.parallel(step_module)
    distilled = True  # until the decay's end
    where = {"rank": machine.rank, "world": machine.world, "wide": getattr(train_set, "wide", None)}
    steps_per_epoch = len(train_batches(len(train_set), args.batch_size, 0, 0, **where))
    total_steps = args.epochs * steps_per_epoch
    distilled_steps = math.ceil(args.decay_end * total_steps) if args.teacher else 0
    done = at["epoch"] * steps_per_epoch + at["batch"]
    if saved:
        machine.say(f"{title}: going on after step {done} of {total_steps}, from {output}")
    if len(set(machine.gathered(done))) > 1:
        text = "is not the same for all processes; it must be on a disk that all machines share"
        raise UserError(f"{output}: {text}").for_all()
    machine.alone(begin_run, output, settings, done, measured=at["batch"] == 0)

    progress = Progress(machine, title, args.epochs, total_steps, images_per_step)

    def save():
        at["bad_steps"], at["streak"] = int(guard.total), int(guard.streak)
        at["sums"] = {name: machine.average(value.float()) for name, value in at["sums"].items()}
        state = {"build": build, "classes": list(train_set.classes), "settings": settings, **at}
        state |= {"model": student.state_dict(), "adapters": step_module.adapters.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        machine.alone(checkpoint.save, output / "last.pth", state)

    def stop_if_told(step):
        if machine.any(machine.signals.received is not None):
            save()
            raise machine.signals.stopped(f"{title}: stopped after step {step} of {total_steps}")

    # On a GPU a streak of bad steps is seen at the next line of the log; the step before it is kept until then.
    history = deque(maxlen=args.log_every + args.max_bad_steps + 1)

    def norms_of(done):
        keys = [done.keys]
        batch = next(iter(make_loader(train_set, True, keys, args.seed)))
        torch.manual_seed(region_seed(args.seed, done.step - 1, machine))
        at_decay = decay(done.step - 1, distilled_steps, args.decay) if done.step <= distilled_steps else 0.0
        weights = {name: at_decay * w for name, w in levels.weights().items()} if at_decay else {}
        batch = to_device(*batch, machine.device)
        return gradient_norms(step_module, batch, teacher if at_decay else None, weights, machine)

    for epoch in range(at["epoch"], args.epochs):
        batches = train_batches(len(train_set), args.batch_size, args.seed, epoch, **where)
        at["epoch"], begin = epoch, at["batch"]
        loader = make_loader(train_set, True, batches[begin:], args.seed, args.workers, machine.device.type == "cuda")
        machine.signals.patient = True  # a step is finished, and saved
        since_log, logged, rate = time.perf_counter(), begin, 0.0
        for i, (images, targets) in enumerate(progress.epoch(loader, epoch + 1), begin + 1):
            started = time.perf_counter()  # `seconds` leaves the loader out: the runs of a table wait for it unequally
            step = epoch * steps_per_epoch + i - 1
            # Region sampling draws from a generator seeded by the step: a resumed run needs no generator's state.
            torch.manual_seed(region_seed(args.seed, step, machine))
            lr = learning_rate(step, total_steps, base_lr, args.warmup, args.schedule)
            weight = decay(step, distilled_steps, args.decay) if step < distilled_steps else 0.0  # README, Decay
            if args.teacher and weight == 0 and distilled:  # from here on nothing of the teacher is computed
                distilled = False
                step_module.adapters.requires_grad_(False)
                wrapped = machine.parallel(step_module)
            for group in optimizer.param_groups:
                group["lr"] = lr
            keys = [(epoch, target["image_id"]) for target in targets]
            images, targets = to_device(images, targets, machine.device)
            with machine.autocast():
                detection, distillation, seen = wrapped(images, targets, teacher if weight > 0 else None)
            loss = sum(detection.values())
            if distillation:
                loss = loss + weight * sum(w * distillation[name] for name, w in levels.weights().items())
            optimizer.zero_grad()
            scaler.scale(guard.poisoned(loss)).backward()
            bad, norm = guard.step(loss, args.clip_grad)

            terms = {"loss": loss, **detection, **distillation, **seen}
            terms = {name: value.detach() for name, value in terms.items()}
            history.append(Done(bad, step + 1, keys, terms, norm))
            for name, value in terms.items():
                at["sums"][name] = at["sums"].get(name, 0) + value
                at["counts"][name] = at["counts"].get(name, 0) + 1
            logs = i % args.log_every == 0 or i == steps_per_epoch  # the only place that waits for the device
            if (logs or machine.device.type == "cpu") and guard.longest >= args.max_bad_steps:
                raise diverged(list(history), train_set, norms_of, output, machine)
            if logs:
                means = means_of(at["sums"], at["counts"], machine)
                now = time.perf_counter()
                rate = (i - logged) * images_per_step / (now - since_log)
                line = {"epoch": epoch + 1, "step": step + 1, "lr": lr, "decay": weight, "images_per_second": rate}
                record(output, {**line, **means, "bad_steps": int(guard.total)}, machine)
                progress.show(epoch + 1, step + 1, means, rate)
                at |= {"sums": {}, "counts": {}, "loss": means["loss"]}
                since_log, logged = now, i
            at["seconds"] += time.perf_counter() - started
            at["batch"] = i
            if i % args.save_every == 0 or i == steps_per_epoch:
                save()
            stop_if_told(step + 1)
        machine.signals.patient = False

        step, shown = (epoch + 1) * steps_per_epoch - 1, ""
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            if machine.world > 1:  # each process kept batch-norm statistics of its own images: rank 0's count
                for buffer in student.buffers():
                    dist.broadcast(buffer, 0)
            at["metrics"] = metrics = measure(student, args, test_set, machine)
            shown = "".join(
                f"  {name} {metrics[name]:.1f}" for name in ("AP", "AP50", "voc07") if metrics.get(name) is not None
            )
            line = {"epoch": epoch + 1, "step": step + 1, "seconds": at["seconds"], "metrics": metrics}
            record(output, line, machine)
            at["epoch"], at["batch"] = epoch + 1, 0
            save()
        at["batch"] = 0
        shown += f"  {rate:.0f} images/s" if rate else ""  # nothing was left to train of an epoch that was resumed
        machine.say(f"{title} {epoch + 1}/{args.epochs}  loss {at['loss']:.3f}{shown}")

    ms_per_image, cost = latency(student, test_set, machine.device, machine.autocast()), 1.0
    if args.teacher:
        batches = train_batches(len(train_set), args.batch_size, args.seed, 0, **where)[:TIMED]
        loader = make_loader(train_set, True, batches, args.seed)
        dearer = cost_of_distillation(step_module, teacher, loader, optimizer, machine) - 1
        cost += dearer * distilled_steps / total_steps
    result = {
        **at["metrics"],
        **{name: getattr(args, name) for name in ("dataset", "detector", "split", "epochs")},
        "test_images": len(test_set),
        "train_images": len(train_set),
        "seconds": at["seconds"],
        "cost": cost,
        "parameters": sum(p.numel() for p in student.parameters()),
        "ms_per_image": ms_per_image,
        "environment": machine.about(),
    }
    machine.alone(checkpoint.save_json, output / "result.json", result)
    return machine.shared(result)  # the others wait here


def read_run(output, settings, say):
    """The checkpoint that a run goes on from; None for a new run."""
    saved = checkpoint.load_latest(output, say)
    if saved and saved["settings"] != settings:
        raise UserError(f"{output / 'last.pth'}: of a run of other settings; give another --output, or remove it")
    return saved


def load_teacher(args, data, machine, heir=None):
    """The frozen teacher of a run on its device, after a line that says how good it is.

    Args:
        heir: a student that starts from its pyramid and heads (--inherit).
    """
    path = Path(args.teacher_weights)
    teacher, saved = machine.in_turn(read_teacher, args, data[0].classes)
    if heir is not None:
        machine.say(f"Of the teacher's pyramid and heads {inherit(heir, teacher)} tensors start the student's")
    machine.place(teacher.requires_grad_(False))
    machine.freeze(teacher)
    size = [saved["build"]["min_size"], saved["build"]["max_size"]]
    if size != args.size:
        machine.say(
            f"Note: the teacher was trained on images of {size} pixels, and will see the student's {args.size}."
        )
    same = ("dataset", "data_path", "voc_years", "val_json", "val_images", "split", "limit_test", "epochs")
    measured = path.parent / "result.json"
    now = settings_of(changed(args, epochs=saved.get("epoch")), machine)
    if path.name == "last.pth" and measured.is_file() and all(saved["settings"].get(k) == now.get(k) for k in same):
        ap, where = read_json(measured)["AP"], f"as measured in {measured}"
    else:
        ap, where = measure(teacher, args, data[1], machine)["AP"], "measured now"
    machine.say(f"Teacher {args.teacher_weights}: AP {cell(ap)} on the {args.split} split, {where}")
    return teacher


def measure(model, args, test_set, machine):
    """The figures of a model on the test split, all processes sharing the images."""
    progress = machine.progress("evaluating")
    with machine.autocast():
        return evaluate(model, test_set, machine.device, args.dataset == "voc", args.batch_size, args.workers, progress)


def means_of(sums, counts, machine):
    """The means of some terms over the steps that had them, and over all processes: {name: float}."""
    values = machine.average(torch.stack([sums[name].float() / counts[name] for name in sums]))
    return {name: round(value, 5) for name, value in zip(sums, values.tolist(), strict=True)}


def record(output, line, machine):
    """Adds a line to log.jsonl, once."""
    machine.alone(append_line, output / "log.jsonl", line)


if __name__ == "__main__":
    main()
