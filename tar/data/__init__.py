"""Data sets: PASCAL VOC's layout, COCO's format, shapes drawn here; image files, loader, --check-data.

`load_dataset` returns two sources. A source has `classes` (names, label 1 first), `__len__`, `name(epoch, index)` and
`load(epoch, index)`, which returns
    image: uint8 [3, H, W]
    boxes: float32 [N, 4] xyxy in pixels of the image
    labels: int64 [N], from 1
    ignored: bool [N], VOC's difficult boxes and COCO's crowds: not trained on, not counted in evaluation.

A source may also have `sizes` ((width, height) of each image), `wide` (whether each image is wider than high),
`dropped` (names of images with boxes that cannot be used), `unused` (classes without a box) and `dataset` (the
annotations as pycocotools reads them).
"""

from tar.data.datasets import load_dataset as load_dataset
