"""Two processes over gloo: a run from end to end, and the gradient of half a batch each."""

import json

import parallel_equality
from beside import beside
from tiny_runs import call, read_log, read_result

import eval as evaluation


def test_one_process_measures_what_two_measured(two_processes, tmp_path):
    flags = ("--workers", 0, "--threads", 1, "--device", "cpu", "--json", tmp_path / "figures.json")
    call(evaluation.main, "--weights", two_processes.run / "last.pth", *flags)
    measured, result = json.loads((tmp_path / "figures.json").read_text()), read_result(two_processes.run)
    assert measured["test_images"] == result["test_images"] == 7
    assert all(measured[k] == result[k] for k in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "per_class"))


def test_both_processes_share_an_epoch_and_one_writes(two_processes):
    for run in (two_processes.teacher, two_processes.run):
        steps, epochs = read_log(run)
        assert [line["step"] for line in steps] == [1, 2, 3, 4]  # 2 epochs of 12 / (2 * 3) steps
        assert len(epochs) == 2
    distilled = [("distill_backbone" in line, line["decay"]) for line in steps]
    assert distilled == [(True, 1.0), (True, 0.5), (False, 0.0), (False, 0.0)]
    assert two_processes.out.count("2 x cpu") == 1
    config = json.loads((two_processes.run / "config.json").read_text())
    assert (config["batch_size"], config["images_per_step"]) == (3, 6)


@beside
def halves(_):
    names = ("boxes in all images", "a process without boxes")  # four processes: parallel_equality.py
    return parallel_equality.table([2], {name: parallel_equality.BATCHES[name] for name in names})


def test_every_loss_of_two_halves_has_the_gradient_of_the_whole(halves):
    assert len(halves) == 2 * (8 + 6)
    assert max(difference for difference, _ in halves.values()) < 1e-6
    assert all(not_zero for _, not_zero in halves.values())
