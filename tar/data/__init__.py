"""Data sets: PASCAL VOC's layout, COCO's format, shapes drawn here; image files, loader, --check-data.

`load_dataset` returns two sources. A source has `classes` (names, label 1 first), `wide` (whether each image is wider
than high, or None), `notes` (sentences about what is unusual), a length, `name(epoch, index)` and `load(epoch, index)`,
which returns
    image: uint8 [3, H, W]
    boxes: float32 [N, 4] xyxy in pixels of the image
    labels: int64 [N], from 1
    ignored: bool [N], VOC's difficult boxes and COCO's crowds: not trained on, not counted in evaluation.
"""

from tar.data.datasets import load_dataset as load_dataset
