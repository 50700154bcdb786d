"""RetinaNet on the boxes of COCO's layout, with or without masks: VOC's detector, COCO's files and metric."""

from .coco import METRIC, check, dataset, known_images, record, summary
from .voc import model

__all__ = ("METRIC", "check", "dataset", "known_images", "model", "record", "summary")
