"""The tables: which rows run, what is skipped, how figures are put together, and the commands they print."""

import json
import os
import re
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
from tar.runs import changed, read_log, run_name
from tar.tables import command_of, rows_of, run_table
from tar.tabulation import DISTILLED, EQUAL, PLAIN, TEACHER, classes_text, spread, table_text

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
    figures = {"AP": ap, "AP50": 1.5 * ap, "AP75": 0.8 * ap, "voc07": 2 * ap, "voc_area": 2.5 * ap}
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

    def test_the_whole_method_knows_its_teachers_row(self, tmp_path):
        demo = rows_of(parsed("--student r10 --teacher r18"), tmp_path)
        whole = {row.title: row.teacher_row for row in demo if row.whole}
        assert whole == {"TAR r10 from r18": "teacher r18"} and "teacher r18" in [row.title for row in demo]
        coco = rows_of(parsed("--table coco"), tmp_path)
        whole = {row.title: row.teacher_row for row in coco if row.whole}
        assert whole == {"TAR from r101": "teacher r101", "TAR from r152": "teacher r152"}
        assert not any(row.whole for row in rows_of(parsed("--table gates"), tmp_path))

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

    def test_a_kept_run_is_still_the_one_of_its_rows_command(self):
        machine, seen = Machine(0, 1, torch.device("cpu"), "bf16"), 0
        folders = ("shapes", "shapes-16-epochs", "shapes-retinanet", "pcb-r18-to-r10", "bccd-r18-to-r10")
        folders += ("minivoc-r18-to-r10", "bccd-retinanet-12-epochs", "minivoc-retinanet", "shapes-32-epochs-weights")
        folders += ("minivoc-24-epochs",)
        for index in (index for name in folders for index in (ROOT / ".results" / name).glob("table-*.json")):
            for row in json.loads(index.read_text())["rows"]:
                for seed, name in enumerate(row["runs"]):
                    args = changed(options.parse(shlex.split(row["command"])[2:]), seed=seed)
                    if args.teacher:  # a table names the teacher's file where a command has it trained
                        kept = json.loads((index.parent / name / "config.json").read_text())
                        args = changed(args, teacher_weights=kept["teacher_weights"])
                    assert run_name(args, machine) == name, (index.name, row["command"])
                    seen += 1
        assert seen > 200

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


def log_of(values, **curve):
    """A run's log: a line a step with the gate's share, or without for None, and the figures measured at the end."""
    steps = [{"step": i + 1} | ({} if value is None else {"gate_open": value}) for i, value in enumerate(values)]
    return [*steps, *({"step": len(steps), "epoch": int(e[1:]), "metrics": figures} for e, figures in curve.items())]


class TestText:
    def four_rows(self, folder, **about):
        """Two seeds of a method that costs 1.2 plain trainings of 8 epochs; AP50 is 1.5 AP."""
        runs = {
            "student": (PLAIN, None, [result(30.0), result(31.0)]),
            "part": (DISTILLED, None, [result(33.0), result(33.0, cost=1.4)]),  # 1.3 and 8 epochs: more than 10
            "TAR": (DISTILLED, None, [result(40.0), result(44.0)]),
            "teacher": (TEACHER, None, [result(41.0), result(39.0)]),
            "equal": (EQUAL, None, [result(36.0, epochs=10), result(42.0, epochs=10)]),
        }
        index = write_table(folder, runs, **{"dataset": "coco", "papers": False, **about})
        index["rows"][2] |= {"whole": True, "teacher_row": "teacher"}
        return index

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
        assert rows["TAR"]["gain"] == "+8.0 ± 2.0"  # VOC07, twice AP: 10, 8, 6
        assert (rows["student"]["paper"], rows["TAR"]["paper"], rows["equal"]["paper"]) == ("70.0", "74.5", "-")
        assert rows["TAR"]["VOC07 mAP"] == "34.0 ± 5.3" and rows["equal"]["AP"] == "-"
        assert (rows["student"]["cost"], rows["TAR"]["cost"]) == ("-", "1.20")
        assert "mean ± standard deviation of 3 seeds; gains are in VOC07 mAP" in text and "command 1" in text

    @pytest.mark.parametrize("about", [{"papers": False}, {"dataset": "shapes", "papers": False}])
    def test_on_other_data_the_papers_column_is_left_out(self, tmp_path, about):
        runs = {"student": (PLAIN, 70.0, [result(10.0)]), "TAR": (DISTILLED, 74.5, [result(15.0)])}
        text = table_text(write_table(tmp_path, runs, **about), tmp_path)
        assert "paper" not in text and "74.5" not in text and "one seed" in text
        assert tables_in(text)[0]["TAR"]["gain"] == ("+5.0" if about.get("dataset") else "+10.0")

    def test_over_equal_cost_and_the_verdict(self, tmp_path):
        text = table_text(self.four_rows(tmp_path), tmp_path)
        [rows] = tables_in(text)
        over = {title: row["over equal cost"] for title, row in rows.items()}
        assert over == {"student": "-", "part": "-", "TAR": "+3.0 ± 1.4", "teacher": "-", "equal": "-"}
        assert rows["equal"]["gain"] == "+8.5 ± 3.5" and rows["teacher"]["gain"] == "+9.5 ± 2.1"
        said = "The student passes its teacher: 42.0 AP against 40.0, +2.0 ± 4.2, above in 1 of 2 seeds."
        said += " Over the plain student of the same epochs: +11.5 ± 2.1 AP, +17.2 ± 3.2 AP50."
        assert f"\n{said} Over the plain student of equal cost: +3.0 ± 1.4 AP, +4.5 ± 2.1 AP50.\n" in text
        assert text.count("The student") == 1

    def test_on_voc_all_is_of_vocs_own_figure(self, tmp_path):
        text = table_text(self.four_rows(tmp_path, dataset="voc"), tmp_path)
        assert tables_in(text)[0]["TAR"]["over equal cost"] == "+6.0 ± 2.8"
        assert "84.0 VOC07 mAP against 80.0" in text and "+23.0 ± 4.2 VOC07 mAP, +17.2 ± 3.2 AP50" in text

    def test_seeds_are_compared_with_themselves(self, tmp_path):
        index = self.four_rows(tmp_path)
        (tmp_path / "run2-0/result.json").unlink()  # TAR has its second seed only
        text = table_text(index, tmp_path)
        [rows] = tables_in(text)
        assert rows["TAR"]["over equal cost"] == "+2.0" and rows["TAR"]["gain"] == "+13.0"
        assert "passes its teacher: 44.0 AP against 39.0." in text and "of up to 2 seeds" in text
        (tmp_path / "run3-1/result.json").unlink()  # the teacher its first
        text = table_text(index, tmp_path)
        assert "The student" not in text and "Over the plain student of the same epochs: +13.0 AP, +19.5 AP50." in text

    def test_a_figure_that_could_not_be_measured_has_no_gain(self, tmp_path):
        index = self.four_rows(tmp_path)
        (tmp_path / "run2-0/result.json").write_text(json.dumps(result(40.0) | {"AP50": None, "AP": None}))
        text = table_text(index, tmp_path)
        [rows] = tables_in(text)
        assert (rows["TAR"]["AP"], rows["TAR"]["gain"]) == ("-", "+13.0") and "+13.0 AP, +19.5 AP50." in text

    def test_nothing_has_ended(self, tmp_path):
        index = write_table(tmp_path, {"student": (PLAIN, None, [None])})
        text = table_text(index, tmp_path)
        assert "no run has ended" in text and tables_in(text)[0]["student"]["AP"] == "-"
        assert classes_text(index, tmp_path) is None

    @pytest.mark.parametrize("dataset", ["coco", "voc"])
    def test_each_class_of_each_row_and_what_the_method_gains_there(self, tmp_path, dataset):
        index = self.four_rows(tmp_path, dataset=dataset)
        # AP of cat and cow, seed by seed; AP50 is twice and VOC's own figure three times as large
        figures = {
            "run0-0": (10.0, None),
            "run0-1": (12.0, None),
            "run1-0": (11.0, 5.0),
            "run1-1": (11.0, 5.0),
            "run2-0": (20.0, 7.0),
            "run2-1": (26.0, 8.0),
            "run3-0": (19.0, 9.0),
            "run4-0": (15.0, 7.5),
            "run4-1": (15.0, 7.5),
        }
        (tmp_path / "run3-1/result.json").unlink()  # the teacher has its first seed only
        for run, aps in figures.items():
            file = tmp_path / run / "result.json"
            rows = {
                name: {"AP": ap, "AP50": ap and 2 * ap, "voc07": ap and 3 * ap}
                for name, ap in zip(("cat", "cow"), aps, strict=True)
            }
            file.write_text(json.dumps(json.loads(file.read_text()) | {"per_class": rows}))
        text = classes_text(index, tmp_path)
        titles = re.findall("(.*) of each class:", text)
        assert titles == ["AP", "AP50", *["VOC07 AP"] * (dataset == "voc")]
        rows, *others = tables_in(text)
        gains = [table["cat"]["TAR: over plain"] for table in others]
        assert gains == ["+24.0 ± 5.7", "+36.0 ± 8.5"][: len(titles) - 1]
        assert rows["cat"] == {
            "class": "cat",
            "student": "11.0 ± 1.4",
            "part": "11.0 ± 0.0",
            "TAR": "23.0 ± 4.2",
            "teacher": "19.0",
            "equal": "15.0 ± 0.0",
            "TAR: over teacher": "+1.0",
            "TAR: over plain": "+12.0 ± 2.8",
            "TAR: over equal cost": "+8.0 ± 4.2",
        }
        assert (rows["cow"]["student"], rows["cow"]["TAR: over plain"]) == ("-", "-")  # no ground truth of it, say
        assert (rows["cow"]["TAR: over teacher"], rows["cow"]["TAR: over equal cost"]) == ("-2.0", "+0.0 ± 0.7")

    def test_the_curve_of_each_row_and_how_often_its_gate_is_open(self, tmp_path):
        none = [None] * 4
        plain = [log_of([None] * 8, e4={"AP": ap - 20}, e8={"AP": ap}) for ap in (30.0, 33.0)]
        taught = [log_of([0.5, 0.7, 0.8, 0.8, *none], e8={"AP": 50.0})]
        taught += [log_of([0.4, 0.6, 0.9, 0.9, *none], e8={"AP": 52.0})]
        runs = {
            "student": (PLAIN, None, [result(30.0), result(33.0)], plain),
            "TAR": (DISTILLED, None, [result(50.0), result(52.0)], taught),
        }
        index = write_table(tmp_path, runs, dataset="coco")
        text = table_text(index, tmp_path)
        _, curves, gates = tables_in(text)
        assert "AP after so many epochs" in text and "regression gate" in text
        assert curves["student"] == {"run": "student", "4": "11.5 ± 2.1", "8": "31.5 ± 2.1"}
        assert curves["TAR"] == {"run": "TAR", "4": "-", "8": "51.0 ± 1.4"}
        # of 8 steps the quarters are 1 and 2, 3 and 4, ...
        line = {"run": "TAR", "first": "55.0 ± 7.1", "second": "85.0 ± 7.1", "third": "-", "last": "-"}
        assert gates == {"TAR": line}

        (tmp_path / "run1-1/log.jsonl").write_text('{"step": 1}\n{"ste')  # a broken log leaves the figures
        text = table_text(index, tmp_path)
        assert len(tables_in(text)) == 1 and "run1-1/log.jsonl: line 2 is none of a run's log" in text

    def test_a_line_of_many_steps_lies_where_they_begin_and_weighs_as_many(self, tmp_path):
        steps = [{"step": 3, "gate_open": 0.5}, {"step": 4, "gate_open": 0.9}, {"step": 12, "gate_open": 0.7}]
        log = [*steps, {"step": 16}]  # the teacher was asked up to step 6, say
        index = write_table(tmp_path, {"TAR": (DISTILLED, None, [result(50.0)], [log])})
        _, gates = tables_in(table_text(index, tmp_path))
        assert gates["TAR"] == {"run": "TAR", "first": "60.0", "second": "70.0", "third": "-", "last": "-"}

    def test_on_voc_the_curve_is_of_vocs_own_figure(self, tmp_path):
        log = log_of([None], e4={"AP": 30.0, "voc07": 55.0}, e8={"AP": 40.0, "voc07": 66.0})
        text = table_text(write_table(tmp_path, {"student": (PLAIN, None, [result(40.0)], [log])}), tmp_path)
        assert tables_in(text)[1]["student"] == {"run": "student", "4": "55.0", "8": "66.0"}
        assert "VOC07 mAP after so many epochs" in text

    def test_one_evaluation_is_no_curve(self, tmp_path):
        index = write_table(tmp_path, {"student": (PLAIN, None, [result(30.0)], [log_of([None], e8={"voc07": 30.0})])})
        assert len(tables_in(table_text(index, tmp_path))) == 1

    def test_a_figure_that_does_not_exist_is_a_dash(self):
        assert (spread([1.25]), spread([1.0, 2.0]), spread([]), spread([1.0, None])) == ("1.2", "1.5 ± 0.7", None, None)

    @pytest.mark.parametrize(
        "text", ['{"step": 1}\n\n', '{"step": 1}\n3\n', '{"step": 1}\n{"epoch": 1}', '{"step": 1}\n{']
    )
    def test_a_broken_log_is_named_with_its_line(self, tmp_path, text):
        (tmp_path / "log.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"log\.jsonl: line 2 is none of a run's log"):
            read_log(tmp_path / "log.jsonl")


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
        text = "The student passes its teacher: 50.0 AP against 45.0, +5.0 ± 0.0, above in 2 of 2 seeds."
        assert text in said
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
            "120.0 VOC07 mAP against 100.0" in said and "+40.0 VOC07 mAP, +30.0 AP50" in said and note["papers"]
        )  # result() has twice AP for VOC07

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


def test_the_curves_of_a_table_are_drawn_in_a_file(killed_table, tmp_path, capsys):
    call(evaluation.main, "--table", "decay", "--results", killed_table.folder, "--output", tmp_path / "curves")
    file = tmp_path / "curves/table-decay-shapes-faster-rcnn.svg"
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    text = file.read_text()
    [note] = killed_table.folder.glob("table-decay-*.json")
    titles = [row["title"] for row in json.loads(note.read_text())["rows"]]
    assert len(titles) == text.count("<polyline") == text.count("<polygon") == 3
    assert all(f">{title}</text>" in text for title in titles)


def test_the_classes_of_a_table_are_printed_under_it(killed_table, capsys):
    call(evaluation.main, "--table", "decay", "--results", killed_table.folder, "--per-class")
    printed = capsys.readouterr().out
    rows, by_ap50 = tables_in(printed)[-2:]
    assert "AP50 of each class:" in printed and rows.keys() == by_ap50.keys()
    [note] = killed_table.folder.glob("table-decay-*.json")
    plain = json.loads(note.read_text())["rows"][0]
    results = [json.loads((killed_table.folder / run / "result.json").read_text()) for run in plain["runs"]]
    shown = {name: float(row[plain["title"]].split(" ± ")[0]) for name, row in rows.items()}
    one, other = ({name: row["AP"] for name, row in result["per_class"].items()} for result in results)
    assert shown == {name: pytest.approx((one[name] + other[name]) / 2, abs=0.051) for name in one}


def test_classes_are_of_a_table(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(evaluation.main, "--weights", tmp_path / "last.pth", "--per-class")
    assert stopped.value.code == 2 and "--per-class needs --table NAME" in capsys.readouterr().err


def test_curves_of_a_table_without_runs_are_said_in_a_line(tmp_path, capsys):
    row = {"title": "teacher", "kind": "teacher", "paper": None, "command": "", "runs": ["gone"]}
    index = {"dataset": "shapes", "detector": "faster-rcnn", "test_images": 4, "papers": False, "rows": [row]}
    (tmp_path / "table-claim-shapes-faster-rcnn.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit) as stopped:
        call(evaluation.main, "--table", "claim", "--results", tmp_path, "--output", tmp_path / "curves")
    assert stopped.value.code == 2 and "no run of it has been evaluated yet" in capsys.readouterr().err
    assert not (tmp_path / "curves").exists()


def test_a_table_that_was_not_run_is_said_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(evaluation.main, "--table", "voc", "--results", tmp_path)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "run train.py --table voc first" in error
    assert len(error.strip().splitlines()) == 1


def test_a_reader_who_has_seen_enough_is_no_error(killed_table):
    """`eval.py --table ... | head`: the end that is read is closed before the table is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, ROOT / "eval.py", "--table", "decay", "--results", killed_table.folder]
    done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
