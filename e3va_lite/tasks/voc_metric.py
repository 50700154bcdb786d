"""Average precision as Pascal VOC defines it ("The PASCAL VOC Challenge", Everingham et al. 2010, section 4.2).

The steps, from the bottom of the file up: match the detections of one class in one image, pool all images by
decreasing score, compute the precision-recall curve, and take the area under it: at eleven recalls (VOC2007, the
paper's metric) or at all of them (VOC2010 and later).

The eleven recalls are compared with the floating-point numbers 0.1 * k, k = 0..10, as Detectron2 and mmdet do. For
k = 3, 6 and 7 this number is one bit above k / 10, so a recall of exactly 3/10, 6/10 or 7/10 does not reach its own
point. Comparing whole numbers would follow the definition more closely and give slightly higher values for such
classes; but the metric exists for comparison with published results, and these come from the usual implementations.

Boxes are continuous ``x1, y1, x2, y2`` in pixels, half-open: a VOC file's ``xmin, ymin, xmax, ymax`` (whole pixels,
counted from 1, the last one included) becomes ``xmin - 1, ymin - 1, xmax, ymax``. The ordinary area of such a box,
``(x2 - x1) * (y2 - y1)``, is exactly the devkit's ``(xmax - xmin + 1) * (ymax - ymin + 1)``; so are intersections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

FALSE, TRUE, IGNORED = 0, 1, 2  # verdicts on a detection


@dataclass(frozen=True)
class AveragePrecision:
    """One value per class, in the order of the labels 1..K, and the mean over the classes that can be measured.

    A class without ground truth (or with ``difficult`` boxes only) has no recall: its values are nan, and it is left
    out of the means, whatever was detected. Without any measurable class the means are nan, too.
    """

    eleven_point: np.ndarray  # (K,)
    all_point: np.ndarray  # (K,)
    positives: np.ndarray  # (K,) boxes to be found, without the difficult ones
    curves: list[tuple[np.ndarray, np.ndarray]]  # per class (recall, precision) after each detection, best score first

    @property
    def mean_eleven_point(self) -> float:
        return _mean(self.eleven_point[self.positives > 0])

    @property
    def mean_all_point(self) -> float:
        return _mean(self.all_point[self.positives > 0])


def average_precision(
    predictions: Sequence[dict], targets: Sequence[dict], num_classes: int, iou: float = 0.5
) -> AveragePrecision:
    """Average precision of every class, 11-point and all-point.

    Args:
        predictions: Per image a dict of ``boxes`` (N, 4), ``scores`` (N,) and ``labels`` (N,), integers 1..K; arrays or
            CPU tensors, in any order. Detections of equal score keep the order of the images and of each list.
        targets: Per image, in the same order, a dict of ``boxes`` (M, 4), ``labels`` (M,) and, where the dataset has
            it, ``difficult`` (M,) booleans.
        num_classes: K, the number of classes without background.
        iou: Minimum overlap (inclusive, as in the devkit) with which a detection has found a box.

    Raises:
        InputError: If the two lists differ in length, arrays of one image do, or a label is not in 1..K.
    """
    if len(predictions) != len(targets):
        raise InputError(f"{len(predictions)} predictions for {len(targets)} targets: give one of each per image.")
    predictions = [
        _arrays(p, ("boxes", "scores", "labels"), num_classes, f"prediction {i}") for i, p in enumerate(predictions)
    ]
    targets = [{"difficult": np.zeros(len(t["labels"]), bool), **t} for t in targets]
    targets = [_arrays(t, ("boxes", "labels", "difficult"), num_classes, f"target {i}") for i, t in enumerate(targets)]

    eleven_point, all_point, positives, curves = [], [], [], []
    for label in range(1, num_classes + 1):
        found, total = _pool(predictions, targets, label, iou)
        positives.append(total)
        eleven_point.append(_eleven_point(found, total))
        all_point.append(_all_point(found, total))
        curves.append(_curve(found, total))
    return AveragePrecision(np.array(eleven_point), np.array(all_point), np.array(positives), curves)


def _eleven_point(found: np.ndarray, positives: int) -> float:
    """The mean of the best precision at recall 0, 0.1, ... 1 or beyond; 0 where that recall is never reached."""
    if not positives:
        return np.nan
    recall, precision = _curve(found, positives)
    return float(np.mean([precision[recall >= 0.1 * k].max(initial=0.0) for k in range(11)]))


def _all_point(found: np.ndarray, positives: int) -> float:
    """The area under the curve, with each precision raised to the best one at that recall or beyond."""
    if not positives:
        return np.nan
    recall, precision = _curve(found, positives)
    best_from_here_on = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * best_from_here_on))


def _curve(found: np.ndarray, positives: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision (D,) after each detection; the recall is nan for a class without positives."""
    hits = np.cumsum(found)
    recall = hits / positives if positives else np.full(len(hits), np.nan)
    return recall, hits / np.arange(1, len(hits) + 1)


def _pool(predictions: list[dict], targets: list[dict], label: int, iou: float) -> tuple[np.ndarray, int]:
    """All images' detections of one class, best score first: which found a box (D,), and how many there are to find."""
    scores, verdicts, positives = [np.zeros(0)], [np.zeros(0, int)], 0
    for prediction, target in zip(predictions, targets, strict=True):
        mine, truth = prediction["labels"] == label, target["labels"] == label
        by_score = np.argsort(-prediction["scores"][mine], kind="stable")
        difficult = target["difficult"][truth]
        scores.append(prediction["scores"][mine][by_score])
        verdicts.append(_match(prediction["boxes"][mine][by_score], target["boxes"][truth], difficult, iou))
        positives += int(np.sum(~difficult))
    scores, verdicts = np.concatenate(scores), np.concatenate(verdicts)
    verdicts = verdicts[np.argsort(-scores, kind="stable")]
    return verdicts[verdicts != IGNORED] == TRUE, positives


def _match(boxes: np.ndarray, truth: np.ndarray, difficult: np.ndarray, iou: float) -> np.ndarray:
    """The verdict (N,) on each detection of one class in one image: boxes (N, 4), best score first, and truth (M, 4).

    As in the devkit, a detection is compared only with the box that it overlaps most, even if that one was already
    found by another detection.
    """
    verdicts = np.full(len(boxes), FALSE)
    if not len(truth):
        return verdicts
    taken = set()
    overlaps = box_iou(boxes, truth)
    for n in range(len(boxes)):
        best = int(overlaps[n].argmax())
        if overlaps[n, best] < iou:
            continue  # found nothing
        if difficult[best]:
            verdicts[n] = IGNORED  # neither asked for nor wrong
        elif best not in taken:
            verdicts[n] = TRUE
            taken.add(best)  # later detections of this box are duplicates, and false
    return verdicts


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of each box in a (N, 4) with each in b (M, 4), as (N, M); 0 for two empty boxes."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.prod(np.clip(bottom_right - top_left, 0, None), axis=-1)  # (N, M)
    area_a, area_b = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (a, b))
    union = area_a[:, None] + area_b[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _arrays(item: dict, keys: tuple[str, ...], num_classes: int, name: str) -> dict:
    """The item's entries as checked numpy arrays, boxes and scores in double precision."""
    types = {"boxes": float, "scores": float, "labels": int, "difficult": bool}
    item = {key: np.asarray(item[key]).astype(types[key]) for key in keys}
    item["boxes"] = item["boxes"].reshape(-1, 4)  # an empty list has no second axis
    if len({len(values) for values in item.values()}) > 1:
        sizes = ", ".join(f"{len(values)} {key}" for key, values in item.items())
        raise InputError(f"{name} has {sizes}: there must be as many of each.")
    wrong = item["labels"][(item["labels"] < 1) | (item["labels"] > num_classes)]
    if len(wrong):
        raise InputError(f"{name} has the label {wrong[0]}; labels are 1 to {num_classes} (0 is the background).")
    return item


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
