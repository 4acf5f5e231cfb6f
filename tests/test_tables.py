"""The tables: which rows run, what is skipped, how figures are put together, and the commands they print."""

import json
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from beside import beside
from tiny_runs import ROOT, SMALL, call

import eval as evaluation
import train
from tar import options
from tar.tables import DISTILLED, EQUAL, PLAIN, TEACHER, command_of, rows_of, spread, table_text

# Two rows of a table, and the one of equal cost: what a bare `--table decay` runs, cut short.
SHORT = """
import sys
import train
from tar import tables
tables.ROWS["decay"] = tables.ROWS["decay"][:2]
train.main(sys.argv[1:])
"""
TINY = [*SMALL, "--table", "decay", "--seeds", "2", "--epochs", "1"]


def parsed(*words):
    return options.parse([*" ".join(words).split()])


def short_table(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SHORT, *map(str, TINY), "--output", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(ap, **more):
    figures = {"AP": ap, "AP50": ap + 20, "AP75": ap - 5, "voc07": ap + 10, "voc_area": ap + 12}
    return {**figures, "parameters": 6_000_000, "epochs": 8, "seconds": 60.0, "cost": 1.2, "ms_per_image": 11.0, **more}


def write_table(folder, results, **about):
    """A table's note and its runs: {title: (kind, paper, [result or None, one a seed])}."""
    rows = []
    for number, (title, (kind, paper, runs)) in enumerate(results.items()):
        names = [f"run{number}-{seed}" for seed in range(len(runs))]
        for name, run in zip(names, runs, strict=True):
            (folder / name).mkdir()
            if run:
                (folder / name / "result.json").write_text(json.dumps(run))
        rows.append({"title": title, "kind": kind, "paper": paper, "command": f"command {number}", "runs": names})
    return {"table": "voc", "dataset": "voc", "detector": "faster-rcnn", "test_images": 4952, "rows": rows, **about}


class TestRows:
    def test_the_papers_seven_rows(self, tmp_path):
        rows = rows_of(parsed("--table voc"), tmp_path)
        assert [row.paper for row in rows] == [70.0, 72.4, 73.2, 73.4, 73.8, 74.5, 74.3, None]
        assert [row.kind for row in rows] == [PLAIN, *[DISTILLED] * 5, TEACHER, EQUAL]

    def test_a_level_alone_switches_the_others_off_and_does_not_decay(self, tmp_path):
        args = parsed("--table voc --student r50 --teacher r101")
        row = next(r for r in rows_of(args, tmp_path) if "classification" in r.title)
        flags = row.flags(args)
        assert (flags.weight_backbone, flags.weight_cls, flags.weight_reg, flags.decay) == (0, 1.0, 0, "none")
        assert options.levels_of(flags).weights() == {"distill_cls": 1.0}

    def test_the_teacher_trains_as_its_flags_say(self, tmp_path):
        args = parsed("--table shapes --student r10 --teacher r18 --teacher-epochs 9 --epochs 5 --weight-cls 2")
        plain, *_, teacher, equal = (row.flags(args) for row in rows_of(args, tmp_path))
        assert (plain.student, plain.teacher, plain.epochs, plain.weight_cls) == ("r10", None, 5, 1.0)
        assert (teacher.student, teacher.teacher, teacher.epochs) == ("r18", None, 9)
        assert (equal.student, equal.teacher) == ("r10", None)

    def test_coco_has_two_teachers(self, tmp_path):
        args = parsed("--table coco --student r50 --teacher r101")
        assert args.dataset == "coco" and args.size == [800, 1333]
        rows = {row.title: row.flags(args) for row in rows_of(args, tmp_path)}
        assert (rows["TAR from r152"].teacher, rows["teacher r152"].student) == ("r152", "r152")

    def test_the_retinanet_table_is_of_retinanets_on_coco(self):
        args = parsed("--table retinanet")
        assert (args.detector, args.dataset, args.lr, args.anchor_scale) == ("retinanet", "coco", 0.01, 4)

    def test_a_teacher_trained_elsewhere_has_no_row(self, tmp_path):
        args = parsed("--table gates --teacher r18 --student r10 --teacher-weights some.pth")
        assert TEACHER not in {row.kind for row in rows_of(args, tmp_path)}

    @pytest.mark.parametrize("name", options.TABLES)
    def test_every_row_is_a_command_that_is_understood(self, name, tmp_path):
        args = parsed(
            f"--table {name} --student r10 --teacher r18 --dataset voc --recipe shapes --size 64 96 --epochs 5"
        )
        args.data_path = "a folder"
        for row in rows_of(args, tmp_path):
            words = shlex.split(command_of(row.flags(args)))
            assert words[:2] == ["python", "train.py"]
            again = vars(options.parse(words[2:]))
            apart = {"table", "seed", "seeds", "output"}
            apart |= {"no_backbone", "no_cls", "no_reg"}  # shown by the weights
            expected = vars(row.flags(args))
            assert {k for k in again if k not in apart and again[k] != expected[k]} == set()

    def test_a_row_that_cannot_be_is_refused_before_any_is_trained(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            call(train.main, *SMALL, "--table", "proposals", "--detector", "retinanet", "--output", tmp_path)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and len(error.strip().splitlines()) == 1
        assert "RetinaNet's anchors" in error and "--table proposals" in error
        assert not list(tmp_path.iterdir())


class TestText:
    def test_means_deviations_gains_and_the_papers_figure(self, tmp_path):
        runs = {
            "student": (PLAIN, 70.0, [result(10.0), result(12.0), result(17.0)]),
            "TAR": (DISTILLED, 74.5, [result(15.0), result(16.0), result(20.0)]),
            "equal": (EQUAL, None, [None, None, None]),
        }
        text = table_text(write_table(tmp_path, runs), tmp_path)
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
        assert rows["student"]["AP"] == "13.0 ± 3.6"  # deviations -3, -1, 4: sqrt(26 / 2) = 3.6
        assert rows["TAR"]["AP"] == "17.0 ± 2.6"  # -2, -1, 3: sqrt(14 / 2) = 2.6
        assert (rows["student"]["gain"], rows["TAR"]["gain"], rows["equal"]["gain"]) == ("-", "+4.0", "-")
        assert (rows["student"]["paper"], rows["TAR"]["paper"], rows["equal"]["paper"]) == ("70.0", "74.5", "-")
        assert rows["TAR"]["VOC07 mAP"] == "27.0 ± 2.6" and rows["equal"]["AP"] == "-"
        assert "mean ± standard deviation of 3 seeds" in text and "command 1" in text

    @pytest.mark.parametrize("about", [{"test_images": 776}, {"dataset": "shapes"}])
    def test_on_other_data_the_papers_column_is_left_out(self, tmp_path, about):
        runs = {"student": (PLAIN, 70.0, [result(10.0)]), "TAR": (DISTILLED, 74.5, [result(15.0)])}
        text = table_text(write_table(tmp_path, runs, **about), tmp_path)
        assert "paper" not in text and "74.5" not in text and "one seed" in text and "+5.0" in text

    def test_a_figure_that_does_not_exist_is_a_dash(self):
        assert (spread([1.25]), spread([1.0, 2.0]), spread([]), spread([1.0, None])) == ("1.2", "1.5 ± 0.7", None, None)


@beside
def killed_table(folder):
    """A table killed after its first run, and finished: its folder, the runs then and now, and what was printed."""

    def results():
        return {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}

    running = short_table(folder)
    limit = time.monotonic() + 120
    while not results() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = results()
    running = short_table(folder)
    out, error = running.communicate(timeout=150)
    assert running.returncode == 0, error
    return Namespace(folder=folder, before=before, after=results(), out=out)


def test_a_killed_table_is_finished_by_the_same_command(killed_table, capsys):
    folder, results = killed_table.folder, killed_table.after
    assert 1 <= len(killed_table.before) < 8
    assert killed_table.before.items() <= results.items()  # what was done is kept
    [note] = folder.glob("table-decay-shapes-faster-rcnn.json")
    rows = {row["title"]: row for row in json.loads(note.read_text())["rows"]}
    assert [len(row["runs"]) for row in rows.values()] == [2, 2, 2]
    runs = {run for row in rows.values() for run in row["runs"]}  # if a step costs no more, equal cost is the plain run
    assert len(runs) in (4, 6) and len(results) == len(runs) + 2  # the teachers

    call(evaluation.main, "--table", "decay", "--results", folder)
    printed = capsys.readouterr().out
    assert printed.strip() in killed_table.out and "student, equal cost" in printed

    results = {}
    for title, row in rows.items():
        files = [folder / run / "result.json" for run in row["runs"]]
        results[title] = [json.loads(file.read_text()) for file in files]
    cost = sum(result["cost"] for result in results["all three levels, decay linear"]) / 2
    assert {r["epochs"] for r in results["student, equal cost"]} == {max(1, -int(-cost // 1))}
    assert {r["cost"] for r in results["student, no distillation"]} == {1.0}


def test_a_table_that_was_not_run_is_said_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(evaluation.main, "--table", "voc", "--results", tmp_path)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "run train.py --table voc first" in error
    assert len(error.strip().splitlines()) == 1
