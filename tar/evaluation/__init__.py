"""Evaluation: AP by COCO's and VOC's rules (`evaluate`, `voc_ap`), time and cost, comparing runs, Markdown tables."""

from tar.evaluation.average_precision import voc_ap as voc_ap
from tar.evaluation.detect import evaluate as evaluate
