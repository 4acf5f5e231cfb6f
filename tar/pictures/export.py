"""A trained detector as one file that runs without this package: TorchScript or ONNX (--export).

torch.export stops in torchvision's detectors at a guard on the number of boxes (torch 2.15). torch.jit.script and the
ONNX exporter that traces are deprecated and work. Both need torchvision's own classes: ours are subclasses of them.
"""

import copy
import warnings
from pathlib import Path

import torch
from torchvision.models.detection import RetinaNet

from tar import UserError


def torchvision_copy(model):
    """A copy of a detector that consists of torchvision's own classes, on the CPU, in float32."""
    model = copy.deepcopy(model).cpu().float().eval()
    for module in model.modules():
        if type(module).__module__.startswith("tar."):
            module.__class__ = type(module).__mro__[1]
    return model


def export(model, file):
    """Writes a detector to FILE.pt (TorchScript) or FILE.onnx.

    The input is one image of any size, float [3, H, W] in 0..1. In TorchScript
    `model([image])` gives (losses, [{boxes, labels, scores}]); import torchvision before torch.jit.load. ONNX has the
    input `image` and the outputs `boxes`, `labels`, `scores`.

    Raises:
        UserError: another suffix, a folder that is not there, or no onnx package.
    """
    file = Path(file)
    if file.suffix not in (".pt", ".onnx"):
        raise UserError(f"--export {file}: give a file that ends with .pt or .onnx")
    if not file.resolve().parent.is_dir():
        raise UserError(f"--export {file}: there is no such folder")
    model = torchvision_copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are deprecated; the tracer warns of fixed shapes
        if file.suffix == ".pt":
            torch.jit.script(model).save(str(file))
            return
        try:
            import onnx  # noqa: F401
        except ImportError:
            raise UserError(f"--export {file}: needs a package more: pip install onnx") from None
        names = ["boxes", "scores", "labels"] if isinstance(model, RetinaNet) else ["boxes", "labels", "scores"]
        axes = {"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names}}
        names = {"input_names": ["image"], "output_names": names, "dynamic_axes": axes}
        torch.onnx.export(model, ([torch.rand(3, 96, 128)],), str(file), dynamo=False, opset_version=17, **names)
