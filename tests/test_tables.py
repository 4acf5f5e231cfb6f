"""The tables: which rows run, what is skipped, how figures are put together, and the commands they print."""

import json
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from beside import beside
from tiny_runs import ROOT, SMALL, call

import eval as evaluation
import train
from tar import UserError, options
from tar.machine import Machine
from tar.tables import DISTILLED, EQUAL, PLAIN, TEACHER, command_of, rows_of, run_table, spread, table_text

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
    """A table's note and its runs: {title: (kind, paper, [result or None, one a seed], [log, one a seed] if any)}."""
    rows = []
    for number, (title, (kind, paper, runs, *logs)) in enumerate(results.items()):
        names = [f"run{number}-{seed}" for seed in range(len(runs))]
        for i, (name, run) in enumerate(zip(names, runs, strict=True)):
            (folder / name).mkdir()
            if run:
                (folder / name / "result.json").write_text(json.dumps(run))
            if logs:
                (folder / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs[0][i]))
        rows.append({"title": title, "kind": kind, "paper": paper, "command": f"command {number}", "runs": names})
    return {
        "table": "voc",
        "dataset": "voc",
        "detector": "faster-rcnn",
        "test_images": 4952,
        "papers": True,
        "rows": rows,
        **about,
    }


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


def tables_in(text):
    """The Markdown tables of a text: of each {first cell of a row: {column: cell}}."""
    found = []
    for block in text.split("\n\n"):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if line[0] == "|"]
        found += [{line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}] if lines else []
    return found


class TestText:
    def test_means_deviations_gains_and_the_papers_figure(self, tmp_path):
        runs = {
            "student": (PLAIN, 70.0, [result(10.0), result(12.0), result(17.0)]),
            "TAR": (DISTILLED, 74.5, [result(15.0), result(16.0), result(20.0)]),
            "equal": (EQUAL, None, [None, None, None]),
        }
        text = table_text(write_table(tmp_path, runs), tmp_path)
        [rows] = tables_in(text)
        assert rows["student"]["AP"] == "13.0 ± 3.6"  # deviations -3, -1, 4: sqrt(26 / 2) = 3.6
        assert rows["TAR"]["AP"] == "17.0 ± 2.6"  # -2, -1, 3: sqrt(14 / 2) = 2.6
        assert (rows["student"]["gain"], rows["equal"]["gain"]) == ("-", "-")
        assert rows["TAR"]["gain"] == "+4.0 ± 1.0"  # seed by seed 5, 4, 3
        assert (rows["student"]["paper"], rows["TAR"]["paper"], rows["equal"]["paper"]) == ("70.0", "74.5", "-")
        assert rows["TAR"]["VOC07 mAP"] == "27.0 ± 2.6" and rows["equal"]["AP"] == "-"
        assert "mean ± standard deviation of 3 seeds" in text and "command 1" in text

    @pytest.mark.parametrize("about", [{"papers": False}, {"dataset": "shapes", "papers": False}])
    def test_on_other_data_the_papers_column_is_left_out(self, tmp_path, about):
        runs = {"student": (PLAIN, 70.0, [result(10.0)]), "TAR": (DISTILLED, 74.5, [result(15.0)])}
        text = table_text(write_table(tmp_path, runs, **about), tmp_path)
        assert "paper" not in text and "74.5" not in text and "one seed" in text and "+5.0" in text

    def test_over_equal_cost_and_the_verdict(self, tmp_path):
        runs = {
            "student": (PLAIN, None, [result(30.0), result(31.0)]),
            "TAR": (DISTILLED, None, [result(40.0), result(44.0)]),
            "teacher": (TEACHER, None, [result(41.0), result(39.0)]),
            "equal": (EQUAL, None, [result(36.0), result(42.0)]),
        }
        index = write_table(tmp_path, runs, dataset="coco", papers=False)
        index["rows"][1]["teacher"] = "teacher"
        text = table_text(index, tmp_path)
        [rows] = tables_in(text)
        over = {title: row["over equal cost"] for title, row in rows.items()}
        assert over == {"student": "-", "TAR": "+3.0 ± 1.4", "teacher": "+1.0 ± 5.7", "equal": "-"}
        assert rows["equal"]["gain"] == "+8.5 ± 3.5" and rows["teacher"]["gain"] == "+9.5 ± 2.1"
        said = "The student passes its teacher: 42.0 AP against 40.0, a difference of 2.0 ± 4.2 over 2 seeds."
        said += " Over the plain student of the same epochs: +11.5 ± 2.1 AP, +11.5 ± 2.1 AP50."
        assert f"\n{said} Over the plain student of equal cost: +3.0 ± 1.4 AP, +3.0 ± 1.4 AP50.\n" in text

        (tmp_path / "run3-1/result.json").unlink()  # not trained yet: means, for there are no pairs
        [rows] = tables_in(table_text(index, tmp_path))
        assert rows["TAR"]["over equal cost"] == "+6.0" and rows["TAR"]["gain"] == "+11.5 ± 2.1"

    def test_the_curve_of_each_row_and_how_often_its_gate_is_open(self, tmp_path):
        def log(aps, gates):
            steps = [{"step": i + 1, "gate_open": g} if g is not None else {"step": i + 1} for i, g in enumerate(gates)]
            return [*steps, *({"step": len(gates), "epoch": e, "metrics": {"AP": ap}} for e, ap in aps.items())]

        plain = [log({4: 10.0, 8: 30.0}, [None] * 8), log({4: 12.0, 8: 33.0}, [None] * 8)]
        taught = [log({8: 50.0}, [0.5, 0.7, 0.8, 0.8, *[None] * 4]), log({8: 52.0}, [0.4, 0.6, 0.9, 0.9, *[None] * 4])]
        runs = {
            "student": (PLAIN, None, [result(30.0), result(33.0)], plain),
            "TAR": (DISTILLED, None, [result(50.0), result(52.0)], taught),
        }
        text = table_text(write_table(tmp_path, runs, dataset="coco"), tmp_path)
        _, curves, gates = tables_in(text)
        assert "AP after so many epochs" in text and "gate is open" in text
        assert curves["student"] == {"run": "student", "4": "11.0 ± 1.4", "8": "31.5 ± 2.1"}
        assert curves["TAR"] == {"run": "TAR", "4": "-", "8": "51.0 ± 1.4"}
        # of 8 steps the quarters are 1 and 2, 3 and 4, ...
        assert gates == {
            "TAR": {"run": "TAR", "first": "55.0 ± 7.1", "second": "85.0 ± 7.1", "third": "-", "last": "-"}
        }

    def test_one_evaluation_is_no_curve(self, tmp_path):
        log = [{"step": 8, "epoch": 8, "metrics": {"AP": 30.0}}]
        index = write_table(tmp_path, {"student": (PLAIN, None, [result(30.0)], [log])}, dataset="coco")
        text = table_text(index, tmp_path)
        assert len(tables_in(text)) == 1

    def test_a_figure_that_does_not_exist_is_a_dash(self):
        assert (spread([1.25]), spread([1.0, 2.0]), spread([]), spread([1.0, None])) == ("1.2", "1.5 ± 0.7", None, None)


class TestRunTable:
    """run_table() with a function in the place of training."""

    def run(self, folder, words, figures=None, rank=0, images=400):
        """What is said, the runs in their order as (title, flags), and the note."""
        args = parsed(words)
        args.output = folder
        machine, said, runs = Machine(rank, 1, torch.device("cpu"), "none"), [], []
        machine.say = said.append

        def distil(flags, machine, parent, name, title):
            runs.append((title, flags))
            found = result((figures or {}).get(title.split(",")[0], 40.0), dataset=flags.dataset, test_images=images)
            found |= {"cost": 1.25 + len(flags.teacher) / 10 if flags.teacher else 1.0, "epochs": flags.epochs}
            run = parent / (name or f"run{len(runs)}")
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps(found))
            return {"a teacher's title": {}, title: found}, run

        run_table(args, machine, distil)
        return (
            "\n".join(said),
            runs,
            json.loads((folder / f"table-{args.table}-{args.dataset}-{args.detector}.json").read_text()),
        )

    def test_rows_run_in_turn_and_equal_cost_is_as_long_as_the_method_costs(self, tmp_path):
        said, runs, note = self.run(tmp_path, "--table claim --seeds 2 --epochs 6", {"TAR": 50.0, "teacher": 45.0})
        titles = [title for title, _ in runs]
        rows = ["student, no distillation", "TAR", "teacher", "student, equal cost"]
        assert titles == [f"{row}, seed {seed}" for row in rows for seed in (0, 1)]
        flags = dict(runs)
        assert [flags[f"{row}, seed 1"].epochs for row in rows] == [6, 6, 7, 10]  # 5/4 of 6; 6 * 1.55
        assert flags["TAR, seed 0"].teacher_epochs == 7 and flags["TAR, seed 1"].seed == 1
        assert "costs 1.55 plain trainings: 10 epochs for 6" in said
        assert "The student passes its teacher: 50.0 AP against 45.0, a difference of 5.0 ± 0.0 over 2 seeds." in said
        assert [len(row["runs"]) for row in note["rows"]] == [2] * 4 and not note["papers"]

    def test_other_processes_end_it_too(self, tmp_path):
        self.run(tmp_path / "one", "--table claim", rank=0)
        with pytest.raises(FileNotFoundError, match="table-claim"):  # the note, which is written by the first alone
            self.run(tmp_path / "two", "--table claim", rank=1)

    @pytest.mark.parametrize(("ap", "says"), [(45.0, "equals"), (44.9, "does not pass"), (45.1, "passes")])
    def test_the_verdict(self, tmp_path, ap, says):
        said, _, _ = self.run(tmp_path, "--table claim", {"TAR": ap, "teacher": 45.0})
        assert f"The student {says} its teacher: {ap} AP against 45.0." in said

    def test_on_voc_the_verdict_is_of_vocs_own_figure(self, tmp_path):
        said, _, note = self.run(tmp_path, "--table voc", {"all three levels": 60.0, "teacher": 50.0}, images=4952)
        assert (
            "70.0 VOC07 mAP against 60.0" in said and "+20.0 VOC07 mAP, +20.0 AP50" in said and note["papers"]
        )  # result() has VOC07 10 above AP

    @pytest.mark.parametrize("more", ["--student r18", "--detector retinanet", "--dataset shapes"])
    def test_the_papers_figures_are_shown_for_its_setting_only(self, tmp_path, more):
        _, _, note = self.run(tmp_path, f"--table voc {more}", images=4952)
        assert not note["papers"]

    def test_each_teacher_has_its_verdict_and_equal_cost_is_that_of_the_dearest(self, tmp_path):
        said, runs, _ = self.run(tmp_path, "--table teachers --epochs 10", {"TAR from r50": 41.0})
        assert said.count("The student") == 4 and "passes its teacher r50: 41.0 AP against 40.0" in said
        assert "The distillation (TAR from r101) costs 1.65 plain trainings: 17 epochs for 10." in said
        assert [flags.teacher for _, flags in runs if flags.teacher] == ["r18", "r34", "r50", "r101"]

    @pytest.mark.parametrize("more", ["--teacher r34", "--teacher r34 --teacher-weights some.pth"])
    def test_teachers_of_ones_own_are_refused_where_the_rows_name_theirs(self, tmp_path, more):
        with pytest.raises(UserError, match="--table teachers: its rows name their teachers"):
            self.run(tmp_path, f"--table teachers {more}")


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
