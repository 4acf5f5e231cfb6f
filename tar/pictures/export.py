"""A trained detector as one file that runs without this package: TorchScript or ONNX (--export).

Both exporters are deprecated, but torch.export stops in torchvision's detectors at a guard on the number of boxes
(torch 2.15). Both need torchvision's own classes: ours are subclasses of them.
"""

import copy
import importlib.util
import warnings
from pathlib import Path

import torch
from torchvision.models.detection import RetinaNet

from tar import UserError, one_line
from tar.data.source import listed


def export(model, file, classes):
    """Writes a detector to FILE.pt (TorchScript) or FILE.onnx; returns how it is used, a line for the user.

    UserError: another suffix, no onnx package, or a file that cannot be written.
    """
    suffix = Path(file).suffix
    if suffix not in (".pt", ".onnx"):
        raise UserError(f"--export {file}: give a file that ends with .pt or .onnx")
    if suffix == ".onnx" and not importlib.util.find_spec("onnx"):
        raise UserError(f"--export {file}: needs a package more: pip install onnx")
    model = copy.deepcopy(model).cpu().float().eval()
    for module in model.modules():
        parent = next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("tar."))
        if parent is not torch.nn.Module:
            module.__class__ = parent
    names = ["boxes", "scores", "labels"] if isinstance(model, RetinaNet) else ["boxes", "labels", "scores"]
    axes = {"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names}}
    options = {"input_names": ["image"], "output_names": names, "dynamic_axes": axes, "opset_version": 17}
    with warnings.catch_warnings(action="ignore"):  # both are deprecated; the tracer warns of fixed shapes
        try:
            if suffix == ".pt":
                torch.jit.script(model).save(str(file))
            else:
                torch.onnx.export(model, ([torch.rand(3, 96, 128)],), str(file), dynamo=False, **options)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--export {file}: cannot be written ({one_line(error)})") from error
    use = {
        ".onnx": "input `image`, outputs `boxes`, `labels`, `scores`",
        ".pt": "`import torchvision` before torch.jit.load; model([image]) gives (losses, [{boxes, labels, scores}])",
    }[suffix]
    return f"for one image of any size, float [3, H, W] in 0..1; {use}; labels from 1: {listed(classes, 20)}"
