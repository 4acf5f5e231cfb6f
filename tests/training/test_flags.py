"""Flags: which are refused, and what those of the distillation become."""

import pytest
from test_mistakes import wrong

from tar.training.flags import distillation_settings, parse

PAIR = "--student r10 --teacher r18"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (f"{PAIR} --detector retinanet --proposals teacher", "--proposals"),
        (f"{PAIR} --detector retinanet --no-sharing", "--no-sharing"),
        (f"{PAIR} --no-sharing --proposals both", "--no-sharing contradicts --proposals"),
        (f"{PAIR} --no-sharing --soft-labels all", "--soft-labels all"),
        (f"{PAIR} --soft-labels all --cls-gate better", "--cls-gate better"),
        (f"{PAIR} --decay-end 1.5", "'1.5'"),
        ("--student r10 --teacher-weights coco", "--teacher BACKBONE"),
        ("--student r10 --proposals both", "--proposals needs --teacher BACKBONE"),
        ("--student r10 --train-json x.json", "--train-json needs --dataset coco"),
        ("--student r10 --keep-empty", "--keep-empty needs --dataset coco"),
        ("--student r10 --voc-years 2012", "--voc-years needs --dataset voc"),
        ("--student r10 --dataset coco --split val", "--split val"),
        ("--student r10 --dataset coco --download", "--download needs --dataset voc"),
        ("--student r10 --seeds 3", "--seeds"),
        ("--mask blob", "--mask"),
        ("--size 64", "--size"),
        ("--sigma2 0", "--sigma2"),
        ("--no-backbone --no-cls --no-reg", "nothing to distil"),
        ("--student r10 --size 64 32", "--size 64 32"),
        ("--dataset voc", "--student"),
        ("--teacher r18", "--student"),
        ("--check-data", "shapes are drawn"),
        ("--learning-rate=3", "unrecognized arguments: --learning-rate=3 (--help"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_with_the_reason(capsys, flags, says):
    assert says in wrong(capsys, parse, *flags.split())


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        ("--no-backbone --no-reg", {"weight_backbone": 0.0, "weight_reg": 0.0}),
        ("--mask fine-grained --sigma2 0.5", {"mask": "fine-grained", "sigma2": 0.5}),
        ("--cls-gate better --reg-gate student", {"cls_gate": "better", "reg_gate": "student"}),
        ("--soft-labels all", {"soft_labels": "all"}),
        ("--proposals both --no-cls", {"proposals": "both", "weight_cls": 0.0}),
        ("--no-sharing --weight-cls 2 --weight-reg 3", {"no_sharing": True, "weight_cls": 2.0, "weight_reg": 3.0}),
        ("--backbone-norm cells", {"backbone_norm": "cells", "weight_backbone": 0.1}),  # 64 channels
        ("--backbone-norm cells --fpn-channels 256", {"backbone_norm": "cells", "weight_backbone": 0.025}),
        ("--backbone-norm cells --weight-backbone 0.3", {"backbone_norm": "cells", "weight_backbone": 0.3}),
    ],
)
def test_flags_become_the_settings_of_the_step(flags, changed):
    usual = {"weight_backbone": 6.4, "weight_cls": 1.0, "weight_reg": 0.1, "mask": "gaussian", "sigma2": 2.0}
    usual |= {"backbone_norm": "energy", "cls_gate": "none", "soft_labels": "positive", "reg_gate": "proposal"}
    usual |= {"proposals": "student", "no_sharing": False}
    assert vars(distillation_settings(parse([*PAIR.split(), *flags.split()]))) == {**usual, **changed}


@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_retinanet_has_torchvisions_anchors_and_half_the_rate(dataset):
    common = ["--student", "r50", "--dataset", dataset]
    two = [parse([*common, "--detector", kind]) for kind in ("faster-rcnn", "retinanet")]
    assert [args.anchor_scale for args in two] == [8, 4] and two[1].lr == two[0].lr / 2
    assert parse([*common, "--detector", "retinanet", "--lr", "0.3", "--anchor-scale", "5"]).lr == 0.3
