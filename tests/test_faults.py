"""Runs that are killed, told to stop, damaged, or fed with numbers that are not finite."""

import copy
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from multiprocessing import get_context

import pytest
import torch
from bad_input import flip
from beside import beside
from fault_injection import COMMON, ROOT, inject, same, weights
from tiny_runs import SMALL, call, command, read_log, read_result
from torch import nn

import train
from tar import UserError, checkpoint
from tar.distill import Levels, Step
from tar.faults import Guard, Stopped, gradient_norms
from tar.images import read_image
from tar.machine import Machine
from tar.models import build_backbone

CPU = torch.device("cpu")


@beside
def taught(folder):
    """A distilled student's flags, and its run without interruption."""
    done = command("train.py", *COMMON, "--student", "r18", "--output", folder / "teacher")
    assert done.returncode == 0, done.stderr
    weights = str(folder / "teacher/last.pth")
    flags = [*COMMON, "--student", "r10", "--teacher", "r18", "--teacher-weights", weights]
    done = command("train.py", *flags, "--output", folder / "alone")
    assert done.returncode == 0, done.stderr
    return Namespace(flags=flags, alone=folder / "alone")


@pytest.fixture
def flags(taught):
    return taught.flags


@pytest.fixture
def alone(taught):
    return taught.alone


def test_deterministic_changes_nothing_on_a_cpu(flags, alone, tmp_path):
    try:
        call(train.main, *flags, "--deterministic", "--output", tmp_path / "run")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(weights(tmp_path / "run"), weights(alone))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_deterministic_run_on_a_gpu_that_is_killed_ends_equal(flags, tmp_path):
    rows = inject(tmp_path, [*flags, "--device", "cuda", "--deterministic"], ["step 5 0"], say=lambda _: None)
    assert [equal for _, _, equal in rows] == [True]


# Checkpoints that are damaged, disks that are full


def interrupted(flags, folder, after):
    """A run's folder as a kill after some steps leaves it."""
    count = 0

    def stop(step, *rest):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return rate(step, *rest)

    rate = train.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            call(train.main, *flags, "--output", folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")], ids=["a bit", "cut", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(flags, alone, tmp_path, capsys, damage):
    run = tmp_path / "run"
    interrupted(flags, run, 9)
    assert [checkpoint.load(run / name)["batch"] for name in ("last.pth", "previous.pth")] == [4, 3]
    damage(run / "last.pth")
    with pytest.raises(UserError, match=str(run / "last.pth")):
        checkpoint.load(run / "last.pth")
    call(train.main, *flags, "--output", run)
    out = capsys.readouterr().out
    assert f"going on from {run / 'previous.pth'}" in out and "after step 7 of 12" in out
    assert same(weights(run), weights(alone))


def test_two_damaged_checkpoints_are_said_in_a_line_and_kept(flags, tmp_path, capsys):
    run = tmp_path / "run"
    interrupted(flags, run, 9)
    for name in ("last.pth", "previous.pth"):
        cut(run / name)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        call(train.main, *flags, "--output", run)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_full_disk_loses_no_earlier_checkpoint(flags, alone, tmp_path, capsys):
    run = tmp_path / "run"
    interrupted(flags, run, 9)
    before = {name: (run / name).read_bytes() for name in ("last.pth", "previous.pth")}
    (run / "last.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stopped:
        call(train.main, *flags, "--output", run)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and os.strerror(errno.ENOSPC) in error and len(error.splitlines()) == 1
    assert {name: (run / name).read_bytes() for name in before} == before
    call(train.main, *flags, "--output", run)
    assert same(weights(run), weights(alone))


def save_on_a_small_disk(path, state):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    with pytest.raises(UserError, match=f"last.pth: cannot be written .{os.strerror(errno.EFBIG)}"):
        checkpoint.save(path, state)


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_loses_nothing(tmp_path):
    state = {"model": {"w": torch.zeros(200_000)}, "build": {}, "classes": [], "settings": {}}
    checkpoint.save(tmp_path / "last.pth", state)
    before = (tmp_path / "last.pth").read_bytes()
    small = get_context("fork").Process(target=save_on_a_small_disk, args=(tmp_path / "last.pth", state))
    small.start()
    small.join(60)
    assert small.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"] and (tmp_path / "last.pth").read_bytes() == before


def test_being_told_to_stop_is_not_taken_for_a_broken_image(monkeypatch, tmp_path):
    def stop(*_):
        raise Stopped("stopped", 15)

    monkeypatch.setattr("PIL.Image.open", stop)
    with pytest.raises(Stopped):
        read_image(tmp_path / "a.jpg")


def test_every_value_of_a_checkpoint_counts_in_its_digest():
    state = {"a": torch.arange(3.0), "b": {"c": [1, "x"], "d": torch.zeros(2, dtype=torch.bfloat16)}, "e": None}
    changes = [
        lambda s: s["a"].__setitem__(1, 1.0000001),
        lambda s: s["b"]["c"].__setitem__(0, 2),
        lambda s: s["b"].__setitem__("d", torch.zeros(2)),
        lambda s: s["b"].__setitem__("d", torch.zeros(2, 1, dtype=torch.bfloat16)),
        lambda s: s.__setitem__("e", 0),
        lambda s: s.__setitem__("f", s.pop("e")),
    ]
    for change in changes:
        other = copy.deepcopy(state)
        assert checkpoint.digest(other) == checkpoint.digest(state)
        change(other)
        assert checkpoint.digest(other) != checkpoint.digest(state)


# Steps that are not finite


def small_net(optimizer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 1))
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    return net, optimizer(net.parameters(), 0.1, fused=True, **options)


def steps(optimizer, inputs):
    """Weights, statistics and optimizer state after some guarded steps; the guard."""
    net, optimizer = small_net(optimizer)
    guard = Guard(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU)
    for x in inputs:
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        guard.step(loss)
    inner = {f"{i} {k}": v for i, row in enumerate(optimizer.state.values()) for k, v in row.items()}
    return {**net.state_dict(), **inner}, guard


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer, where):
    random = torch.Generator().manual_seed(1)
    good = [torch.randn(4, 1, 4, 4, generator=random) for _ in range(3)]
    bad = torch.full((4, 1, 4, 4), float("nan"))
    clean, _ = steps(optimizer, good)
    mixed, guard = steps(optimizer, [*good[:where], bad, bad, *good[where:]])
    clean = {k: v for k, v in clean.items() if "num_batches" not in k}
    assert all(torch.equal(mixed[k], v) for k, v in clean.items())
    assert guard.total == 2 and guard.streak == (2 if where == 3 else 0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_loss_that_is_not_finite_is_not_applied_though_its_gradient_is(optimizer, scaled):
    net, optimizer = small_net(optimizer)
    guard = Guard(net, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled), CPU)
    before = {k: v.clone() for k, v in net.state_dict().items() if "num_batches" not in k}
    loss = nn.functional.smooth_l1_loss(net(torch.ones(4, 1, 4, 4)), torch.full((4, 1), float("inf")))
    assert torch.isinf(loss)
    guard.scaler.scale(guard.poisoned(loss)).backward()
    assert guard.step(loss)[0] and guard.total == 1
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_an_overflow_of_fp16_counts_only_where_the_scale_can_fall_no_further():
    net, optimizer = small_net(torch.optim.SGD)
    guard = Guard(net, optimizer, torch.amp.GradScaler("cpu", init_scale=4.0), CPU)
    bad = []
    for _ in range(4):
        optimizer.zero_grad()
        for p in net.parameters():
            p.grad = torch.full_like(p, float("inf"))
        guard.scaler.scale(torch.ones(()))  # as a step does
        bad.append(bool(guard.step(torch.tensor(1.0))[0]))
    assert bad == [False, False, True, True]  # at scales 4, 2, 1, 0.5


def test_a_gradient_is_clipped_to_its_norm():
    net, optimizer = small_net(torch.optim.SGD)
    before = [p.detach().clone() for p in net.parameters()]
    guard = Guard(net, optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU)
    loss = 100 * net(torch.ones(4, 1, 4, 4)).sum()
    loss.backward()
    guard.step(loss, clip_grad=0.5)
    moved = sum((p - q).square().sum() for p, q in zip(net.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(0.1 * 0.5, rel=1e-4)


def spoil(monkeypatch, at):
    """Makes one loss term infinite at some steps."""
    original, seen = train.Step.forward, []

    def forward(self, *args):
        detection, *rest = original(self, *args)
        seen.append(1)
        if len(seen) in at:
            detection["loss_box_reg"] = detection["loss_box_reg"] * float("inf")
        return detection, *rest

    monkeypatch.setattr(train.Step, "forward", forward)


def test_a_single_bad_step_is_skipped_and_counted(monkeypatch, tmp_path):
    spoil(monkeypatch, {2})
    call(train.main, *SMALL, "--student", "r10", "--output", tmp_path / "run")
    assert [line["bad_steps"] for line in read_log(tmp_path / "run")[0]] == [0, 1, 1, 1, 1, 1]
    saved = checkpoint.load(tmp_path / "run/last.pth")
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())


def test_bad_steps_in_a_row_end_the_run_with_the_term_and_the_images_named(monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, {4, 5, 6})
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        call(train.main, *SMALL, "--student", "r10", "--max-bad-steps", 2, "--output", run)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 3
    assert "step 5" in line and "loss_box_reg" in line and "--lr" in line and "of epoch 1" in line
    saved = checkpoint.load(run / "last.pth")
    assert (saved["epoch"], saved["batch"]) == (1, 0)
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())


def test_the_last_finite_step_of_a_run_that_ended_is_told_term_by_term(monkeypatch, flags, tmp_path, capsys):
    spoil(monkeypatch, {4, 5})
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        call(train.main, *flags, "--log-every", 1, "--max-bad-steps", 2, "--output", run)
    [line] = capsys.readouterr().err.strip().splitlines()
    logged = read_log(run)[0][2]
    told = line.split("the last finite step was 3, with a gradient of norm ")[1].split("measured again after it) ")[1]
    found = {name: (float(a), float(b)) for name, a, b in re.findall(r"(\w+) ([\d.e+-]+) \(([\d.e+-]+)\)", told)}
    assert found.keys() == {name for name in logged if name.startswith(("loss_", "distill_"))}
    for name, (value, norm) in found.items():
        assert value == pytest.approx(logged[name], rel=6e-3, abs=1e-4) and norm > 0


def test_gradient_norms_are_those_of_each_weighted_term_alone(student, teacher, batch):
    step = Step(student, Levels(), teacher.backbone.out_channels).to(memory_format=torch.channels_last)
    machine, weights = Machine(0, 1, CPU, "none"), {"distill_backbone": 2.0, "distill_reg": 0.5}
    torch.manual_seed(3)
    norms = gradient_norms(step, batch, teacher, weights, machine)
    for name in ("loss_classifier", "distill_backbone", "distill_cls", "distill_reg"):
        step.zero_grad()
        torch.manual_seed(3)
        detection, distillation, _ = step(*batch, teacher)
        (weights.get(name, 1.0) * {**detection, **distillation}[name]).backward()
        total = sum(p.grad.double().square().sum() for p in step.parameters() if p.grad is not None).sqrt().item()
        assert norms[name] == pytest.approx(total, rel=1e-4) and total > 0


def test_a_run_that_was_ended_by_bad_steps_goes_on(monkeypatch, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    call(train.main, *SMALL, "--student", "r10", "--output", whole)
    with monkeypatch.context() as patch:
        spoil(patch, {4, 5, 6})
        with pytest.raises(SystemExit):
            call(train.main, *SMALL, "--student", "r10", "--output", run)
    call(train.main, *SMALL, "--student", "r10", "--output", run)
    assert same(weights(run), weights(whole))


def test_checkpoints_come_every_so_many_steps(flags, alone, tmp_path, monkeypatch):
    saved = []
    original = checkpoint.save

    def note(path, state):
        saved.append((state["epoch"], state["batch"]))
        original(path, state)

    monkeypatch.setattr(checkpoint, "save", note)
    call(train.main, *flags, "--save-every", 2, "--output", tmp_path / "run")
    assert saved == [(0, 2), (0, 4), (1, 2), (1, 4), (2, 2), (2, 4), (3, 0)]  # the last with the figures
    assert same(weights(tmp_path / "run"), weights(alone))


def test_the_same_command_gives_the_same_figures_with_and_without_loader_processes(alone, flags, tmp_path):
    call(train.main, *flags, "--workers", 2, "--output", tmp_path / "again")
    apart = {"seconds", "cost", "ms_per_image"}
    one, other = ({k: v for k, v in read_result(run).items() if k not in apart} for run in (alone, tmp_path / "again"))
    assert one == other and json.dumps(one) == json.dumps(other)
    assert same(weights(alone), weights(tmp_path / "again"))
    shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("more", [["--optimizer", "sgd", "--lr", "0.01", "--clip-grad", "5"], ["--decay-end", "0.6"]])
def test_other_optimizers_and_ends_of_the_decay_go_on_to_the_same_weights(flags, tmp_path, more):
    whole, run = tmp_path / "whole", tmp_path / "run"
    call(train.main, *flags, *more, "--output", whole)
    interrupted([*flags, *more], run, 8)
    call(train.main, *flags, *more, "--output", run)
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_a_backbone_with_frozen_batch_norm_trains(tmp_path, detector):
    torch.save(build_backbone("r10", "none", "batch").state_dict(), tmp_path / "r10.pth")
    flags = ["--student", "r10", "--backbone-weights", tmp_path / "r10.pth", "--detector", detector]
    call(train.main, *SMALL, *flags, "--output", tmp_path / "run")
    assert read_result(tmp_path / "run")["epochs"] == 2


# Killed, told to stop


@beside
def killed(folder, taught):
    rows = inject(folder, taught.flags, ["write 4 0.6", "rename 3 0"], say=lambda _: None, alone=taught.alone)
    return [(starts, equal) for _, starts, equal in rows]


def test_runs_killed_inside_a_write_and_between_two_names_end_equal(killed):
    assert killed == [(2, True)] * 2


@beside
def restarted(folder, taught):
    return inject(folder, taught.flags, ["step 6 0"], processes=2, say=lambda _: None)


def test_a_process_that_is_killed_under_torchrun_is_started_again_and_ends_equal(restarted):
    [(_, starts, equal)] = restarted
    assert starts == 1 and equal


WHEN_THERE = 'until [ -e "$0" ]; do sleep 0.01; done; kill -s "$1" -- "-$2"'
SIGNALS = {signal.SIGTERM: (143, 2), signal.SIGINT: (130, 0)}  # exit code, loader processes


@beside
def stopped(folder, taught):
    """{signal: the exit code and the errors of a run whose processes all got it}."""
    ends = {}
    for number, (_, workers) in SIGNALS.items():
        run = folder / number.name
        more = ["--workers", str(workers), "--log-every", "1", "--output", str(run)]
        words = [sys.executable, "train.py", *taught.flags, *more]
        running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:  # a process of its own sees the first step at once
            wait = [run / "log.jsonl", number.name[3:], running.pid]
            subprocess.run(["bash", "-c", WHEN_THERE, *map(str, wait)], timeout=100, check=True)
            _, error = running.communicate(timeout=100)
        finally:
            running.kill()
        ends[number] = (run, running.returncode, error)
    return ends


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_all_processes_ends_the_step_saves_and_ends_with_its_code(flags, alone, stopped, number):
    run, code, error = stopped[number]
    assert code == SIGNALS[number][0] and "the same command goes on" in error.splitlines()[-1]
    assert "Traceback" not in error
    saved = checkpoint.load(run / "last.pth")
    assert len(read_log(run)[0]) == saved["epoch"] * 4 + saved["batch"] < 12
    call(train.main, *flags, "--log-every", "1", "--output", run)
    assert same(weights(run), weights(alone))
    assert [line["step"] for line in read_log(run)[0]] == list(range(1, 13))
    assert read_result(run)["AP"] == read_result(alone)["AP"]
