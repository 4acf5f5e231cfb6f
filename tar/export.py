"""A trained detector as one file that runs without this package: TorchScript, or ONNX.

torch.export stops in torchvision's detectors at a guard on the number of boxes (torch 2.15). torch.jit.script is
deprecated and works; so does the ONNX exporter that traces, for images of any size. Both take torchvision's own
classes, of which ours are subclasses with the same parameters.
"""

import copy
import warnings
from pathlib import Path

import torch
from torchvision.models.detection import RetinaNet

from tar import UserError

SUFFIXES = (".pt", ".onnx")


def stock(model):
    """A copy of a detector that consists of torchvision's own classes, on the CPU, in float32."""
    model = copy.deepcopy(model).cpu().float().eval()
    for module in model.modules():
        if type(module).__module__.startswith("tar."):
            module.__class__ = type(module).__mro__[1]
    return model


def export(model, file):
    """Writes a detector to FILE.pt (TorchScript) or FILE.onnx.

    Both take one image, float [3, H, W] in 0..1, of any size, and resize and normalise it themselves. TorchScript:
    `model([image])` gives (losses, [{boxes, labels, scores}]); import torchvision before torch.jit.load, for its
    operators. ONNX: input `image`, outputs `boxes`, `labels`, `scores`.

    Raises:
        UserError: another suffix, a folder that is not there, or no onnx package.
    """
    file = Path(file)
    if file.suffix not in SUFFIXES:
        raise UserError(f"--export {file}: give a file that ends with {' or '.join(SUFFIXES)}")
    if not file.resolve().parent.is_dir():
        raise UserError(f"--export {file}: there is no such folder")
    model = stock(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both routes are deprecated, and the tracer warns of shapes that are fixed
        if file.suffix == ".pt":
            torch.jit.script(model).save(str(file))
            return
        try:
            import onnx  # noqa: F401
        except ImportError:
            raise UserError(f"--export {file}: needs a package more: pip install onnx") from None
        names = ["boxes", "scores", "labels"] if isinstance(model, RetinaNet) else ["boxes", "labels", "scores"]
        axes = {"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names}}
        given = {"input_names": ["image"], "output_names": names, "dynamic_axes": axes}
        image = torch.rand(3, 96, 128)
        torch.onnx.export(model, ([image],), str(file), dynamo=False, opset_version=17, **given)
