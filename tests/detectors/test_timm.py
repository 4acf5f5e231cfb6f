"""Backbones of timm: features and losses as elsewhere, both detectors, whole commands, what cannot be used."""

import sys

import pytest
import torch
from small_detectors import KINDS, batch, detector, make_step, norms
from tiny_runs import ROOT, SMALL, call, read_result
from torchvision.models import resnet18

import eval as evaluation
import train
from tar import UserError
from tar.detectors.backbones import FrozenNorm, build_backbone
from tar.method.step import teacher_pixels

timm = pytest.importorskip("timm", reason="timm is not installed")
WEIGHTS = ROOT.parent / "shared/weights"
LITE = ("tf_efficientnet_lite0", "tf_efficientnet_lite2")
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="../shared/weights is not there")


@needs_weights
@pytest.mark.parametrize("name", LITE)
def test_features_are_timms_own_to_the_last_bit(name):
    network = timm.create_model(name, pretrained_cfg_overlay={"file": str(WEIGHTS / f"{name}.pth")}, pretrained=True)
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval().forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
        for norm in ("frozen", "batch"):
            ours = build_backbone(f"timm/{name}", str(WEIGHTS), norm).body.eval()(images)
            assert all(torch.equal(level, other) for level, other in zip(ours.values(), expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resnet_of_timm_and_of_torchvision_give_equal_losses(kind, tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "r18.pth")
    for norm in ("frozen", "batch"):
        options, losses = {"backbone_weights": str(tmp_path / "r18.pth"), "norm": norm}, []
        models = [detector(kind, name, **options).train() for name in ("r18", "timm/resnet18")]
        state = models[0].state_dict()
        for name, value in state.items():
            if name.endswith(("running_mean", "running_var", "bn1.weight", "bn2.weight")):
                value.uniform_(0.5, 1.5)
        models[1].load_state_dict({k: state[k.replace("body.network.", "body.")] for k in models[1].state_dict()})
        for model in models:
            torch.manual_seed(1)
            losses.append(model(*batch()))
        assert losses[0] == losses[1]
        trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models]
        assert trained[0] == trained[1]


@needs_weights
def test_the_teacher_sees_pixels_of_its_own_mean():
    student = detector()
    teacher = detector(backbone=f"timm/{LITE[0]}", backbone_weights=str(WEIGHTS))
    images, _ = student.transform(batch()[0])
    expected, _ = teacher.transform(batch()[0])
    assert images.image_sizes[0] != images.image_sizes[1]  # one is padded, by 0 for both
    pixels = teacher_pixels(student, teacher, images.tensors, images.image_sizes)
    torch.testing.assert_close(pixels, expected.tensors, rtol=0, atol=1e-6)
    step = make_step(student.train(), teacher.eval().requires_grad_(False))
    assert all(torch.isfinite(value) for losses in step(*batch(), teacher)[:2] for value in losses.values())


@needs_weights
@pytest.mark.parametrize("kind", KINDS)
def test_commands_train_measure_and_export(kind, tmp_path):
    flags = [*SMALL, "--epochs", 1, "--batch-size", 2, "--limit-train", 4, "--limit-test", 2, "--detector", kind]
    names = ["--student", f"timm/{LITE[0]}", "--teacher", f"timm/{LITE[1]}", "--backbone-weights", WEIGHTS]
    call(train.main, *flags, *names, "--output", tmp_path / "run")
    [teacher] = set(tmp_path.iterdir()) - {tmp_path / "run"}
    assert read_result(tmp_path / "run")["cost"] > 1 and LITE[1] in teacher.name
    call(evaluation.main, "--weights", tmp_path / "run/last.pth", "--export", tmp_path / "student.pt")
    with torch.no_grad():
        [found] = torch.jit.load(tmp_path / "student.pt")([torch.rand(3, 64, 80)])[1]
    assert found.keys() == {"boxes", "labels", "scores"}


@pytest.mark.parametrize(
    ("name", "norm", "stages", "said"),
    [
        ("vit_tiny_patch16_224", "batch", 5, "no level of stride 4"),
        ("no_such_model", "batch", 5, "no_such_model"),
        ("swin_tiny_patch4_window7_224", "batch", 5, "224"),
        ("hrnet_w18_small", "frozen", 3, "cannot be frozen"),
    ],
)
def test_what_cannot_be_used_says_why(name, norm, stages, said):
    with pytest.raises(UserError, match=rf"timm/{name}.*{said}") as error:
        build_backbone(f"timm/{name}", "none", norm, trained_stages=stages)
    assert "\n" not in str(error.value)


def test_frozen_stages_are_the_first(tmp_path):
    body = build_backbone("timm/regnetx_002", "none", "frozen", trained_stages=3).body
    assert {name.split(".")[1] for name, p in body.named_parameters() if not p.requires_grad} == {"stem", "s1"}
    assert {type(m) for m in norms(body)} == {FrozenNorm}
    with pytest.raises(UserError, match=r"regnetx_002.pth: no such file"):
        build_backbone("timm/regnetx_002", str(tmp_path))


def test_without_timm_one_line_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_backbone("timm/resnet18")
