"""The tables: their rows and commands, the figures of several seeds, the file, and a table that is killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from beside import beside
from tiny_runs import ROOT, SMALL, call, command

import eval as evaluation
import train
from tar import UserError
from tar.tables.print_table import DISTILLED, EQUAL, PLAIN, TEACHER, read_table, table_text
from tar.tables.rows import command_of, rows_of
from tar.tables.run_table import gate_by_quarter, run_table
from tar.training import flags as options
from tar.training.process import Process
from tar.training.run_folder import settings_of

KEPT = [file for file in sorted((ROOT / ".results").glob("*.json")) if file.stem not in ("bench", "sgd-stability")]
CPU = Process(0, 1, torch.device("cpu"), "none")


def parsed(words):
    return options.parse(words.split())


def run(seed, ap, **more):
    """A run as a table keeps it, or a result.json; cost 1.2 plain trainings of 8 epochs."""
    figures = {"AP": ap, "AP50": 1.5 * ap, "AP75": 0.8 * ap, "voc07": 2 * ap, "voc_area": 2.5 * ap}
    about = {"parameters": 6_000_000, "epochs": 8, "seconds": 60.0, "cost": 1.2, "ms_per_image": 11.0}
    return {"seed": seed, **figures, **about, "curve": [], "gate": None, "per_class": {}, **more}


def runs(*aps, **more):
    return [run(seed, ap, **more) for seed, ap in enumerate(aps)]


def table_of(*rows, **about):
    """A table of rows (title, kind, runs, and what else a row has)."""
    common = {"paper": None, "whole": False, "teacher_row": None, "command": "a command"}
    rows = [{"title": t, "kind": kind, "runs": of_row, **common, **dict(*more)} for t, kind, of_row, *more in rows]
    start = {"dataset": "coco", "detector": "faster-rcnn", "split": "test", "test_images": 4952, "papers": False}
    return {**start, "rows": rows, **about}


def tables_in(text):
    """The Markdown tables of a text: of each {first cell of a row: {column: cell}}."""
    found = []
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line[0] == "|"]
        found += [{line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}] if lines else []
    return found


class TestRows:
    def test_the_papers_seven_rows_and_their_flags(self, tmp_path):
        args = parsed("--table shapes --student r10 --teacher r18 --teacher-epochs 9 --epochs 5 --weight-cls 2")
        rows = rows_of(args, tmp_path)
        assert [row.paper for row in rows] == [70.0, 72.4, 73.2, 73.4, 73.8, 74.5, 74.3, None]
        assert [row.kind for row in rows] == [PLAIN, *[DISTILLED] * 5, TEACHER, EQUAL]
        plain, _, level, *_, teacher, equal = (row.flags(args) for row in rows)
        assert (plain.student, plain.teacher, plain.epochs) == ("r10", None, 5)
        assert (level.weight_backbone, level.weight_cls, level.weight_reg, level.decay) == (0, 2.0, 0, "none")
        assert options.distillation_settings(level).weights() == {"distill_cls": 2.0}
        assert (teacher.student, teacher.teacher, teacher.epochs) == ("r18", None, 9)
        assert (equal.student, equal.teacher) == ("r10", None)

    def test_the_whole_method_knows_its_teachers_row(self, tmp_path):
        def teachers(words):
            return {row.title: row.teacher_row for row in rows_of(parsed(words), tmp_path) if row.whole}

        assert teachers("--student r10 --teacher r18") == {"TAR r10 from r18": "teacher r18"}
        assert teachers("--table coco") == {"TAR from r101": "teacher r101", "TAR from r152": "teacher r152"}
        assert teachers("--table claim --teacher r18 --student r10 --teacher-weights some.pth") == {"TAR": None}
        assert teachers("--table gates") == {}

    @pytest.mark.parametrize("name", options.TABLES)
    def test_every_rows_command_gives_the_rows_settings(self, name, tmp_path):
        words = "--student r10 --teacher r18 --dataset voc --recipe shapes --size 64 96 --epochs 5 --workers 3"
        words += " --no-reg" * (name == "claim")
        args = parsed(f"--table {name} {words}")
        args.data_path = "a folder"
        for row in rows_of(args, tmp_path):
            again = options.parse(shlex.split(command_of(row.flags(args)))[2:])
            assert settings_of(again, CPU) == settings_of(row.flags(args), CPU) and again.workers == 3

    @pytest.mark.parametrize(
        "words",
        [
            "--teacher r18 --backbone-norm cells --weight-backbone 6.4",
            "--dataset voc --backbone-weights none --trainable-layers 3 --pyramid-norm none",
            "--teacher r18 --decay none --decay-end 0.5",
            "--dataset voc --detector retinanet --optimizer adamw --lr 0.01",
        ],
    )
    def test_a_command_says_a_default_that_hangs_on_another_flag(self, words):
        args = parsed(f"--student r10 {words}")
        again = options.parse(shlex.split(command_of(args))[2:])
        assert settings_of(again, CPU) == settings_of(args, CPU)

    def test_a_row_that_cannot_be_is_refused_before_any_is_trained(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            call(train.main, *SMALL, "--table", "proposals", "--detector", "retinanet", "--output", tmp_path)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "--table proposals" in error and "RetinaNet's anchors" in error
        with pytest.raises(UserError, match="--table teachers: its rows name their teachers"):
            run_table(parsed(f"--table teachers --teacher r34 --output {tmp_path}"), CPU, None)
        assert not list(tmp_path.iterdir())


class TestText:
    def five_rows(self, **about):
        """Two seeds of each row; AP50 is 1.5 AP, VOC07 mAP twice AP."""
        return table_of(
            ("student", PLAIN, runs(30.0, 31.0)),
            ("part", DISTILLED, [run(0, 33.0), run(1, 33.0, cost=1.4)]),  # 1.3 and 8 epochs: more than 10
            ("TAR", DISTILLED, runs(40.0, 44.0), {"whole": True, "teacher_row": "teacher"}),
            ("teacher", TEACHER, runs(41.0, 39.0)),
            ("equal", EQUAL, runs(36.0, 42.0, epochs=10)),
            **about,
        )

    def test_means_deviations_gains_and_the_papers_figure(self):
        student = ("student", PLAIN, runs(10.0, 12.0, 17.0), {"paper": 70.0})
        tar, equal = ("TAR", DISTILLED, runs(15.0, 16.0, 20.0), {"paper": 74.5}), ("equal", EQUAL, [])
        text = table_text(table_of(student, tar, equal, dataset="voc", papers=True))
        [rows] = tables_in(text)
        assert rows["student"]["AP"] == "13.0 ± 3.6"  # deviations -3, -1, 4: sqrt(26 / 2) = 3.6
        assert rows["TAR"]["AP"] == "17.0 ± 2.6"  # -2, -1, 3: sqrt(14 / 2) = 2.6
        assert (rows["student"]["over plain"], rows["equal"]["over plain"]) == ("-", "-")
        assert rows["TAR"]["over plain"] == "+8.0 ± 2.0 / +6.0 ± 1.5"  # VOC07: 10, 8, 6; AP50: 7.5, 6, 4.5
        assert [rows[name]["paper (r50)"] for name in ("student", "TAR", "equal")] == ["70.0", "74.5", "-"]
        assert rows["TAR"]["VOC07 mAP"] == "34.0 ± 5.3" and rows["equal"]["AP"] == "-"
        assert (rows["student"]["cost"], rows["TAR"]["cost"]) == ("-", "1.20")
        assert "of 3 seeds" in text and "gain in VOC07 mAP / AP50" in text and "TAR:\n    a command" in text
        text = table_text(table_of(student, tar))  # other data than the paper's
        assert "74.5" not in text and "paper" not in text
        assert tables_in(text)[0]["TAR"]["over plain"] == "+4.0 ± 1.0 / +6.0 ± 1.5"

    def test_gains_over_equal_cost_and_teacher(self):
        table = self.five_rows()
        [rows] = tables_in(table_text(table))
        over = {title: row["over equal cost"] for title, row in rows.items()}
        gain = "+3.0 ± 1.4 / +4.5 ± 2.1"
        assert over == {"student": "-", "part": "-", "TAR": gain, "teacher": "-", "equal": "-"}
        over = [row["over teacher"] for row in rows.values()]
        assert over == ["-", "-", "+2.0 ± 4.2 / +3.0 ± 6.4", "-", "-"]
        assert rows["equal"]["over plain"].startswith("+8.5 ± 3.5 /")
        [rows] = tables_in(table_text(self.five_rows(dataset="voc")))
        assert rows["TAR"]["over equal cost"].startswith("+6.0 ± 2.8 /")
        # and longer rows: the shortest that costs as much counts
        table["rows"] += table_of(("11", EQUAL, runs(30.0, epochs=11)), ("20", EQUAL, runs(50.0, epochs=20)))["rows"]
        [rows] = tables_in(table_text(table))
        assert (rows["part"]["over equal cost"], rows["TAR"]["over equal cost"]) == ("+3.0 / +4.5", gain)

    def test_seeds_are_compared_with_themselves(self):
        table = self.five_rows()
        table["rows"][2]["runs"][0] |= {"AP50": None, "AP": None}  # nothing could be measured
        [rows] = tables_in(table_text(table))
        assert (rows["TAR"]["AP"], rows["TAR"]["over plain"]) == ("-", "+13.0 / +19.5")
        del table["rows"][2]["runs"][0]  # TAR has its second seed only
        [rows] = tables_in(table_text(table))
        over = [rows["TAR"][f"over {name}"] for name in ("plain", "equal cost", "teacher")]
        assert over == ["+13.0 / +19.5", "+2.0 / +3.0", "+5.0 / +7.5"]
        del table["rows"][3]["runs"][1]  # the teacher its first
        assert tables_in(table_text(table))[0]["TAR"]["over teacher"] == "-"

    def test_curves_and_gates(self):
        table = self.five_rows()
        for seed, ap, gate in ((0, 10.0, 50.0), (1, 13.0, 60.0)):
            curve = [[4, {"AP": ap, "voc07": 1.0}], [8, {"AP": ap + 20, "voc07": 2.0}]]
            table["rows"][0]["runs"][seed]["curve"] = curve
            table["rows"][2]["runs"][seed] |= {"curve": [[8, {"AP": ap}]], "gate": [gate, gate + 30, None, None]}
        text = table_text(table)
        rows, curves = tables_in(text)
        assert "\nAP after so many epochs" in text
        assert list(curves["student"].values()) == ["student", "11.5 ± 2.1", "31.5 ± 2.1"]
        assert list(curves["TAR"].values()) == ["TAR", "-", "11.5 ± 2.1"] and list(curves["TAR"]) == ["run", "4", "8"]
        assert (rows["TAR"]["gate open"], rows["part"]["gate open"]) == ("55.0 85.0 - -", "-")
        assert tables_in(table_text({**table, "dataset": "voc"}))[1]["student"]["4"] == "1.0 ± 0.0"
        del table["rows"][0]
        assert "after so many epochs" not in table_text(table)  # one evaluation is no curve


def test_a_gate_by_quarter_of_the_run():
    # a line of the log lies where its steps begin, and weighs as many steps as it is the mean of
    steps = [{"step": 3, "gate_open": 0.5}, {"step": 4, "gate_open": 0.9}, {"step": 12, "gate_open": 0.7}, {"step": 16}]
    assert gate_by_quarter([*steps, {"step": 16, "metrics": {}}]) == [pytest.approx(60), pytest.approx(70), None, None]
    assert gate_by_quarter([{"step": 8}]) is None


class TestRunTable:
    def run(self, folder, words, classes=20):
        """run_table() without training: what is said, the runs in their order as (title, flags), and the table."""
        args = parsed(words)
        args.output = folder
        process, said, runs = replace(CPU), [], []
        process.say = said.append

        def trained(flags, process, parent, name, title):
            runs.append((title, flags))
            result = run(0, 40.0, test_images=400, epochs=flags.epochs)
            result |= {"cost": 1.25 + len(flags.teacher) / 10 if flags.teacher else 1.0, "environment": {"device": ""}}
            result |= {"per_class": {f"class {k}": {} for k in range(classes)}}
            output = parent / (name or f"run{len(runs)}")
            output.mkdir(parents=True)
            (output / "log.jsonl").write_text('{"step": 8, "epoch": 8, "metrics": {"AP": 40.0, "AP_small": 1.0}}\n')
            return {"a teacher's title": {}, title: result}, output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tar.tables.run_table.check_student", lambda args: None)
            run_table(args, process, trained)
        file = folder / f"table-{args.table}-{args.dataset}-{args.detector}.json"
        return "\n".join(said), runs, read_table(file)

    def test_rows_run_in_turn_and_equal_cost_is_as_long_as_the_method_costs(self, tmp_path):
        said, runs, table = self.run(tmp_path, "--table claim --seeds 2 --epochs 6")
        rows = ["student, no distillation", "TAR", "teacher", "student, equal cost"]
        assert [title for title, _ in runs] == [f"{row}, seed {seed}" for row in rows for seed in (0, 1)]
        flags = dict(runs)
        assert [flags[f"{row}, seed 1"].epochs for row in rows] == [6, 6, 7, 10]  # 5/4 of 6; 6 * 1.55
        assert flags["TAR, seed 0"].teacher_epochs == 7 and flags["TAR, seed 1"].seed == 1
        assert "costs 1.55 plain trainings: 10 epochs for 6" in said
        assert [[of_row["seed"] for of_row in row["runs"]] for row in table["rows"]] == [[0, 1]] * 4
        assert table["rows"][1]["runs"][1]["curve"] == [[8, {"AP": 40.0}]] and not table["papers"]
        assert table_text(table) in said

    def test_the_papers_figures_are_shown_beside_its_data_only(self, tmp_path):
        for words, papers in (("voc", True), ("voc --dataset shapes", False), ("claim", False)):
            assert self.run(tmp_path / words, f"--table {words}")[2]["papers"] is papers
        assert not self.run(tmp_path / "own classes", "--table voc", classes=3)[2]["papers"]

    def test_rows_with_teachers_of_their_own(self, tmp_path):
        said, runs, table = self.run(tmp_path, "--table teachers --epochs 10")
        teachers = ["r18", "r34", "r50", "r101"]
        assert [row["teacher_row"] for row in table["rows"] if row["whole"]] == [f"teacher {name}" for name in teachers]
        assert [flags.teacher for _, flags in runs if flags.teacher] == teachers
        assert "The distillation (TAR from r101) costs 1.65 plain trainings: 17 epochs for 10." in said


@beside
def killed_table(folder):
    """A table killed after its first run, and finished: its file, the runs then and now, and what was printed."""
    flags = [*SMALL, "--table", "claim", "--epochs", "1", "--output", str(folder)]

    def results():
        return {file: file.stat().st_mtime_ns for file in folder.glob("*/result.json")}

    words, limit = [sys.executable, ROOT / "train.py", *flags], time.monotonic() + 120
    running = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not results() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    running.kill()
    running.wait()
    before, done = results(), command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    return Namespace(folder=folder, before=before, after=results(), out=done.stdout)


def test_a_killed_table_is_finished_by_the_same_command(killed_table, tmp_path, capsys):
    before, results, folder = killed_table.before, killed_table.after, killed_table.folder
    assert 1 <= len(before) < 3 and before.items() <= results.items()  # what was done is kept
    file = folder / "table-claim-shapes-faster-rcnn.json"
    rows = {row["kind"]: row["runs"] for row in read_table(file)["rows"]}
    for [of_row] in rows.values():
        result = json.loads((folder / of_row["folder"] / "result.json").read_text())
        assert all(of_row[name] == result[name] for name in ("AP", "AP50", "AP75", "cost", "epochs", "seconds"))
    assert len(rows) == 4 and len(results) in (3, 4)  # the run of equal cost may be the plain one
    assert rows[EQUAL][0]["epochs"] == max(1, -int(-rows[DISTILLED][0]["cost"] // 1)) and rows[PLAIN][0]["cost"] == 1
    (tmp_path / "a.json").write_bytes(file.read_bytes())  # the file says all at another place
    call(evaluation.main, "--table", tmp_path / "a.json")
    assert capsys.readouterr().out.strip() in killed_table.out


def test_a_file_without_a_table_is_said_in_a_line(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    for name, said in (("other.json", "other.json: not a table"), ("none.json", "none.json: cannot be read")):
        with pytest.raises(SystemExit) as stopped:
            call(evaluation.main, "--table", tmp_path / name)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and said in error and len(error.strip().splitlines()) == 1


def test_a_reader_who_has_seen_enough_is_no_error(monkeypatch):
    """`eval.py --table ... | head`: the end that is read is closed before the table is printed."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "stdout", pipe)
        call(evaluation.main, "--table", KEPT[0])
    assert stopped.value.code == 128 + signal.SIGPIPE  # and the pipe could be flushed when it was closed


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_a_kept_table_prints_and_its_commands_are_understood(file):
    table = read_table(file)
    shown = tables_in(table_text(table))[0]
    for row in table["rows"]:
        assert [run["seed"] for run in row["runs"]] == ([0] if file.stem == "demo" else [0, 1, 2])
        assert shown[row["title"]]["AP"].startswith(f"{fmean(run['AP'] for run in row['runs']):.1f}")
        if "49cae99" not in table.get("note", ""):  # of code whose flags are gone
            args = options.parse(shlex.split(row["command"])[2:])
            assert args.epochs == row["runs"][0]["epochs"]
            assert options.parse(shlex.split(command_of(args))[2:]) == args
