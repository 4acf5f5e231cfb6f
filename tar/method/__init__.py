"""The method of the paper, one file an idea, in its order: step, sharing, the three levels, decay.

It imports torch and torchvision only. Regions are xyxy in pixels of the resized image; L levels, B images.
"""

from tar.method.backbone_level import MASKS as MASKS
from tar.method.backbone_level import gaussian_mask as gaussian_mask
from tar.method.decay import decay as decay
from tar.method.step import DistillationSettings as DistillationSettings
from tar.method.step import DistillationStep as DistillationStep
