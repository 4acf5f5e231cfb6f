"""Trains a detector, or distils one from a teacher with task adaptive regularization (arXiv:2006.13108).

    python train.py                                                    the demonstration, nothing needed
    torchrun --nproc_per_node=8 train.py --teacher r101 --student r50 --dataset voc       the paper's

The file reads from top to bottom: which runs there are to do, then one run: data, teacher, student, optimizer, the loop
over epochs and steps, evaluation, saving. What one step computes is in tar/method/step.py.
"""

import math
import time
from pathlib import Path

import torch

from tar import UserError
from tar.data.check_data import check_data, describe
from tar.data.datasets import load_dataset
from tar.data.loader import make_loader, to_device, train_batches
from tar.detectors.build import build_detector
from tar.evaluation.cost import cost_of_distillation, latency
from tar.evaluation.detect import evaluate
from tar.evaluation.markdown import cell, figures_table
from tar.method.step import DistillationStep
from tar.tables.run_table import run_table
from tar.training import checkpoint, flags, run_folder
from tar.training.failure import program
from tar.training.guard import Done, Guard, diverged
from tar.training.initial_weights import check_student, read_teacher, start_from
from tar.training.optimizer import build_optimizer, learning_rate
from tar.training.process import set_up
from tar.training.run import Run, RunState, restore
from tar.training.run_folder import changed, read_json, run_name, settings_of, teacher_of
from tar.training.stop_signals import StopSignals

SOURCES = {}  # {data set and its flags: (training source, test source)}
ASK_EVERY = 10  # steps between the times that processes ask one another whether one was told to stop
TIMED = 24  # batches on which the cost of a distillation is measured


def main(argv=None):
    args = flags.parse(argv)
    with program("train.py"):
        process = set_up(args.device, args.amp, args.threads, args.deterministic)
        with StopSignals() as process.signals:
            if args.check_data:
                check_sources(args, process)
            elif args.table or not args.student:  # a table of the paper, or the demonstration
                run_table(args, process, train_with_teacher)
            else:
                results, folder = train_with_teacher(args, process)
                process.say("\n" + figures_table(results))
                process.say(f"\nRun: {folder}. Next: python eval.py --weights {folder / 'last.pth'}")


def train_with_teacher(args, process, parent=None, name=None, title=None):
    """One student, plain or distilled; its teacher first, where the flags name one that is not trained yet.

    parent: folder of the runs; default that of --output, or runs/. name: of the run's folder; default --output's, or
    one made of the settings. title: what the run is called while it trains; default its models.
    Returns {title: result.json's dict} of the teacher, if it was trained here, and the student; the student's folder.
    """
    results = {}
    if parent is None:
        parent, name = (Path(args.output).parent, Path(args.output).name) if args.output else (Path("runs"), name)
    data = data_of(args, process)
    if args.teacher and not args.teacher_weights:
        if args.backbone_weights not in ("imagenet", "none") and not Path(args.backbone_weights).is_dir():
            remedy = f"first train.py --student {args.teacher} --backbone-weights FILE, then --teacher-weights"
            raise UserError(f"--backbone-weights {args.backbone_weights} fits the student only: {remedy}")
        teacher_args = teacher_of(args)
        teacher_args.output = parent / run_name(teacher_args, process)
        if not (teacher_args.output / "result.json").is_file():
            process.main_first(check_student, args)
        process.say(f"Teacher {args.teacher}: {teacher_args.output}")
        results[f"teacher {args.teacher}"] = train(teacher_args, data, process, f"teacher {args.teacher}")
        args = changed(args, teacher_weights=teacher_args.output / "last.pth")
    folder = parent / (name or run_name(args, process))
    title_of_models = f"TAR {args.student} from {args.teacher}" if args.teacher else f"plain {args.student}"
    results[title_of_models] = train(changed(args, output=folder), data, process, title or title_of_models)
    return results, folder


def data_of(args, process):
    """The training and the test source of the flags; the runs of a table read them once."""
    names = ("data_path", "limit_train", "limit_test", "split", "keep_empty", "exif")
    given = {name: getattr(args, name) for name in names}
    given |= {"seed": args.seed if args.dataset == "shapes" else 0, "download": args.download and process.main}
    given |= {"years": args.voc_years, "files": [getattr(args, name) for name in flags.COCO_FILES]}
    key = (args.dataset, repr(given))
    if key not in SOURCES:
        SOURCES.clear()
        SOURCES[key] = process.main_first(load_dataset, args.dataset, **given)
        describe(SOURCES[key], process)
    return SOURCES[key]


def check_sources(args, process):
    """--check-data: a summary of both sets, and an error if some images cannot be used."""
    sets = zip(("training set", f"{args.split} set"), data_of(args, process), strict=True)
    broken = sum(check_data(source, title, process, args.workers) for title, source in sets)
    if broken:
        raise UserError(f"{broken} images cannot be used; replace them or take them off the lists")
    process.say("\nEvery image can be used.")


def train(args, data, process, title):
    """One run, from the flags to result.json; goes on where an earlier one stopped, returns at once if it had ended.

    args: flags with student and output set; with teacher, also teacher_weights. data: the training and the test source.
    title: what the run is called in what is printed. Returns what result.json holds.
    """
    output, settings = Path(args.output), settings_of(args, process)
    result = process.shared(process.on_main(run_folder.finished_result, output, settings))
    if result:
        process.say(f"{title}: {output} has ended, AP {cell(result['AP'])}")
        return result
    run = prepare(args, data, process, title, output, settings)
    for epoch in range(run.state.epoch, args.epochs):
        rate = train_epoch(run, epoch)
        shown = ""
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            metrics = evaluate_and_save(run, epoch)
            figures = [name for name in ("AP", "AP50", "voc07") if metrics.get(name) is not None]
            shown = "".join(f"  {name} {metrics[name]:.1f}" for name in figures)
        run.state.batch = 0
        shown += f"  {rate:.0f} images/s" if rate else ""  # nothing was left to train of an epoch that was resumed
        process.say(f"{title} {epoch + 1}/{args.epochs}  loss {run.state.loss:.3f}{shown}")
    return finish(run)


def prepare(args, data, process, title, output, settings):
    """Builds a run's student, teacher and optimizer, puts back what an earlier process saved, and opens its folder."""
    train_set, saved = data[0], process.main_first(run_folder.checkpoint_to_resume, output, settings, process.say)
    if len(set(process.gathered(saved and (saved["epoch"], saved["batch"])))) > 1:
        raise UserError(f"{output}: not the same for all processes; it must be on a disk that all machines share")
    student, teacher, build = make_models(args, data, process, saved)
    distillation = flags.distillation_settings(args) if teacher else None
    module = DistillationStep(student, distillation, teacher.backbone.out_channels if teacher else None)
    process.place(module).train()
    if args.sync_bn:
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)

    optimizer = build_optimizer(args, module, learning_rate_of(args, process))
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.amp == "fp16")
    state = restore(saved, module, optimizer, scaler, process.device) if saved else RunState()
    guard = Guard(module, optimizer, scaler, process.device, state.bad_steps, state.streak)
    about = {"build": build, "classes": list(train_set.classes), "settings": settings}
    order = {"rank": process.rank, "world": process.world, "wide": train_set.wide}
    steps_per_epoch = len(train_batches(len(train_set), args.batch_size, 0, 0, **order))
    total_steps = args.epochs * steps_per_epoch
    end_step = math.ceil(args.decay_end * total_steps) if teacher else 0
    first_step = state.epoch * steps_per_epoch + state.batch
    if saved:
        process.say(f"{title}: going on after step {first_step} of {total_steps}, from {output}")
    process.on_main(run_folder.begin_run, output, settings, first_step, measured=state.batch == 0)
    given, trained = (args, process, title, output, about, *data), (teacher, module, optimizer, scaler, guard, state)
    return Run(*given, *trained, order, steps_per_epoch, total_steps, end_step)


def train_epoch(run, epoch):
    """Trains what is left of an epoch. Returns images per second, as last logged."""
    args, process, state, guard, module = run.args, run.process, run.state, run.guard, run.module
    state.epoch = epoch
    batches = train_batches(len(run.train_set), args.batch_size, args.seed, epoch, **run.order)[state.batch :]
    loader = make_loader(run.train_set, True, batches, args.seed, args.workers, process.device.type == "cuda")
    process.signals.patient = True  # a step that is told to stop is finished, and saved
    for i, (images, targets) in enumerate(run.progress.epoch(loader, epoch + 1, state.batch), state.batch + 1):
        started = time.perf_counter()
        step = epoch * run.steps_per_epoch + i - 1
        run.seed_regions(step)
        lr = learning_rate(step, run.total_steps, learning_rate_of(args, process), args.warmup, args.schedule)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        weight = run.lambda_(step)
        if run.distils and weight == 0:
            run.end_distillation()

        keys = [(epoch, target["image_id"]) for target in targets]
        images, targets = to_device(images, targets, process.device)
        with process.autocast():
            detection, losses, seen = run.wrapped(images, targets, run.teacher if weight > 0 else None)
        loss = sum(detection.values())
        if losses:  # L = L_det + lambda(t) * (a L_backbone + b L_cls + g L_reg)
            loss = loss + weight * sum(w * losses[name] for name, w in module.settings.weights().items())
        run.optimizer.zero_grad()
        run.scaler.scale(guard.poisoned(loss)).backward()
        bad, norm = guard.step(loss, args.clip_grad)

        terms = {k: v.detach() for k, v in {"loss": loss, **detection, **losses, **seen}.items()}
        state.add(terms)
        run.history.append(Done(bad, step + 1, keys, terms, norm))
        logs = i % args.log_every == 0 or i == run.steps_per_epoch  # the only place that waits for the device
        if (logs or process.device.type == "cpu") and guard.longest >= args.max_bad_steps:
            raise diverged(run)
        if logs:
            means, rate = state.take_means(process), run.progress.rate_until(i)
            line = {"epoch": epoch + 1, "step": step + 1, "lr": lr, "decay": weight, "images_per_second": rate}
            run.log({**line, **means, "bad_steps": int(guard.total)})
            run.progress.show(epoch + 1, step + 1, means, rate)
        state.seconds += time.perf_counter() - started
        state.batch = i
        run.progress.announce(i)
        if i % args.save_every == 0 or i == run.steps_per_epoch:
            run.save()
        asks = process.world == 1 or i % ASK_EVERY == 0 or i == run.steps_per_epoch
        if asks and process.any_process(process.signals.received is not None):
            run.save()
            raise process.signals.stopped(f"{run.title}: stopped after step {step + 1} of {run.total_steps}")
    process.signals.patient = False
    return run.progress.rate


def evaluate_and_save(run, epoch):
    """The figures after an epoch, logged and saved."""
    run.process.share_buffers(run.module.student)
    run.state.metrics = metrics = measure(run.module.student, run.args, run.test_set, run.process)
    step = (epoch + 1) * run.steps_per_epoch
    run.log({"epoch": epoch + 1, "step": step, "seconds": run.state.seconds, "metrics": metrics})
    run.state.epoch, run.state.batch = epoch + 1, 0
    run.save()
    return metrics


def finish(run):
    """Measures what the run cost and how fast its student is, and writes result.json."""
    args, process, student = run.args, run.process, run.module.student
    ms_per_image, cost = latency(student, run.test_set, process.device, process.autocast()), 1.0  # cost: in plain runs
    if run.teacher:
        batches = train_batches(len(run.train_set), args.batch_size, args.seed, 0, **run.order)[:TIMED]
        loader = make_loader(run.train_set, True, batches, args.seed)
        more = cost_of_distillation(run.module, run.teacher, loader, run.optimizer, process) - 1
        cost += more * run.end_step / run.total_steps
    flags_shown = {name: getattr(args, name) for name in ("dataset", "detector", "split", "epochs")}
    result = {**run.state.metrics, **flags_shown, "test_images": len(run.test_set), "train_images": len(run.train_set)}
    result |= {"seconds": run.state.seconds, "cost": cost, "parameters": sum(p.numel() for p in student.parameters())}
    result |= {"ms_per_image": ms_per_image, "environment": process.about()}
    process.on_main(checkpoint.save_json, run.output / "result.json", result)
    return process.shared(result)  # that of rank 0: times differ


def make_models(args, data, process, saved):
    """Student, teacher or None, and the arguments of build_detector that make the student."""
    if args.sync_bn and process.device.type != "cuda":
        raise UserError("--sync-bn: torch shares batch norm's statistics between GPUs only; leave it out on the CPU")
    classes, fresh = data[0].classes, saved is None
    build = flags.build_of(args, args.student, len(classes))
    torch.manual_seed(args.seed)  # every process starts from the same weights
    student = process.main_first(build_detector, **build if fresh else {**build, "backbone_weights": "none"})
    if fresh and args.student_weights:
        process.main_first(start_from, student, args.student_weights, build, classes)
    teacher = load_teacher(args, data, process) if args.teacher else None
    return student, teacher, build


def load_teacher(args, data, process):
    """The frozen teacher of a run on its device, after a line that says how good it is."""
    path = Path(args.teacher_weights)
    teacher, saved = process.main_first(read_teacher, args, data[0].classes)
    process.place(teacher.requires_grad_(False))
    process.freeze(teacher)
    size = [saved["build"]["min_size"], saved["build"]["max_size"]]
    if size != args.size:
        process.say(f"Note: the teacher was trained on images of {size} pixels, and will see {args.size} here.")
    same = ("dataset", "data_path", "voc_years", "val_json", "val_images", "split", "limit_test", "epochs", "exif")
    measured = path.parent / "result.json"
    now = settings_of(changed(args, epochs=saved.get("epoch")), process)
    known = path.name == "last.pth" and all(saved["settings"].get(k) == now.get(k) for k in same)
    result = process.shared(read_json(measured) if known and process.main and measured.is_file() else None)
    where = f"as measured in {measured}" if result else "measured now"
    ap = (result or measure(teacher, args, data[1], process))["AP"]
    process.say(f"Teacher {args.teacher_weights}: AP {cell(ap)} on the {args.split} split, {where}")
    return teacher


def measure(model, args, test_set, process):
    """The figures of a model on the test split, all processes sharing the images."""
    loading = args.batch_size, args.workers, process.progress("evaluating")
    with process.autocast():
        return evaluate(model, test_set, process.device, args.dataset == "voc", *loading, process.control)


def learning_rate_of(args, process):
    """The learning rate after the warm-up: --lr is that of 16 images a step."""
    return args.lr * (args.batch_size * process.world) / 16


if __name__ == "__main__":
    main()
