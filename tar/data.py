"""Data sets, and the order in which their images are visited.

A source is anything with `classes` (names, label 1 first), `__len__` and `load(epoch, index)`, which returns
image uint8 [3, H, W], boxes float [N, 4] xyxy in pixels, labels int64 [N] from 1 and ignored bool [N] (VOC's
difficult boxes: no training on them, no penalty in evaluation). tar.shapes is one source, Voc below another.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.transforms.v2 import functional as v2

from tar import UserError, one_line
from tar.shapes import Shapes

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
DATASETS = ("shapes", "voc")
SHAPES_IMAGES = {"train": 1100, "test": 400}  # an epoch of fresh images; the fixed test images


class Voc:
    """Images and boxes in the layout of PASCAL VOC.

    Args:
        folders: one or more folders that hold JPEGImages, Annotations and ImageSets/Main.
        split: "trainval" or "test": which list of ImageSets/Main.
        classes: names in the order of their labels.
        limit: first images of the list only; 0 for all.

    Raises:
        UserError: a list, an annotation or an image is missing or cannot be understood; names the file.
    """

    def __init__(self, folders, split, classes, limit=0):
        self.classes = tuple(classes)
        self.samples = []  # (image file, boxes, labels, ignored)
        self.dropped = []  # names of images with boxes of no area
        for folder in folders:
            for name in read_list(folder, split):
                if limit and len(self.samples) == limit:
                    return
                image = folder / "JPEGImages" / f"{name}.jpg"
                if not image.is_file():
                    raise UserError(f"{image}: no such image, but {folder.name}/ImageSets/Main/{split}.txt lists it")
                boxes, names, ignored = read_annotation(folder / "Annotations" / f"{name}.xml")
                solid = (boxes[:, 2:] > boxes[:, :2] + 1).all(1)  # with xmin = xmax in the file a box is a point
                if not solid.all():
                    self.dropped.append(name)
                labels = np.array([self._label(n, folder, name) for n in names], dtype=np.int64)
                self.samples.append((image, boxes[solid], labels[solid], ignored[solid]))

    def _label(self, class_name, folder, name):
        if class_name not in self.classes:
            raise UserError(f"{folder / 'Annotations' / name}.xml: class {class_name!r} is none of {self.classes}")
        return self.classes.index(class_name) + 1

    def __len__(self):
        return len(self.samples)

    def load(self, epoch, index):
        """See the module's docstring."""
        file, boxes, labels, ignored = self.samples[index]
        try:
            with Image.open(file) as image:
                pixels = v2.pil_to_tensor(image.convert("RGB"))
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read as an image ({error}); replace it or take it off the list"
            ) from None
        return pixels, torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(ignored)


def voc_folders(data_path, years):
    """The folders of the given years under data_path, or data_path itself where it holds JPEGImages."""
    root = Path(data_path)
    if (root / "JPEGImages").is_dir():
        return [root]
    folders = []
    for year in years:
        found = [f for f in (root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}") if (f / "JPEGImages").is_dir()]
        if not found:
            raise UserError(
                f"{root}: holds neither VOCdevkit/VOC{year}/JPEGImages nor JPEGImages; give --data-path DIR with "
                "PASCAL VOC's layout, or --download to fetch it"
            )
        folders.append(found[0])
    return folders


def read_list(folder, split):
    """The image names of folder/ImageSets/Main/split.txt."""
    file = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        raise UserError(f"{file}: no such list of images")
    try:
        names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a list of image names ({one_line(error)})") from None
    if not names:
        raise UserError(f"{file}: lists no image")
    return names


def read_annotation(file):
    """The objects of one VOC annotation.

    VOC counts pixels from 1 and includes both ends; the boxes returned are continuous: xmin - 1, ymin - 1, xmax,
    ymax, cut off at the image's border.

    Returns:
        boxes float32 [N, 4] xyxy in pixels; list of N class names; difficult bool [N].
    """
    try:
        root = ElementTree.parse(file).getroot()
        size = [float(root.findtext(f"size/{side}")) for side in ("width", "height")]
        if min(size) <= 0:
            raise ValueError("an image of no size")
        objects = root.findall("object")
        names = [(o.findtext("name") or "").strip() for o in objects]
        if "" in names:
            raise ValueError("an object has no name")
        corners = [[float(o.findtext(f"bndbox/{c}")) for c in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
    except FileNotFoundError:
        raise UserError(f"{file}: no such annotation") from None
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a VOC annotation ({error})") from None
    boxes = np.array(corners, dtype=np.float32).reshape(-1, 4) - np.array([1, 1, 0, 0], dtype=np.float32)
    boxes = boxes.clip(0, np.array(size * 2, dtype=np.float32))
    ignored = np.array([(o.findtext("difficult") or "0").strip() == "1" for o in objects], dtype=bool)
    return boxes, names, ignored


def voc_classes(lists):
    """VOC's 20 classes if the annotations of the given (folder, split) pairs use no others, else those they use."""
    names = set()
    for folder, split in lists:
        for name in read_list(folder, split):
            names.update(read_annotation(folder / "Annotations" / f"{name}.xml")[1])
    return VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))


def download_voc(data_path, years):
    """Fetches and unpacks VOC with torchvision's own downloader; what is there already is kept."""
    for year in years:
        for split in ("trainval", "test") if year == "2007" else ("trainval",):
            if (Path(data_path) / "VOCdevkit" / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt").is_file():
                continue
            try:
                VOCDetection(data_path, year=year, image_set=split, download=True)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"VOC {year} {split} could not be fetched into {data_path} ({one_line(error)}); fetch the "
                    "archives from host.robots.ox.ac.uk/pascal/VOC by other means and unpack them there"
                ) from error


def load_dataset(
    name, data_path="data", years=("2007",), limit_train=0, limit_test=0, seed=0, download=False, split="test"
):
    """The training and the test source of a data set.

    Args:
        name: one of DATASETS.
        data_path: folder of the data (unused by shapes).
        years: of VOC; trained on the trainval lists of all, tested on those that have a test list.
        limit_train, limit_test: first images only; 0 for all.
        seed: of the shapes that are drawn for training.
        download: fetch VOC first.
        split: "test", or "val" to tune on: voc then trains on the train list instead of trainval and tests on the val
            list, shapes tests on other images.

    Returns:
        train, test: two sources of the same classes.
    """
    if name == "shapes":
        train = Shapes("train", limit_train or SHAPES_IMAGES["train"], seed)
        return train, Shapes(split, limit_test or SHAPES_IMAGES["test"])
    if download:
        download_voc(data_path, years)
    folders = voc_folders(data_path, years)
    trained, tested = "trainval" if split == "test" else "train", tested_folders(folders, split)
    classes = voc_classes([(f, trained) for f in folders] + [(f, split) for f in tested])
    return Voc(folders, trained, classes, limit_train), Voc(tested, split, classes, limit_test)


def load_test_set(name, classes, data_path="data", years=("2007",), limit=0, split="test"):
    """The test source alone, for a detector that knows the given classes; arguments as load_dataset."""
    if name == "shapes":
        return Shapes(split, limit or SHAPES_IMAGES["test"])
    return Voc(tested_folders(voc_folders(data_path, years), split), split, classes, limit)


def tested_folders(folders, split="test"):
    """Those of VOC's folders that have a list of the images to test on."""
    tested = [f for f in folders if (f / "ImageSets" / "Main" / f"{split}.txt").is_file()]
    if not tested:
        raise UserError(f"{folders[0] / 'ImageSets' / 'Main' / split}.txt: no such list of images to test on")
    return tested


class Samples(Dataset):
    """A source as torch's loader wants it; its keys are (epoch, index), so that an item is a function of its key.

    In training half of the images are flipped, as decided by (seed, epoch, index), and ignored boxes are left out.
    """

    def __init__(self, source, train, seed=0):
        self.source, self.train, self.seed = source, train, seed

    def __getitem__(self, key):
        """image uint8 [3, H, W]; target: boxes float [N, 4], labels int64 [N], ignored bool [N], image_id int."""
        epoch, index = key
        image, boxes, labels, ignored = self.source.load(epoch, index)
        if self.train:
            boxes, labels, ignored = boxes[~ignored], labels[~ignored], ignored[~ignored]
            if np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
                boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
                image, boxes = v2.horizontal_flip(image), v2.horizontal_flip(boxes).as_subclass(torch.Tensor)
        return image, {"boxes": boxes, "labels": labels, "ignored": ignored, "image_id": index}


def train_batches(length, batch_size, seed, epoch, rank=0, world=1):
    """The keys of one process's batches in one epoch.

    Batch k of all processes together is the k-th slice of one permutation, whatever their number; the end is
    filled up from its start, so that every process has the same number of batches.

    Returns:
        list of lists of (epoch, index).
    """
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    order = (order * world)[: -(-length // world) * world]
    keys = [(epoch, index) for index in order[rank::world]]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


def test_batches(length, batch_size, rank=0, world=1):
    """The keys of one process's share of the test batches: each image once, the same batches for any world."""
    batches = [[(0, i) for i in range(k, min(k + batch_size, length))] for k in range(0, length, batch_size)]
    return batches[rank::world]


def make_loader(source, train, batches, seed=0, workers=0, pin_memory=False):
    """Batches as (list of images uint8, list of targets), in the order of the keys given."""
    return DataLoader(
        Samples(source, train, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_lists,
        pin_memory=pin_memory,
    )


def _lists(batch):
    return tuple(list(column) for column in zip(*batch, strict=True))


def to_device(images, targets, device):
    """A batch on the device: images float [3, H, W] in 0..1, targets without what only evaluation needs."""
    images = [image.to(device, non_blocking=True).float() / 255 for image in images]
    targets = [{k: t[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for t in targets]
    return images, targets
