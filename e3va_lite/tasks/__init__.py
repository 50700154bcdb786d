"""Networks, and the tasks that join network, dataset and metric.

Networks: ``retinanet``, ``cascade_mask_rcnn``, ``upernet``, with ``detection`` (what the two detectors share) and
``mmseg_backbone`` (backbones for mmsegmentation). Tasks: ``voc`` with ``voc_metric``, ``coco``, ``coco_boxes``,
``ade20k``, found by name through ``registry``, which also says what a task has to offer.
"""
