"""A run on a set in COCO's format: what it trains on, and its figures against pycocotools' own of the original file."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from coco_sets import FIGURES, annotation, entry, pycocotools_stats, write_json
from PIL import Image, ImageDraw
from tiny_runs import SMALL, call, read_result

import eval as evaluation
import train
from tar.data.coco import Coco
from tar.evaluation.detect import detect
from tar.training import checkpoint, process


def write_squares(folder, split, first, count):
    """Images with a red square (category 17) and a blue one (3) each; every third is upright, the first is empty."""
    images, boxes = [], []
    for k in range(count):
        images.append(entry(first + k, *((72, 96) if k % 3 == 2 else (96, 72))))
        picture = Image.new("RGB", (images[-1]["width"], images[-1]["height"]), (70, 70, 70))
        for colour, category, shift in (("red", 17, 0), ("blue", 3, 34)) if k else ():
            x, y = (int(value) + shift for value in np.random.default_rng(first + k).integers(1, 10, 2))
            ImageDraw.Draw(picture).rectangle((x, y, x + 27, y + 27), fill=colour)
            boxes.append(annotation(first + k, category, [x, y, 28, 28], area=784, iscrowd=0, id=len(boxes) + 1))
        picture.save(folder / images[-1]["file_name"])
    return write_json(folder / f"{split}.json", images, boxes, ((17, "red"), (3, "blue")))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A run on 13 images, 12 of them with boxes, and the sizes of the images of its batches."""
    folder, sizes, to_device = tmp_path_factory.mktemp("squares"), [], train.to_device

    def spy(images, *rest):
        sizes.append([tuple(image.shape[1:]) for image in images])
        return to_device(images, *rest)

    flags = [*SMALL, "--dataset", "coco", "--student", "r10", "--limit-train", 0, "--limit-test", 0]
    for split, first, count in (("train", 40, 13), ("val", 60, 8)):
        file = write_squares(folder, split, first, count)
        flags += [f"--{split}-json", file, f"--{split}-images", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "to_device", spy)
        call(train.main, *flags, "--epochs", 4, "--eval-every", 4, "--rpn-top-n", 200, 50, "--output", folder / "run")
    return Namespace(folder=folder, run=folder / "run", val=file, sizes=sizes)


def test_it_trains_on_images_with_boxes_in_batches_of_one_orientation_and_tests_on_all(squares):
    """Of the 12 images with boxes 8 are wide: an epoch has two batches of four wide ones and one of upright ones."""
    result = read_result(squares.run)
    assert (result["train_images"], result["test_images"], len(squares.sizes)) == (12, 8, 4 * 3)
    for k in range(0, 12, 3):
        assert sorted(squares.sizes[k : k + 3]) == [[(72, 96)] * 4] * 2 + [[(96, 72)] * 4]


def test_training_and_eval_give_pycocotools_own_figures_of_the_original_file(squares):
    model, saved = checkpoint.load_detector(squares.run / "last.pth")
    assert saved["classes"] == ["blue", "red"]
    numbers = [image["id"] for image in json.loads(squares.val.read_text())["images"]]
    found, source = [], Coco(squares.val, squares.folder)
    for r in detect(model.to(memory_format=torch.channels_last), source, torch.device("cpu"), batch_size=4):
        for (x0, y0, x1, y1), label, score in zip(r["boxes"].tolist(), r["labels"], r["scores"].tolist(), strict=True):
            bbox, category = [x0, y0, x1 - x0, y1 - y0], {1: 3, 2: 17}[int(label)]
            found.append(annotation(numbers[r["image_id"]], category, bbox, score=score))
    expected = pycocotools_stats(squares.val, found)
    assert expected[1] > 5  # it has learnt something: the figures are not those of nothing found
    file, result = squares.folder / "figures.json", read_result(squares.run)
    call(evaluation.main, "--weights", squares.run / "last.pth", "--json", file, "--threads", 1, "--workers", 0)
    for figures in (result, json.loads(file.read_text())):
        assert [figures[name] for name in FIGURES] == pytest.approx(expected)
        assert figures["per_class"] == result["per_class"]


@pytest.mark.parametrize(
    ("trained", "fast", "printed"), [("bf16", False, "none"), ("fp16", True, "bf16"), ("none", True, "none")]
)
def test_a_run_in_16_bits_is_measured_in_16_where_the_processor_is_fast(
    trained, fast, printed, squares, monkeypatch, tmp_path, capsys
):
    saved = checkpoint.load(squares.run / "last.pth")
    checkpoint.save(tmp_path / "last.pth", {**saved, "settings": {**saved["settings"], "amp": trained}})
    monkeypatch.setattr(process, "has_bf16", lambda device: fast)
    call(evaluation.main, "--weights", tmp_path / "last.pth", "--threads", 1, "--workers", 0)
    assert f"8 test images of coco, {printed} autocast" in capsys.readouterr().out
