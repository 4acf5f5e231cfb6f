"""The recipe of each data set: what fills in the flags that are not given."""

VOC_AND_SHAPES = {
    "epochs": (12, 8),
    "batch_size": (2, 8),
    "optimizer": ("sgd", "adamw"),
    "lr": (0.02, 0.004),
    "weight_decay": (1e-4, 0.05),
    "schedule": ("step", "cosine"),
    "warmup": (500, 100),
    "clip_grad": (10.0, 0.0),
    "size": ([600, 1000], [96, 96]),
    "backbone_weights": ("imagenet", "none"),
    "fpn_channels": (256, 64),
    "head_channels": (1024, 256),
    "anchor_scale": (8, 4),
    "rois": (512, 64),
    "roi_samples": (2, 1),
    "rpn_top_n": ([2000, 1000], [200, 100]),
    "workers": (2, 0),
    "eval_every": (1, 4),
    "decay_end": (1.0, 0.5),
}
RECIPES = {name: {flag: row[k] for flag, row in VOC_AND_SHAPES.items()} for k, name in enumerate(("voc", "shapes"))}
RECIPES["coco"] = {**RECIPES["voc"], "size": [800, 1333]}
