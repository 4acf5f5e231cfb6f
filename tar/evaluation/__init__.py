"""Evaluation: detections and their AP by COCO's and VOC's rules, time and cost, comparing runs, Markdown tables.

`evaluate` runs a detector over a test source and returns its figures; `voc_ap` is VOC's average precision of a curve.
"""

from tar.evaluation.average_precision import voc_ap as voc_ap
from tar.evaluation.detect import evaluate as evaluate
