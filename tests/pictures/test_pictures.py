"""Pictures, detections, comparisons, reports and exports of small runs."""

import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import call, read_result

import eval as eval_script
from tar import UserError
from tar.data.image_files import read_image
from tar.detectors.build import build_detector
from tar.method.backbone_level import gaussian_mask
from tar.method.regression_level import paired_iou
from tar.method.step import DistillationSettings, DistillationStep
from tar.pictures.charts import chart, curves_picture, ticks
from tar.pictures.export import export
from tar.pictures.images_to_show import flags_of, load_test_image, open_test_set
from tar.pictures.method_panels import PASSES, STOPPED, TEACHER, method_rows
from tar.pictures.models_to_show import StudentAndTeacher
from tar.pictures.report import PANELS
from tar.pictures.step_on_image import step_on_image
from tar.pictures.tiles import Tile, class_colour, sheet
from tar.training import checkpoint
from tar.training.process import Process

SVG = "{http://www.w3.org/2000/svg}"
CPU = Process(0, 1, torch.device("cpu"), "none")


def picture_of(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def models(voc):
    return StudentAndTeacher(voc.run / "last.pth", CPU)


@pytest.fixture(scope="module")
def sample(voc):
    args = flags_of(checkpoint.load(voc.run / "last.pth")["settings"])
    return load_test_image(open_test_set(args, ("disc", "square")), 0)


@pytest.fixture
def view(models, sample):
    torch.manual_seed(0)
    return step_on_image(models.step, models.teacher, *sample[1:], CPU.device)


def test_the_view_is_what_the_losses_use(models, sample, view, voc):
    target, boxes_of = sample[2], models.teacher.roi_heads.box_roi_pool
    to_resized = torch.tensor([64 / 96, 48 / 72] * 2)  # 96 x 72 becomes 64 x 48
    for (_, _, mask, error), stride in zip(view.levels, models.student.strides, strict=True):
        assert torch.allclose(mask, gaussian_mask(target["boxes"] * to_resized, *mask.shape, stride), atol=1e-5)
        assert error.shape == mask.shape and error.max() > 0
    positive = view.label > 0
    assert positive.any() and len(view.gate) == len(view.teacher_boxes) == int(positive.sum())
    assert torch.equal(view.gate, view.teacher_iou > view.region_iou)
    regions, labels = view.regions[positive], view.label[positive]
    overlaps = torch.stack([paired_iou(regions, box.expand(len(regions), 4)) for box in target["boxes"]])
    assert torch.allclose(overlaps.max(0).values, view.region_iou, atol=1e-3)  # boxes are in pixels of the given image
    assert torch.equal(target["labels"][view.object], labels) and (view.region_iou >= 0.5 - 1e-3).all()
    with torch.inference_mode():  # the teacher's head at these regions, by torchvision's own parts
        images, _ = models.teacher.transform([sample[1] / 255])
        features = models.teacher.backbone(images.tensors)
        heads = models.teacher.roi_heads
        pooled = boxes_of(features, [regions * to_resized], images.image_sizes)
        logits, _ = heads.box_predictor(heads.box_head(pooled))
    assert torch.allclose(logits.softmax(1)[:, 1:], view.teacher_probabilities, atol=1e-4)
    assert view.student_probabilities.shape == (len(labels), 2)
    saved = checkpoint.load(voc.run / "last.pth")["adapters"]
    assert saved and all(torch.equal(models.step.adapters.state_dict()[k], v) for k, v in saved.items())


def test_show_writes_a_panel_for_each_image(voc, tmp_path, capsys):
    call(eval_script.main, "--weights", voc.run / "last.pth", "--show", 2, "--output", tmp_path, "--threshold", 0.1)
    files = sorted(tmp_path.glob("*.png"))
    assert [f.stem for f in files] == ["000012", "000013"] and str(files[0]) in capsys.readouterr().out
    pixels = picture_of(files[0])
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200
    for label in (1, 2):  # both classes are drawn in their colours
        assert (pixels == class_colour(label)).all(2).sum() > 50


def test_each_level_has_a_picture_of_its_own(models, sample):
    name, *image = sample
    bars, boxes = {}, {}
    for level in ("backbone", "cls", "reg"):
        torch.manual_seed(0)
        pixels = np.asarray(models.panel(*image, 0.5, name, level).convert("RGB"))
        bars[level] = (pixels == TEACHER).all(2).sum()
        boxes[level] = sum((pixels == colour).all(2).sum() for colour in (PASSES, STOPPED))
    assert bars["cls"] > 100 and bars["backbone"] == bars["reg"] == 0
    assert boxes["reg"] > 500 > 50 > boxes["backbone"] + boxes["cls"]  # grey letters have some grey points


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_an_image_without_a_box(detector):
    build = {"fpn_channels": 16, "head_channels": 32, "rois": 16, "min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    student, teacher = (build_detector(detector, name, 2, **build).eval() for name in ("r10", "r18"))
    step = DistillationStep(student, DistillationSettings(), 16).eval()
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    view = step_on_image(step, teacher, torch.full((3, 64, 64), 90, dtype=torch.uint8), target, CPU.device)
    assert not (view.label > 0).any() and len(view.gate) == 0
    assert all(mask.max() == 0 for _, _, mask, _ in view.levels)
    assert sheet(method_rows(view, ("a", "b")), "title").width > 200


def test_show_of_a_plain_student_and_of_files(plain, voc, tmp_path, capsys):
    call(eval_script.main, "--weights", plain.run / "last.pth", "--show", 1, "--output", tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.png"))) == 1
    own = tmp_path / "own.jpg"
    Image.new("RGB", (120, 80), (90, 20, 20)).save(own)
    inside, weights = voc.data / "JPEGImages/000013.jpg", voc.run / "last.pth"
    call(eval_script.main, "--weights", weights, "--show", own, inside, "--output", tmp_path / "b")
    with_truth, without = picture_of(tmp_path / "b/000013.png"), picture_of(tmp_path / "b/own.png")
    assert with_truth.shape[0] > 1.5 * without.shape[0]  # masks and regions need the ground truth
    nowhere = "--data-path", tmp_path / "nowhere", "--output", tmp_path / "c"
    call(eval_script.main, "--weights", weights, "--show", own, *nowhere)
    assert "Note: no ground truth" in capsys.readouterr().out and (tmp_path / "c/own.png").is_file()


def test_a_teacher_that_is_gone_or_of_other_classes_is_named(voc, plain, tmp_path):
    saved = checkpoint.load(voc.run / "last.pth")
    saved["settings"]["teacher_weights"] = str(tmp_path / "gone.pth")
    checkpoint.save(tmp_path / "last.pth", {k: v for k, v in saved.items() if k not in ("format", "digest")})
    with pytest.raises(UserError, match=r"gone.pth: the teacher of .* give --teacher-weights FILE"):
        StudentAndTeacher(tmp_path / "last.pth", CPU)
    with pytest.raises(UserError, match="its classes"):
        StudentAndTeacher(voc.run / "last.pth", CPU, plain_weights=plain.run / "last.pth")
    for run, name in ((voc.run, "student"), (plain.run, "plain")):  # the run beside it has its name by chance
        shutil.copytree(run, tmp_path / name)
    assert StudentAndTeacher(tmp_path / "student/last.pth", CPU).plain is None


def test_tiles_draw_where_they_are_told():
    tile = Tile(torch.zeros(3, 10, 20, dtype=torch.uint8), "", 200).box([2, 1, 12, 9], (255, 0, 0), width=1)
    rows, columns = np.nonzero(np.asarray(tile.picture)[..., 0] == 255)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 10, 119, 89)
    # two cells of 64 pixels over an image of 96: the first one's edge is at two thirds
    tile = Tile(torch.zeros(3, 96, 96, dtype=torch.uint8), "", 240).heat(
        torch.eye(2)[:1].T @ torch.eye(2)[:1], (64, 64)
    )
    bright = np.asarray(tile.picture)[..., 1] > 60
    assert bright[:160, :160].all() and not bright[160:].any() and not bright[:, 160:].any()


def test_predict_draws_and_writes_what_the_detector_says(voc, tmp_path, capsys):
    folder, weights, out = tmp_path / "photos/more", voc.run / "last.pth", tmp_path / "out"
    folder.mkdir(parents=True)
    Image.open(voc.data / "JPEGImages/000012.jpg").save(folder / "one.png")
    Image.open(voc.data / "JPEGImages/000013.jpg").convert("L").save(tmp_path / "photos/two.jpg")
    (tmp_path / "photos/broken.jpg").write_bytes(b"no image")
    (tmp_path / "photos/notes.txt").write_text("no image")
    flags = ("--predict", tmp_path / "photos", "--threshold", 0.05, "--output", out, "--amp", "none")
    call(eval_script.main, "--weights", weights, *flags)
    printed, found = capsys.readouterr().out, json.loads((out / "detections.json").read_text())
    assert [i["file_name"].rsplit("/", 1)[1] for i in found["images"]] == ["one.png", "two.jpg"]
    assert [c["name"] for c in found["categories"]] == ["disc", "square"]
    with torch.inference_mode():
        wanted = checkpoint.load_detector(weights)[0]([read_image(folder / "one.png") / 255])[0]
    mine, kept = [a for a in found["annotations"] if a["image_id"] == 2], wanted["scores"] >= 0.05
    assert len(mine) == int(kept.sum()) > 0
    assert [a["score"] for a in mine] == pytest.approx(wanted["scores"][kept].tolist(), abs=1e-5)
    x0, y0, x1, y1 = wanted["boxes"][0].tolist()
    assert mine[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
    assert sorted(p.name for p in out.glob("*.png")) == ["2-one.png", "3-two.png"]
    assert "Left out: " in printed and "broken.jpg" in printed
    assert f"{len(found['annotations'])} detections on 2 images" in printed


def test_compare_prints_figures_and_classes(voc, tmp_path, capsys):
    pair = voc.teacher, voc.run
    call(eval_script.main, "--compare", *pair, "--json", tmp_path / "c.json", "--threads", 1)
    out, found = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    for run in pair:
        column = found["figures"][run.name]
        assert column["AP"] == read_result(run)["AP"] and column["GFLOP an image"] > 0
    assert "| disc " in out and "difference" in out


def test_a_report_is_one_whole_page(voc, tmp_path):
    call(eval_script.main, "--report", voc.teacher, voc.run, "--output", tmp_path, "--threads", 1)
    text = (tmp_path / "report.html").read_text()
    page = ElementTree.fromstring(text.removeprefix("<!doctype html>"))  # as XML: every element is closed
    sources = [element.get(name, "data:") for element in page.iter() for name in ("src", "href")]
    assert all(source.startswith("data:") for source in sources)
    assert len([*page.iter(f"{SVG}svg")]) >= 6 and len([*page.iter("img")]) == 2 * PANELS
    for word in ("distill_backbone", "Precision and recall", "learning rate", "disc"):
        assert word in text
    commands = re.findall(r"python train.py [^\n<]*", text)
    assert len(commands) == 2 and "--teacher r18" in commands[1] and "--weight-cls 0.5" in commands[1]
    assert f"--seed 0 --output {voc.run}" in commands[1]


def test_a_report_without_the_data_says_what_it_leaves_out(voc, tmp_path):
    call(eval_script.main, "--report", voc.run, "--output", tmp_path, "--data-path", tmp_path / "nowhere")
    text = (tmp_path / "report.html").read_text()
    assert "Left out: " in text and "Precision and recall" not in text and "<svg" in text


def test_charts():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.0, 0.9)[-1] == pytest.approx(0.8)
    svg = chart("a title", {"one": [(0, 1.0), (10, 3.0)], "nothing": [(0, float("nan"))]}, "x", "y")
    [points] = re.findall(r'<polyline points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.split())
    assert x0 < x1 and y0 > y1 and "nothing" not in svg  # up is less in SVG
    assert chart("t", {"a": []}, "x", "y") == ""
    assert chart("t", {"a": [(1, 2.0)]}, "x", "y").count("<circle") == 1
    [points] = re.findall(r'<polyline points="([^"]*)"', chart("t", {"a": [(i, i) for i in range(1000)]}, "x", "y"))
    assert 60 < len(points.split()) <= 120  # a long line is shortened


def test_the_picture_of_a_tables_curves_has_means_and_deviations():
    curves = {"one": {4: [30.0, 36.0, 33.0], 8: [40.0]}, "two & more": {4: [0.0]}}
    root = ElementTree.fromstring(curves_picture("a <title>", "AP, percent", curves))
    at = {kind: [_points(x.get("points")) for x in root.iter(SVG + kind)] for kind in ("polyline", "polygon")}
    [(x4, mean), (x8, top)], [(_, bottom)] = at["polyline"]
    scale = (bottom - top) / 40  # pixels of one point of AP
    assert x4 < x8 and bottom - mean == pytest.approx(33 * scale, abs=0.1)
    band = at["polygon"][0]
    assert [x for x, _ in band] == [x4, x8, x8, x4]  # along the lower side, and back along the upper one
    assert [bottom - y for _, y in band] == pytest.approx([30 * scale, 40 * scale, 40 * scale, 36 * scale], abs=0.1)
    assert {"one", "two & more", "epoch", "AP, percent"} <= {text.text for text in root.iter(SVG + "text")}
    assert root.find("{*}title").text == "a <title>"


def _points(text):
    return [tuple(map(float, point.split(","))) for point in text.split()]


READER = """
import sys, torch, torchvision
assert not any(name == "tar" or name.startswith("tar.") for name in sys.modules)
images = torch.load("images.pt")
for name in ("faster-rcnn", "retinanet"):
    model = torch.jit.load(f"{name}.pt")
    torch.save([model([image])[1][0] for image in images], f"{name}.found")
"""


def test_exported_detectors_say_the_same_without_this_package(voc, tmp_path):
    """In a fresh process."""
    torch.manual_seed(0)
    build = {"fpn_channels": 16, "min_size": 64, "max_size": 64, "anchor_scale": 4, "rpn_top_n": (50, 20)}
    models = {"retinanet": build_detector("retinanet", "r10", 2, **build).eval()}
    models["faster-rcnn"] = checkpoint.load_detector(voc.run / "last.pth")[0]
    with torch.no_grad():  # untrained: scores above torchvision's threshold
        models["retinanet"].head.classification_head.cls_logits.weight *= 20
        models["retinanet"].head.classification_head.cls_logits.bias += 3
    images = [read_image(file).float() / 255 for file in sorted((voc.data / "JPEGImages").iterdir())[:2]]
    images.append(images[0].flip(2)[:, 5:, :70])
    torch.save(images, tmp_path / "images.pt")
    for name, model in models.items():
        export(model, tmp_path / f"{name}.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", READER], cwd=tmp_path, check=True, timeout=150)
    for name, model in models.items():
        for image, found in zip(images, torch.load(tmp_path / f"{name}.found"), strict=True):
            with torch.inference_mode():
                wanted = model([image])[0]
            assert len(wanted["boxes"]) > 2 and torch.equal(found["labels"], wanted["labels"])
            assert torch.allclose(found["boxes"], wanted["boxes"], atol=1e-3)
            assert torch.allclose(found["scores"], wanted["scores"], atol=1e-5)


def test_what_is_wrong_is_named(voc, plain, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    weights = "--weights", voc.run / "last.pth"
    for flags, text in (
        ((*weights, "--predict", tmp_path / "empty"), "empty: holds no image"),
        ((*weights, "--predict", tmp_path / "a.jpg"), "a.jpg: no such image"),
        ((*weights, "--predict", tmp_path / "broken.jpg"), "broken.jpg: none of 1 files can be read"),
        ((*weights, "--export", tmp_path / "model.zip"), "ends with .pt or .onnx"),
        ((*weights, "--export", tmp_path / "nowhere/model.pt"), "no such folder"),
        (("--compare", voc.run, plain.run), "their dataset is not the same"),
        (("--compare", voc.run, tmp_path), "no folder of a run"),
        (("--compare", voc.run, tmp_path / "nowhere"), "nowhere: has no"),
        (("--compare", voc.run, voc.run / "last.pth"), "named twice"),
        (("--compare", voc.run, voc.teacher, "--show", 3), "--show needs --weights FILE"),
        ((*weights, "--threshold", 1.5), "not a score from 0 to 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(eval_script.main, *flags)
        assert stopped.value.code == 2 and text in capsys.readouterr().err
