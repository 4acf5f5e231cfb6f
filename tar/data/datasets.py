"""The data sets by name: the training and the test source of each."""

from tar import UserError
from tar.data.coco import Coco, coco_files
from tar.data.shapes import Shapes
from tar.data.voc import Voc, download_voc, folders_with_list, voc_classes, voc_folders

DATASETS = ("shapes", "voc", "coco")
SHAPES_IMAGES = {"train": 700, "test": 400}  # an epoch of fresh images; the fixed test images


def load_dataset(
    name,
    data_path="data",
    years=("2007",),
    files=(None,) * 4,
    limit_train=0,
    limit_test=0,
    seed=0,
    download=False,
    split="test",
    keep_empty=False,
):
    """The training and the test source of a data set.

    Args:
        name: one of DATASETS.
        data_path: folder of the data (not used by shapes).
        years: VOC's years. All are trained on; those that have a test list are tested on.
        files: COCO's paths: training JSON and images, test JSON and images; None for the usual path under data_path.
        limit_train, limit_test: number of images to use, the first ones; 0 for all.
        seed: seed of the shapes that are drawn for training.
        download: download VOC first.
        split: "test"; or "val" to tune on: voc then trains on the train list instead of trainval and tests on the val
            list, shapes tests on other images. COCO's test source is always val2017.
        keep_empty: train on COCO's images without boxes too.

    Returns:
        train, test: two sources of the same classes.

    Raises:
        UserError: a file is missing or cannot be understood, or the classes of the two sources differ.
    """
    if name == "shapes":
        train = Shapes("train", limit_train or SHAPES_IMAGES["train"], seed)
    elif name == "coco":
        train = Coco(*coco_files(data_path, files)[0], keep_empty, limit_train)
    else:
        if download:
            download_voc(data_path, years)
        folders, train_split = voc_folders(data_path, years), "trainval" if split == "test" else "train"
        lists = [(f, train_split) for f in folders] + [(f, split) for f in folders_with_list(folders, split)]
        train = Voc(folders, train_split, voc_classes(lists), limit_train)
    return train, load_test_set(name, train.classes, data_path, years, files, limit_test, split)


def load_test_set(name, classes, data_path="data", years=("2007",), files=(None,) * 4, limit=0, split="test"):
    """The test source alone, for a detector of the given classes; the other arguments as in load_dataset."""
    if name == "shapes":
        return Shapes(split, limit or SHAPES_IMAGES["test"])
    if name == "voc":
        return Voc(folders_with_list(voc_folders(data_path, years), split), split, classes, limit)
    file, folder = coco_files(data_path, files)[1]
    test = Coco(file, folder, limit=limit)
    if test.classes != tuple(classes):
        raise UserError(f"{file}: its categories are not those trained on: {difference(classes, test.classes)}")
    return test


def difference(one, other):
    """How two lists of classes differ, in words."""
    lacks, more = [c for c in one if c not in other], [c for c in other if c not in one]
    parts = [f"{what} {', '.join(map(str, names))}" for what, names in (("without", lacks), ("besides", more)) if names]
    return "; ".join(parts) or "the same names in another order"
