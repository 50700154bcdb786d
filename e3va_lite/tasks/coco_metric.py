"""Average precision as COCO defines it, of boxes and of masks."""

import contextlib
import io
from collections import Counter

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..datasets.coco import COCOInstances


def average_precision(dataset: COCOInstances, results: list[dict], kind: str) -> dict:
    """COCO's metric by COCO's own tool, over exactly the images of the dataset.

    Args:
        dataset: With the truth.
        results: In COCO's result format, all images in one list: dicts of ``image_id``, ``category_id`` (the JSON's),
            ``bbox`` (x, y, width, height), ``score`` and ``segmentation`` (compressed run lengths).
        kind: ``bbox`` or ``segm``.

    Returns:
        ``ap``, ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large``, and ``by_class``, the ap by name; None
        where there is no object to be found.
    """
    if kind == "segm":  # else the tool would take the area of an object, small or large, from its box
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    truth, found = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = dataset.ground_truth()
        truth.createIndex()
        if results:  # an empty list is more than loadRes can bear
            found = truth.loadRes([dict(result) for result in results])
        run = COCOeval(truth, found, kind)
        # COCO's metric looks at the best hundred of an image, unless a detector was asked for more.
        run.params.maxDets[-1] = max(100, *Counter(result["image_id"] for result in results).values(), 0)
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    precision = run.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class) for all areas and 100 detections
    by_id = dict(zip(run.params.catIds, precision.mean(axis=(0, 1)), strict=True))
    by_class = {name: _plain(by_id[i]) for name, i in zip(dataset.classes, dataset.category_ids, strict=True)}
    run.stats[0] = precision[precision > -1].mean() if (precision > -1).any() else -1  # pycocotools has it of 100 only
    return {**{name: _plain(value) for name, value in zip(names, run.stats, strict=False)}, "by_class": by_class}


def _plain(value: float) -> float | None:
    return None if value < 0 else round(float(value), 4)  # -1 is COCO's "undefined"
