"""Detectors of torchvision's parts: build_detector() gives teacher or student, one file a part."""

from tar.detectors.build import build_detector as build_detector
