"""torchvision's own detectors that were trained on COCO, as teachers."""

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d

from tar import UserError
from tar.detectors.backbones import fetch
from tar.detectors.build import build_detector


def build_coco_teacher(detector, classes, min_size=800, max_size=1333):
    """torchvision's own ResNet-50 detector, trained on COCO, for those of COCO's classes that a data set has.

    Args:
        detector: one of DETECTORS.
        classes: names as COCO spells them, in the order of the data set's labels.
        min_size, max_size: as build_detector.

    Returns:
        the detector; the arguments of build_detector that made it.

    Raises:
        UserError: a class that COCO does not have, or no network.
    """
    enum = {"faster-rcnn": FasterRCNN_ResNet50_FPN_Weights, "retinanet": RetinaNet_ResNet50_FPN_Weights}[detector]
    weights = enum.COCO_V1
    names = weights.meta["categories"]  # 91, with gaps; the first is the background
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise UserError(f"--teacher-weights coco: COCO has no class called {', '.join(unknown[:5])}")
    instead = "give --teacher-weights FILE, or none to train a teacher"
    state = fetch(weights, f"COCO weights of {detector} r50", instead)
    build = {"detector": detector, "backbone": "r50", "num_classes": len(classes), "norm": "frozen"}
    build |= {"anchor_scale": 8 if detector == "faster-rcnn" else 4, "min_size": min_size, "max_size": max_size}
    model = build_detector(**build)
    rows = [0, *(names.index(name) for name in classes)]
    for kind in ("weight", "bias"):
        if detector == "faster-rcnn":
            head = f"roi_heads.box_predictor.cls_score.{kind}", f"roi_heads.box_predictor.bbox_pred.{kind}"
            state[head[0]] = state[head[0]][rows]
            state[head[1]] = state[head[1]].unflatten(0, (len(names), 4))[rows].flatten(0, 1)
        else:
            head = f"head.classification_head.cls_logits.{kind}"
            state[head] = state[head].unflatten(0, (-1, len(names)))[:, rows].flatten(0, 1)
    model.load_state_dict(state)
    for module in model.modules():  # torchvision trained these with an eps of 0
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    return model.eval(), build
