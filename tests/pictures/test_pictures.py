"""Pictures, detections, comparisons, reports and exports of small runs."""

import json
import re
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from small_detectors import CLASSES, KINDS, batch, make_step, pair, same
from tiny_runs import call, read_result

import eval as eval_script
from tar import UserError
from tar.data.image_files import read_image
from tar.method.backbone_level import gaussian_mask
from tar.method.regression_level import paired_iou
from tar.pictures.charts import chart, ticks
from tar.pictures.export import export
from tar.pictures.images_to_show import flags_of, images_to_show, open_test_set
from tar.pictures.method_panels import PASSES, STOPPED, TEACHER, method_rows
from tar.pictures.models_to_show import ModelsToShow
from tar.pictures.report import PANELS
from tar.pictures.step_on_image import step_on_image
from tar.pictures.tiles import class_colour, sheet, with_boxes, with_heat
from tar.training import checkpoint


@pytest.fixture(scope="module")
def models(voc):
    return ModelsToShow(voc.run / "last.pth")


@pytest.fixture(scope="module")
def sample(voc):
    """An image of the test set, and its target."""
    args = flags_of(checkpoint.load(voc.run / "last.pth")["settings"])
    return next(images_to_show(["1"], open_test_set(args, ("disc", "square"))))[1:]


def test_the_view_is_what_the_losses_use(models, sample, voc):
    view = step_on_image(models.step, models.teacher, *sample)
    truth, positive = sample[1]["boxes"] * torch.tensor([64 / 96, 48 / 72] * 2), view.positive  # 96 x 72 became 64 x 48
    assert torch.allclose(view.target["boxes"], truth, atol=1e-4) and view.image.shape == (3, 48, 64)
    for mask, error, stride in zip(view.masks, view.errors, models.models["TAR student"].strides, strict=True):
        assert torch.allclose(mask, gaussian_mask(truth, *mask.shape, stride), atol=1e-5)
        assert error.shape == mask.shape and error.max() > 0
    overlaps = torch.stack([paired_iou(positive.region, box.expand(len(positive.label), 4)) for box in truth])
    best, index = overlaps.max(0)
    assert len(best) and (best >= 0.5 - 1e-3).all() and torch.equal(sample[1]["labels"][index], positive.label)
    assert torch.equal(view.gate, paired_iou(view.teacher_boxes, truth[index]) > best)
    with torch.inference_mode():  # the teacher's head at these regions, by torchvision's own parts
        images, _ = models.teacher.transform([sample[0] / 255])
        heads, features = models.teacher.roi_heads, models.teacher.backbone(images.tensors)
        pooled = heads.box_roi_pool(features, [positive.region], images.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        boxes = heads.box_coder.decode(deltas, [positive.region])[range(len(best)), positive.label]
    assert torch.allclose(logits, positive.teacher_logits, atol=1e-4)
    assert torch.allclose(boxes, view.teacher_boxes, atol=1e-3)
    assert same(checkpoint.load(voc.run / "last.pth")["adapters"], models.step.adapters.state_dict())


def test_show_writes_a_panel_for_each_image(voc, plain, tmp_path, capsys):
    flags = "--output", tmp_path, "--threshold", 0.1
    images = [voc.data / f"JPEGImages/0000{number}.jpg" for number in (13, 12)]
    call(eval_script.main, "--weights", voc.run / "last.pth", "--show", *images, *flags)
    files = sorted(tmp_path.glob("*.png"))
    assert [f.stem for f in files] == ["000012", "000013"] and str(files[0]) in capsys.readouterr().out
    pixels = np.asarray(Image.open(files[1]).convert("RGB"))
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200
    for label in (1, 2):  # both classes are drawn in their colours
        assert (pixels == class_colour(label)).all(2).sum() > 50
    call(eval_script.main, "--weights", plain.run / "last.pth", "--show", 1, *flags)
    assert Image.open(tmp_path / "image-0.png").height < pixels.shape[0] / 2  # no teacher: detections only


def test_each_level_has_a_picture_of_its_own(models, sample):
    bars, boxes = {}, {}
    for level in ("backbone", "cls", "reg"):
        pixels = np.asarray(models.panel(*sample, 0.5, "title", level).convert("RGB"))
        bars[level] = (pixels == TEACHER).all(2).sum()
        boxes[level] = sum((pixels == colour).all(2).sum() for colour in (PASSES, STOPPED))
    assert bars["cls"] > 50 and bars["backbone"] == bars["reg"] == 0
    assert boxes["reg"] > 500 > 50 > boxes["backbone"] + boxes["cls"]  # grey letters have some grey points


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_a_box(kind):
    student, teacher = pair(kind)
    image, target = torch.full((3, 64, 64), 90, dtype=torch.uint8), batch(boxless=[0])[1][0]
    view = step_on_image(make_step(student, teacher).eval(), teacher, image, target)
    assert len(view.gate) == len(view.positive.label) == 0 and all(mask.max() == 0 for mask in view.masks)
    assert sheet(method_rows(view, CLASSES), "title").width > 200


def test_models_that_do_not_belong_together_are_named(voc, plain, tmp_path):
    weights, none = voc.run / "last.pth", tmp_path / "none.pth"
    with pytest.raises(UserError, match=r"none.pth: the teacher of .* give --teacher-weights FILE"):
        ModelsToShow(weights, teacher_weights=none)
    with pytest.raises(UserError, match=r"a faster-rcnn of circle.*, but .* is a faster-rcnn of disc, square"):
        ModelsToShow(weights, plain_weights=plain.run / "last.pth")
    saved = checkpoint.load(weights)
    saved["adapters"] = {name: value[:1] for name, value in saved["adapters"].items()}
    checkpoint.save(none, {k: v for k, v in saved.items() if k != "format"})
    with pytest.raises(UserError, match="its adapters do not lead to this teacher's features"):
        ModelsToShow(none)


def test_tiles_draw_where_they_are_told():
    image = torch.zeros(3, 10, 20, dtype=torch.uint8)
    picture = with_boxes(image, torch.tensor([[2.0, 1, 12, 9]]), [(255, 0, 0)], side=200)
    assert Image.fromarray(np.asarray(picture)[..., 0] == 255).getbbox() == (20, 10, 121, 91)  # the ends are outside
    # two cells of 64 pixels over an image of 96, which is drawn at 232: the first one's edge is at 155
    bright = np.asarray(with_heat(image.new_zeros(3, 96, 96), torch.tensor([[1.0, 0], [0, 0]]), 64, 1.0))[..., 1] > 60
    assert bright[:152, :152].all() and not bright[158:].any() and not bright[:, 158:].any()


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
    assert sorted(p.name for p in out.glob("*.png")) == ["000002-one.png", "000003-two.png"]
    assert "Left out: " in printed and "broken.jpg" in printed
    assert f"{len(found['annotations'])} detections at 0.05 or more on 2 images" in printed


def test_compare_prints_figures_and_classes(voc, tmp_path, capsys):
    pair = voc.teacher, voc.run
    call(eval_script.main, "--compare", *pair, "--json", tmp_path / "c.json", "--threads", 1)
    out, found = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    for run in pair:
        column = found["figures"][run.name]
        assert column["AP"] == read_result(run)["AP"] and column["GFLOP an image"] > 0
    assert "| disc " in out and "difference" in out


def test_a_report_is_one_whole_page(voc, tmp_path, capsys):
    call(eval_script.main, "--report", voc.teacher, voc.run, "--output", tmp_path, "--threads", 1)
    text = (tmp_path / "report.html").read_text()
    page = ElementTree.fromstring(text.removeprefix("<!doctype html>"))  # as XML: every element is closed
    sources = [element.get(name, "data:") for element in page.iter() for name in ("src", "href")]
    assert all(source.startswith("data:") for source in sources)
    assert len([*page.iter("svg")]) == 7 and len([*page.iter("img")]) == 2 * PANELS
    settings = "weight_cls", "torchvision"
    for word in ("distill_backbone", "gate_open", "| disc ", f"{read_result(voc.run)['AP50']:.1f}", *settings):
        assert word in text
    call(eval_script.main, "--report", voc.run, "--output", tmp_path, "--data-path", tmp_path / "nowhere")
    text = (tmp_path / "report.html").read_text()
    assert "Left out: " in text and "<svg" in text and "<img" not in text
    assert f"Pictures of {voc.run.name} are left out: {tmp_path}/nowhere: cannot find" in capsys.readouterr().out


def test_charts():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.0, 0.9)[-1] == pytest.approx(0.8) and ticks(3, 3) == [3]
    lines = {"one": [(0, 1.0), (10, 4.0), (5, 2.0)], "no numbers": [(0, float("nan")), (1, None)], "two": [(10, 0.0)]}
    text = chart("a <title>", lines)
    found = re.findall(r'<polyline points="([^"]*)"', text)
    one, two = ({tuple(map(float, point.split(","))) for point in points.split()} for points in found)
    (x0, y0), (x5, y5), (x10, y10) = sorted(one)
    assert x5 == (x0 + x10) / 2 and two == {(x10, bottom := next(iter(two))[1])}
    assert [bottom - y for y in (y0, y5, y10)] == pytest.approx([(bottom - y10) / 4, (bottom - y10) / 2, bottom - y10])
    assert "no numbers" not in text and "a &lt;title&gt;" in text and chart("t", {"a": []}) == ""


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("kind", KINDS)
def test_exported_detectors_say_the_same_without_this_package(kind, tmp_path):
    model = pair(kind)[0].eval()
    images = [*batch()[0], torch.rand(3, 91, 70)]
    assert "labels from 1: disc, square" in export(model, tmp_path / "model.pt", ("disc", "square"))
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        names = file.namelist()
    assert any("/__torch__/torchvision/" in name for name in names) and not any("/tar/" in name for name in names)
    exported = torch.jit.load(tmp_path / "model.pt")
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        for image in images:
            [wanted], (_, [found]) = model([image]), exported([image])
            assert len(wanted["boxes"]) > 2 and torch.equal(found["labels"], wanted["labels"])
            for name, most in (("boxes", 1e-3), ("scores", 1e-5)):
                assert torch.allclose(found[name], wanted[name], atol=most)


def test_what_is_wrong_is_named(voc, plain, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    weights = "--weights", voc.run / "last.pth"
    for flags, text in (
        ((*weights, "--show", tmp_path / "broken.jpg"), "broken.jpg: not in the test set"),
        (("--weights", plain.run / "last.pth", "--show", 1, "--level", "reg"), "has no teacher"),
        ((*weights, "--predict", tmp_path / "empty"), "empty: holds no image"),
        ((*weights, "--predict", tmp_path / "a.jpg"), "a.jpg: no such image"),
        ((*weights, "--predict", tmp_path / "broken.jpg"), "broken.jpg: none of 1 files can be read"),
        ((*weights, "--predict", voc.data, "--output", tmp_path / "broken.jpg"), "broken.jpg: cannot be written"),
        ((*weights, "--export", tmp_path / "model.zip"), "ends with .pt or .onnx"),
        ((*weights, "--export", tmp_path / "nowhere/model.pt"), "nowhere/model.pt: cannot be written"),
        (("--compare", voc.run, plain.run), "test images or classes are not the same"),
        (("--compare", voc.run, tmp_path), "no folder of a run"),
        (("--compare", voc.run, voc.run), "named twice"),
        (("--compare", voc.run, voc.teacher, "--show", 3), "--show needs --weights"),
        ((*weights, "--export", "model.pt", "--json", "figures.json"), "--json: not allowed with argument --export"),
        (("--report", voc.run, "--json", "figures.json"), "--json needs --weights or --compare"),
        ((*weights, "--threshold", 1.5), "not a score from 0 to 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(eval_script.main, *flags)
        assert stopped.value.code == 2 and text in capsys.readouterr().err
