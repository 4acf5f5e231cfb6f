"""Pictures, comparisons, reports and exports of small runs."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import call, read_result

import eval as eval_script
import train
from tar import UserError, checkpoint, show
from tar.distill import Levels, Step
from tar.export import export, stock
from tar.images import read_image
from tar.losses import paired_iou
from tar.machine import Machine
from tar.masks import gaussian_mask
from tar.models import build_detector
from tar.pictures import TEACHER, UNUSED, USED, Tile, class_colour, few_colours, look, panel, soft_row
from tar.report import curves_picture, plot, ticks

CPU = Machine(0, 1, torch.device("cpu"), "none")


def picture_of(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def trio(voc):
    return show.Trio(voc.run / "last.pth", CPU)


@pytest.fixture(scope="module")
def sample(voc):
    args = show.flags_of(checkpoint.load(voc.run / "last.pth")["settings"])
    return show.sample_of(show.test_set_of(args, ("disc", "square")), 0)


# Pictures of the method


def test_a_look_shows_what_the_losses_used(trio, sample):
    _, image, target = sample
    torch.manual_seed(0)
    view = look(trio.step, trio.teacher, image, target, CPU.device)
    width, height = 64, 48  # 96 x 72 after the resize to no more than 64
    boxes = target["boxes"] * torch.tensor([width / 96, height / 72] * 2)
    for level, stride in zip(view.masks, trio.student.strides, strict=True):
        assert torch.allclose(level, gaussian_mask(boxes, *level.shape, stride), atol=1e-5)
    assert [tuple(e.shape) for e in view.errors] == [tuple(m.shape) for m in view.masks]
    positive = view.label > 0
    assert positive.any() and len(view.gate) == len(view.teacher_boxes) == int(positive.sum())
    assert torch.equal(view.gate, view.teacher_iou > view.region_iou)
    best = torch.stack([paired_iou(view.regions[positive], b.expand(int(positive.sum()), 4)) for b in target["boxes"]])
    assert torch.allclose(best.max(0).values, view.region_iou, atol=1e-3)  # boxes are in pixels of the given image
    assert (view.region_iou >= 0.5 - 1e-3).all()


def test_adapters_are_those_of_the_checkpoint(trio, voc):
    saved = checkpoint.load(voc.run / "last.pth")["adapters"]
    assert saved and all(torch.equal(trio.step.adapters.state_dict()[k], v) for k, v in saved.items())


def test_show_writes_a_panel_an_image(voc, tmp_path, capsys):
    call(eval_script.main, "--weights", voc.run / "last.pth", "--show", 2, "--output", tmp_path, "--threshold", 0.1)
    files = sorted(tmp_path.glob("*.png"))
    assert [f.stem for f in files] == ["000012", "000013"] and str(files[0]) in capsys.readouterr().out
    pixels = picture_of(files[0])
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200
    for label in (1, 2):  # both classes are drawn in their colours
        assert (pixels == class_colour(label)).all(2).sum() > 50


def test_an_image_whose_only_positives_are_its_boxes(trio, sample):
    _, image, target = sample
    view = look(trio.step, trio.teacher, image, target, CPU.device)
    view.region_iou = torch.ones_like(view.region_iou)
    assert soft_row(view, trio.classes) == []
    page = panel(view, trio.classes, trio.student.strides, {}, 0.5, "title", level="cls")
    assert page.width > 200


def test_a_run_called_plain_by_chance_is_left_alone(voc, plain, tmp_path):
    for run, name in ((voc.run, "student"), (plain.run, "plain")):
        shutil.copytree(run, tmp_path / name)
    assert show.Trio(tmp_path / "student/last.pth", CPU).plain is None


def test_each_level_has_a_picture_of_its_own(voc, tmp_path):
    seen = {}
    for level in ("backbone", "cls", "reg"):
        call(
            *(eval_script.main, "--weights", voc.run / "last.pth", "--show", 1, "--level", level),
            *("--output", tmp_path / level),
        )
        seen[level] = picture_of(tmp_path / level / "000012.png")
    bars = {level: (pixels == TEACHER).all(2).sum() for level, pixels in seen.items()}
    boxes = {level: sum((pixels == c).all(2).sum() for c in (USED, UNUSED)) for level, pixels in seen.items()}
    assert bars["cls"] > 100 and bars["backbone"] == bars["reg"] == 0
    assert boxes["reg"] > 500 > 50 > boxes["backbone"] + boxes["cls"]  # grey letters have some grey points


def test_soft_labels_are_those_of_the_heads(trio, sample):
    _, image, target = sample
    torch.manual_seed(0)
    view = look(trio.step, trio.teacher, image, target, CPU.device)
    assert view.teacher_says.shape == view.student_says.shape == (len(view.gate), 2)
    assert ((view.teacher_says.sum(1) <= 1) & (view.teacher_says.min(1).values >= 0)).all()
    model, batch = trio.teacher, [image / 255]
    with torch.inference_mode():
        images, _ = model.transform(batch)
        regions = view.regions[view.label > 0] * torch.tensor([64 / 96, 48 / 72] * 2)
        pooled = model.roi_heads.box_roi_pool(model.backbone(images.tensors), [regions], images.image_sizes)
        logits, _ = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    assert torch.allclose(logits.softmax(1)[:, 1:], view.teacher_says, atol=1e-4)
    assert (view.number < len(target["boxes"])).all()
    assert torch.equal(target["labels"][view.number], view.label[view.label > 0])


def test_show_of_a_plain_student_and_of_a_file_of_ones_own(plain, voc, tmp_path, capsys):
    call(eval_script.main, "--weights", plain.run / "last.pth", "--show", 1, "--output", tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.png"))) == 1
    own = tmp_path / "own.jpg"
    Image.new("RGB", (120, 80), (90, 20, 20)).save(own)
    inside = voc.data / "JPEGImages/000013.jpg"
    call(eval_script.main, "--weights", voc.run / "last.pth", "--show", own, inside, "--output", tmp_path / "b")
    with_truth, without = picture_of(tmp_path / "b/000013.png"), picture_of(tmp_path / "b/own.png")
    assert with_truth.shape[0] > 1.5 * without.shape[0]  # masks and regions need the truth
    call(
        *(eval_script.main, "--weights", voc.run / "last.pth", "--show", own, "--output", tmp_path / "c"),
        *("--data-path", tmp_path / "nowhere"),
    )
    assert "Note: no ground truth" in capsys.readouterr().out and (tmp_path / "c/own.png").is_file()


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_a_look_at_an_image_without_a_box(detector):
    build = {"fpn_channels": 16, "head_channels": 32, "rois": 16, "min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    student, teacher = (build_detector(detector, name, 2, **build).eval() for name in ("r10", "r18"))
    step = Step(student, Levels(), 16).eval()
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    view = look(step, teacher, torch.full((3, 64, 64), 90, dtype=torch.uint8), target, CPU.device)
    assert not (view.label > 0).any() and len(view.gate) == 0 and max(float(m.max()) for m in view.masks) == 0


def test_a_teacher_that_is_gone_or_of_other_classes_is_named(voc, plain, tmp_path, capsys):
    saved = checkpoint.load(voc.run / "last.pth")
    saved["settings"]["teacher_weights"] = str(tmp_path / "gone.pth")
    checkpoint.save(tmp_path / "last.pth", {k: v for k, v in saved.items() if k not in ("format", "digest")})
    with pytest.raises(UserError, match=r"gone.pth: the teacher of .* give --teacher-weights FILE"):
        show.Trio(tmp_path / "last.pth", CPU)
    with pytest.raises(UserError, match="its classes"):
        show.Trio(voc.run / "last.pth", CPU, plain=plain.run / "last.pth")
    with pytest.raises(SystemExit):
        eval_script.main(["--compare", "a", "b", "--show", "3"])
    assert "--show needs --weights FILE" in capsys.readouterr().err


def test_tiles_draw_where_they_are_told():
    tile = Tile(torch.zeros(3, 10, 20, dtype=torch.uint8), "", 200)
    tile.box([2, 1, 12, 9], (255, 0, 0), width=1)
    pixels = np.asarray(tile.picture)
    assert pixels.shape == (100, 200, 3)
    rows, columns = np.nonzero(pixels[..., 0] == 255)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 10, 119, 89)


def test_a_map_lies_where_its_cells_are():
    """Two cells of 64 pixels over an image of 96: the first one's edge is at two thirds."""
    hot = Tile(torch.zeros(3, 96, 96, dtype=torch.uint8), "", 240).heat(
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]), (64, 64)
    )
    bright = np.asarray(hot.picture)[..., 1] > 60
    assert bright[:160, :160].all() and not bright[160:].any() and not bright[:, 160:].any()


def test_few_colours_keep_thin_lines():
    """On noise, which takes all other colours."""
    noise = torch.randint(0, 256, (3, 200, 200), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tile = Tile(noise, "", 200).box([20, 30, 150, 160], USED, width=1)
    tile.box([60, 60, 90, 90], TEACHER, width=1)
    saved = np.asarray(few_colours(tile.picture).convert("RGB")).astype(int)
    for place, colour in (((30, 80), USED), ((60, 70), TEACHER)):
        assert np.abs(saved[place] - colour).max() <= 24


# Detections on any images


def test_predict_draws_and_writes_what_the_detector_says(voc, tmp_path, capsys):
    folder = tmp_path / "photos/more"
    folder.mkdir(parents=True)
    Image.open(voc.data / "JPEGImages/000012.jpg").save(folder / "one.png")
    Image.open(voc.data / "JPEGImages/000013.jpg").convert("L").save(tmp_path / "photos/two.jpg")
    (tmp_path / "photos/notes.txt").write_text("no image")
    weights, out = voc.run / "last.pth", tmp_path / "out"
    flags = ("--predict", tmp_path / "photos", "--threshold", 0.05, "--output", out, "--amp", "none")
    call(eval_script.main, "--weights", weights, *flags)
    found = json.loads((out / "detections.json").read_text())
    assert [i["file_name"].rsplit("/", 1)[1] for i in found["images"]] == ["one.png", "two.jpg"]
    assert [c["name"] for c in found["categories"]] == ["disc", "square"]
    model, _ = checkpoint.load_detector(weights)
    image = torch.from_numpy(np.array(Image.open(folder / "one.png").convert("RGB"))).permute(2, 0, 1)
    with torch.inference_mode():
        wanted = model([image / 255])[0]
    mine = [a for a in found["annotations"] if a["image_id"] == 1]
    kept = wanted["scores"] >= 0.05
    assert len(mine) == int(kept.sum()) > 0
    assert [a["score"] for a in mine] == pytest.approx(wanted["scores"][kept].tolist(), abs=1e-5)
    x0, y0, x1, y1 = wanted["boxes"][0].tolist()
    assert mine[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
    assert sorted(p.name for p in out.glob("*.png")) == ["1-one.png", "2-two.png"]
    assert f"{len(found['annotations'])} detections on 2 images" in capsys.readouterr().out


def test_predict_names_what_is_no_image(voc, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    none = "none of 1 files can be read"
    for path, text in ((tmp_path / "empty", "holds no image"), (tmp_path / "a.jpg", "no such"), (broken, none)):
        with pytest.raises(SystemExit) as stopped:
            call(eval_script.main, "--weights", voc.run / "last.pth", "--predict", path, "--output", tmp_path / "out")
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and text in error and str(path) in error


# Runs side by side


def test_compare_says_what_differs(voc, tmp_path, capsys):
    pair = voc.teacher, voc.run
    call(eval_script.main, "--compare", *pair, "--output", tmp_path, "--json", tmp_path / "c.json", "--threads", 1)
    out, found = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    for run in pair:
        column, result = found["figures"][run.name], read_result(run)
        assert column["AP"] == result["AP"] and column["GFLOP an image"] > 0
        assert found["errors"][run.name]["AP50"] == pytest.approx(result["AP50"], abs=2.0)  # no difficult as crowds
    assert "| disc " in out and "difference" in out and "| classification |" in out
    assert picture_of(tmp_path / "errors.png").shape[1] > 500


def test_predict_leaves_out_what_is_no_image_and_says_so(voc, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no image")
    Image.new("RGB", (90, 70), (20, 90, 20)).save(folder / "b.png")
    call(eval_script.main, "--weights", voc.run / "last.pth", "--predict", folder, "--output", tmp_path / "out")
    out, found = capsys.readouterr().out, json.loads((tmp_path / "out/detections.json").read_text())
    assert "Left out: " in out and "a.jpg" in out and "on 1 images" in out
    assert [i["file_name"].rsplit("/", 1)[1] for i in found["images"]] == ["b.png"]


def test_runs_on_other_images_are_not_compared(voc, plain, tmp_path, capsys):
    for runs, text in (
        ((voc.run, plain.run), "their dataset is not the same"),
        ((voc.run, tmp_path), "no folder of a run"),
        ((voc.run, tmp_path / "nowhere"), "nowhere: has no"),
        ((voc.run, voc.run / "last.pth"), "named twice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            call(eval_script.main, "--compare", *runs)
        assert stopped.value.code == 2 and text in capsys.readouterr().err


class Checker(HTMLParser):
    """Counts elements, and notes what is not closed or comes from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.count, self.outside = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("meta", "link", "img", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline", "circle"):
            assert self.open.pop() == tag


def test_a_report_is_one_whole_page(voc, tmp_path):
    call(eval_script.main, "--report", voc.teacher, voc.run, "--output", tmp_path, "--threads", 1)
    text = (tmp_path / "report.html").read_text()
    checked = Checker(text)
    assert checked.open == [] and checked.outside == [] and "script" not in checked.count
    assert checked.count["svg"] >= 6 and checked.count["img"] == 1 + 2 * show.PANELS
    for word in ("distill_backbone", "Precision and recall", "learning rate", "Commands", "classification", "disc"):
        assert word in text
    commands = re.findall(r"python train.py [^\n<]*", text)
    assert len(commands) == 2 and "--teacher r18" in commands[1] and "--weight-cls 0.5" in commands[1]
    assert f"--seed 0 --output {voc.run}" in commands[1]


def test_a_report_without_the_data_says_what_it_leaves_out(voc, tmp_path):
    flags = ("--output", tmp_path, "--data-path", tmp_path / "nowhere")
    call(eval_script.main, "--report", voc.run, *flags)
    text = (tmp_path / "report.html").read_text()
    assert "Left out, for the data cannot be read" in text and "Precision and recall" not in text and "<svg" in text


def test_plots():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.0, 0.9)[-1] == pytest.approx(0.8)
    svg = plot("a title", {"one": [(0, 1.0), (10, 3.0)], "nothing": [(0, float("nan"))]}, "x", "y")
    [points] = re.findall(r'<polyline points="([^"]*)"', svg)
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.split())
    assert x0 < x1 and y0 > y1 and "nothing" not in svg  # up is less in SVG
    assert plot("t", {"a": []}, "x", "y") == ""
    assert plot("t", {"a": [(1, 2.0)]}, "x", "y").count("<circle") == 1


SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_of_a_tables_curves_has_means_and_deviations():
    svg = curves_picture(
        "a <title>", "AP, percent", {"one": {4: [30.0, 36.0, 33.0], 8: [40.0]}, "two & more": {4: [0.0]}}
    )
    root = xml.etree.ElementTree.fromstring(svg)
    at = {kind: [_points(x.get("points")) for x in root.iter(SVG + kind)] for kind in ("polyline", "polygon")}
    [(x4, mean), (x8, top)], [(_, bottom)] = at["polyline"]
    scale = (bottom - top) / 40  # pixels of one point of AP
    assert x4 < x8 and bottom - mean == pytest.approx(33 * scale, abs=0.1)
    band = at["polygon"][0]
    assert [x for x, _ in band] == [x4, x8, x8, x4]  # along the lower side, and back along the upper one
    assert [bottom - y for _, y in band] == pytest.approx([30 * scale, 40 * scale, 40 * scale, 36 * scale], abs=0.1)
    words = [text.text for text in root.iter(SVG + "text")]
    assert {"one", "two & more", "epoch", "AP, percent"} <= set(words)
    assert root.find("{*}title").text == "a <title>"
    height = float(root.get("viewBox").split()[3])
    assert all(float(text.get("y")) < height for text in root.iter(SVG + "text"))


def _points(text):
    return [tuple(map(float, point.split(","))) for point in text.split()]


# Export

READER = """
import sys, torch, torchvision
assert not any(name == "tar" or name.startswith("tar.") for name in sys.modules)
model, images = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])
torch.save([model([image])[1][0] for image in images], sys.argv[3])
"""


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_an_exported_detector_says_the_same_without_this_package(detector, voc, tmp_path):
    """In a fresh process, on 20 images."""
    weights = voc.run / "last.pth"
    if detector == "retinanet":
        weights = tmp_path / "run/last.pth"
        words = ("--student", "r10", "--detector", detector, "--output", weights.parent)
        call(train.main, *voc.common, *words)
    model = checkpoint.load_detector(weights)[0]
    if detector == "retinanet":  # it has learnt to be shy so far
        with torch.no_grad():
            model.head.classification_head.cls_logits.bias += 3
    export(model, tmp_path / "model.pt")
    images = [read_image(file).float() / 255 for file in sorted((voc.data / "JPEGImages").iterdir())]
    images += [image.flip(2)[:, 5:, :70] for image in images[:2]]
    assert len(images) == 20
    torch.save(images, tmp_path / "images.pt")
    files = [tmp_path / name for name in ("model.pt", "images.pt", "found.pt")]
    words = [sys.executable, "-W", "ignore", "-c", READER, *map(str, files)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    count = 0
    for image, found in zip(images, torch.load(tmp_path / "found.pt"), strict=True):
        with torch.inference_mode():
            wanted = model([image])[0]
        count += len(wanted["boxes"])
        assert torch.equal(found["labels"], wanted["labels"])
        assert torch.allclose(found["boxes"], wanted["boxes"], atol=1e-3)
        assert torch.allclose(found["scores"], wanted["scores"], atol=1e-5)
    assert count > 20


def test_a_stock_copy_has_no_class_of_ours_and_leaves_the_detector_alone():
    model = build_detector("faster-rcnn", "r10", 3, fpn_channels=16, head_channels=32)
    before = [type(module) for module in model.modules()]
    assert not any(type(module).__module__.startswith("tar.") for module in stock(model).modules())
    assert [type(module) for module in model.modules()] == before


def test_export_names_what_is_wrong(voc, tmp_path, capsys):
    for name, text in (("model.zip", "ends with .pt or .onnx"), ("nowhere/model.pt", "no such folder")):
        with pytest.raises(SystemExit) as stopped:
            call(eval_script.main, "--weights", voc.run / "last.pth", "--export", tmp_path / name)
        assert stopped.value.code == 2 and text in capsys.readouterr().err
    call(eval_script.main, "--weights", voc.run / "last.pth", "--export", tmp_path / "model.pt")
    printed = capsys.readouterr()
    assert "model.pt: the faster-rcnn of" in printed.out and not printed.err


def test_onnx_says_the_same(voc, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="optional: pip install onnx onnxruntime")
    model, _ = checkpoint.load_detector(voc.run / "last.pth")
    export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [output.name for output in session.get_outputs()]
    for size in ((72, 96), (90, 60)):
        image = torch.rand(3, *size)
        found = dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))
        with torch.inference_mode():
            wanted = model([image])[0]
        assert np.array_equal(found["labels"], wanted["labels"].numpy())
        assert np.allclose(found["boxes"], wanted["boxes"].numpy(), atol=1e-2)
