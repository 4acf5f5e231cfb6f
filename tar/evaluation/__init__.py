"""Evaluation: AP by COCO's and VOC's rules, time and cost, comparing runs, Markdown tables."""

from tar.evaluation.average_precision import voc_ap as voc_ap
