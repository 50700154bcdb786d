"""Average precision: cases worked by hand, the devkit's rules told a second way, pycocotools where it must agree."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e3va_lite.errors import InputError
from e3va_lite.tasks.voc_metric import average_precision, box_iou

NOWHERE = (900, 900, 910, 910)


def box(n):
    """The n-th of a row of boxes that do not touch."""
    return (20 * n, 0, 20 * n + 10, 10)


def pred(*detections):
    """One image's predictions from (box, score) or (box, score, label)."""
    boxes, scores, labels = zip(*((*d, 1)[:3] for d in detections), strict=True) if detections else ([], [], [])
    return {"boxes": np.reshape(boxes, (-1, 4)), "scores": np.array(scores), "labels": np.array(labels, int)}


def truth(*boxes, labels=None, difficult=None):
    """One image's ground truth."""
    target = {"boxes": np.reshape(boxes, (-1, 4)), "labels": np.array(labels or [1] * len(boxes), int)}
    return target if difficult is None else {**target, "difficult": np.array(difficult, bool)}


def both(predictions, targets, num_classes=1, **options):
    result = average_precision(predictions, targets, num_classes, **options)
    return result.mean_eleven_point, result.mean_all_point


# By hand -------------------------------------------------------------------------------------------------------------


def test_curve_worked_by_hand():
    # By score: hit, miss, hit, miss, hit of 4 boxes. Recall 1/4 1/4 2/4 2/4 3/4, precision 1 1/2 2/3 2/4 3/5.
    predictions = [
        pred((box(0), 0.9), (NOWHERE, 0.8), (box(1), 0.7)),
        pred((NOWHERE, 0.6), (box(0), 0.5)),
    ]
    targets = [truth(box(0), box(1)), truth(box(0), box(1))]
    eleven, area = both(predictions, targets)
    # Recalls 0 .1 .2 | .3 .4 .5 | .6 .7 | .8 .9 1
    assert eleven == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5 + 3 * 0) / 11)
    assert area == pytest.approx(1 / 4 * 1 + 1 / 4 * 2 / 3 + 1 / 4 * 3 / 5)
    recall, precision = average_precision(predictions, targets, 1).curves[0]
    np.testing.assert_allclose(recall, [0.25, 0.25, 0.5, 0.5, 0.75])
    np.testing.assert_allclose(precision, [1, 1 / 2, 2 / 3, 1 / 2, 3 / 5])


def test_precision_is_the_best_at_that_recall_or_beyond():
    # A miss first, then two hits: precision 0 1/2 2/3; 2/3 counts for every recall.
    eleven, area = both([pred((NOWHERE, 0.9), (box(0), 0.8), (box(1), 0.7))], [truth(box(0), box(1))])
    assert (eleven, area) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize("hits", range(11))
def test_whole_tenths_are_compared_as_the_usual_implementations_do(hits):
    """``rec >= t`` for t in np.arange(0., 1.1, 0.1): 3/10, 6/10 and 7/10 are below the point of that name."""
    predictions = [pred(*((box(n), 0.5) for n in range(hits)))]
    targets = [truth(*(box(n) for n in range(10)))]
    eleven, area = both(predictions, targets)
    reached = 1 + hits - (hits in (3, 6, 7)) if hits else 0
    assert reached == (np.arange(0.0, 1.1, 0.1) <= hits / 10).sum() * (hits > 0)
    assert eleven == pytest.approx(reached / 11)
    assert area == pytest.approx(hits / 10)


def test_a_whole_tenth_worked_by_hand():
    # Of 10 boxes three are found, then a miss, then the fourth: the point .3 has 4/5, and not the 1 of recall 3/10.
    predictions = [pred(*((box(n), 0.9) for n in range(3)), (NOWHERE, 0.8), (box(3), 0.7))]
    eleven, area = both(predictions, [truth(*(box(n) for n in range(10)))])
    assert eleven == pytest.approx((3 * 1 + 2 * 4 / 5) / 11)
    assert area == pytest.approx(3 / 10 * 1 + 1 / 10 * 4 / 5)


def test_second_detection_of_a_box_is_false():
    eleven, area = both([pred((box(0), 0.9), (box(0), 0.8), (box(1), 0.7))], [truth(box(0), box(1))])
    assert area == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_no_second_choice():
    # Both detections overlap the left box most; the second one overlaps the right one by .5 too, and may not take it.
    left, right = (0, 0, 12, 10), (4, 0, 16, 10)
    predictions = [pred((left, 0.9), ((1, 0, 13, 10), 0.8))]
    assert box_iou(np.array([[1.0, 0, 13, 10]]), np.array([left, right], float)).min() >= 0.5
    assert both(predictions, [truth(left, right)])[1] == pytest.approx(0.5)


def test_difficult_boxes_are_neither_asked_for_nor_wrong():
    plain = [pred((box(0), 0.8), (NOWHERE, 0.7), (box(1), 0.6))]
    twice_on_the_difficult_one = [pred((box(2), 0.95), (box(2), 0.9), (box(0), 0.8), (NOWHERE, 0.7), (box(1), 0.6))]
    target = [truth(box(0), box(1), box(2), difficult=[False, False, True])]
    expected = (pytest.approx((6 * 1 + 5 * 2 / 3) / 11), pytest.approx(1 / 2 + 1 / 2 * 2 / 3))
    assert both(plain, target) == expected
    assert both(twice_on_the_difficult_one, target) == expected
    assert average_precision(plain, target, 1).positives.tolist() == [2]
    # A detection belongs to what it overlaps most: here the difficult box, so the other one stays unfound.
    easy, hard = (0, 0, 10, 10), (0, 0, 12, 10)
    assert both([pred((hard, 0.9))], [truth(easy, hard, difficult=[False, True])]) == (0, 0)


def test_overlap_of_exactly_the_threshold_counts():
    half = [pred(((0, 0, 10, 5), 0.9))]
    assert both(half, [truth(box(0))]) == (1, 1)
    assert both(half, [truth(box(0))], iou=0.51) == (0, 0)


def test_equal_scores_keep_the_order_of_images_and_lists():
    hit_first = [pred((box(0), 0.5), (NOWHERE, 0.5)), pred((box(0), 0.5))]
    miss_first = [pred((NOWHERE, 0.5), (box(0), 0.5)), pred((box(0), 0.5))]
    targets = [truth(box(0)), truth(box(0))]
    assert both(hit_first, targets)[1] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert both(miss_first, targets)[1] == pytest.approx(2 / 3)


def test_nothing_detected_and_nothing_there():
    assert both([pred()], [truth(box(0))]) == (0, 0)
    # Images without objects: a detection there is false, silence is right.
    assert both([pred((box(0), 0.5)), pred()], [truth(box(0)), truth()]) == (1, 1)
    assert both([pred((box(0), 0.5)), pred((box(0), 0.9))], [truth(box(0)), truth()])[1] == pytest.approx(0.5)


def test_class_without_ground_truth_stays_out_of_the_mean():
    predictions = [pred((box(0), 0.9, 1), (box(1), 0.8, 2), (box(2), 0.7, 3), (box(3), 0.6, 4))]
    targets = [truth(box(0), box(4), box(3), labels=[1, 3, 4], difficult=[False, False, True])]
    result = average_precision(predictions, targets, num_classes=4)
    np.testing.assert_array_equal(result.all_point, [1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(result.eleven_point, [1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(result.positives, [1, 0, 1, 0])
    assert (result.mean_all_point, result.mean_eleven_point) == (0.5, 0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("images", [0, 1])
def test_no_ground_truth_at_all_is_nan(images):
    assert np.isnan(both([pred((box(0), 0.9))] * images, [truth()] * images)).all()


def test_classes_do_not_mix():
    assert both([pred((box(0), 0.9, 2))], [truth(box(0), labels=[1])], num_classes=2) == (0, 0)


# Against others ------------------------------------------------------------------------------------------------------


def random_scene(rng, num_classes=3):
    """Four images of crowded boxes on whole VOC pixels (1-based, inclusive), jittered and stray detections, ties."""
    scene = []
    for _ in range(4):
        corner = rng.integers(1, 60, (rng.integers(0, 8), 2))
        real = np.hstack([corner, corner + rng.integers(5, 40, corner.shape)])
        labels, difficult = rng.integers(1, num_classes + 1, len(real)), rng.random(len(real)) < 0.3
        copies = rng.integers(0, len(real), 15) if len(real) else np.zeros(0, int)
        stray = np.array([[3, 3, 30, 30], [20, 10, 50, 60]])
        found = np.vstack([real[copies] + rng.integers(-3, 4, (len(copies), 4)), stray])
        found_labels = np.concatenate([labels[copies], [1, 2]])
        scene.append((real, labels, difficult, found, rng.integers(0, 9, len(found)) / 10, found_labels))
    return scene


def to_half_open(voc_boxes):
    return voc_boxes - np.array([1, 1, 0, 0])


def devkit(scene, label):
    """The devkit's evaluation of one class, in its own pixels and one detection at a time."""
    detections = [
        (score, i, b)
        for i, (*_, found, scores, labels) in enumerate(scene)
        for b, score, found_label in zip(found, scores, labels, strict=True)
        if found_label == label
    ]
    detections.sort(key=lambda d: -d[0])  # Python's sort is stable
    positives = sum(int(((labels == label) & ~difficult).sum()) for _, labels, difficult, *_ in scene)
    seen, tp, fp, recall, precision = set(), 0, 0, [], []
    for _, i, (x1, y1, x2, y2) in detections:
        best, best_j = -1.0, None
        for j, (a1, b1, a2, b2) in enumerate(scene[i][0]):
            if scene[i][1][j] != label:
                continue
            w, h = min(x2, a2) - max(x1, a1) + 1, min(y2, b2) - max(y1, b1) + 1
            if w > 0 and h > 0:
                union = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1) - w * h
                if w * h / union > best:
                    best, best_j = w * h / union, j
        if best >= 0.5:
            if scene[i][2][best_j]:
                continue
            hit = (i, best_j) not in seen
            seen.add((i, best_j))
        else:
            hit = False
        tp, fp = tp + hit, fp + (not hit)
        recall.append(tp / positives if positives else np.nan)
        precision.append(tp / (tp + fp))
    if not positives:
        return np.nan, np.nan
    tenths = [[p for r, p in zip(recall, precision, strict=True) if r >= t] for t in np.arange(0.0, 1.1, 0.1)]
    eleven = np.mean([max(best, default=0) for best in tenths])
    steps = [0.0, *recall]
    area = sum((steps[n + 1] - steps[n]) * max(precision[n:]) for n in range(len(precision)))
    return eleven, area


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_the_devkits_rules(seed):
    scene = random_scene(np.random.default_rng(seed))
    predictions = [{"boxes": to_half_open(f), "scores": s, "labels": n} for *_, f, s, n in scene]
    targets = [{"boxes": to_half_open(b), "labels": n, "difficult": d} for b, n, d, *_ in scene]
    result = average_precision(predictions, targets, num_classes=3)
    for k in range(3):
        assert (result.eleven_point[k], result.all_point[k]) == pytest.approx(devkit(scene, k + 1), nan_ok=True)


def test_half_open_boxes_overlap_as_the_devkits_pixels_do():
    rng = np.random.default_rng(0)
    corners = rng.integers(1, 20, (2, 50, 2))
    a, b = np.concatenate([corners, corners + rng.integers(0, 20, corners.shape)], axis=2)  # single pixels included
    pixels = [{(x, y) for x in range(x1, x2 + 1) for y in range(y1, y2 + 1)} for x1, y1, x2, y2 in [*a, *b]]
    counted = [[len(p & q) / len(p | q) for q in pixels[50:]] for p in pixels[:50]]
    np.testing.assert_array_equal(box_iou(to_half_open(a).astype(float), to_half_open(b).astype(float)), counted)


@pytest.mark.parametrize("seed", range(3))
def test_same_curve_as_pycocotools_where_no_box_competes(seed):
    """COCO lets a detection take its second choice and samples 101 recalls; with boxes that do not touch there is no
    second choice, so that the same samples of our curve are its AP at .5."""
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(5):
        real = np.array([box(n) for n in range(rng.integers(1, 9))], float)
        near = real[rng.integers(0, len(real), 12)] + rng.normal(0, 1.5, (12, 4))
        predictions.append({"boxes": near, "scores": rng.random(12), "labels": np.ones(12, int)})
        targets.append({"boxes": real, "labels": np.ones(len(real), int)})
    recall, precision = average_precision(predictions, targets, 1).curves[0]
    ours = np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)])
    assert 0.2 < ours < 0.95  # a case with both kinds of detections
    assert ours == pytest.approx(coco_ap50(predictions, targets), abs=1e-9)


def coco_ap50(predictions, targets):
    def xywh(b):
        return [b[0], b[1], b[2] - b[0], b[3] - b[1]]

    truths = [(i, xywh(b)) for i, t in enumerate(targets) for b in t["boxes"].tolist()]
    found = [
        {"image_id": i, "category_id": 1, "bbox": xywh(b), "score": s}
        for i, p in enumerate(predictions)
        for b, s in zip(p["boxes"].tolist(), p["scores"].tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(targets))],
            "categories": [{"id": 1}],
            "annotations": [
                {"id": n, "image_id": i, "category_id": 1, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
                for n, (i, b) in enumerate(truths, 1)
            ],
        }
        coco.createIndex()
        coco.dataset["info"] = {}
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][
        0, :, 0, 0, 2
    ].mean()  # IoU .5, all recalls, the class, all areas, 100 per image


# Properties ----------------------------------------------------------------------------------------------------------


def random_case(seed):
    scene = random_scene(np.random.default_rng(seed))
    predictions = [{"boxes": to_half_open(f), "scores": s, "labels": n} for *_, f, s, n in scene]
    return predictions, [{"boxes": to_half_open(b), "labels": n, "difficult": d} for b, n, d, *_ in scene]


@pytest.mark.parametrize("seed", range(5))
def test_only_the_order_of_scores_matters(seed):
    predictions, targets = random_case(seed)
    stretched = [{**p, "scores": np.exp(5 * p["scores"]) - 7} for p in predictions]
    assert both(predictions, targets, 3) == both(stretched, targets, 3)


@pytest.mark.parametrize("seed", range(5))
def test_a_false_detection_costs_nothing_last_and_something_first(seed):
    predictions, targets = random_case(seed)

    def with_false(score):
        extra = {"boxes": [NOWHERE], "scores": [score], "labels": [1]}
        first = {key: np.concatenate([predictions[0][key], extra[key]]) for key in extra}
        return average_precision([first, *predictions[1:]], targets, 3).all_point

    plain = average_precision(predictions, targets, 3).all_point
    np.testing.assert_array_equal(with_false(-1.0), plain)
    assert plain[0] > 0 and with_false(2.0)[0] < plain[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_truth_itself_scores_one(seed):
    _, targets = random_case(seed)
    predictions = [{**t, "scores": np.ones(len(t["labels"]))} for t in targets]
    assert both(predictions, targets, 3) == (1, 1)


# Input ---------------------------------------------------------------------------------------------------------------


def test_tensors_do_as_well_as_arrays_and_nothing_is_changed():
    predictions, targets = random_case(0)
    tensors = [[{k: torch.as_tensor(v) for k, v in item.items()} for item in part] for part in (predictions, targets)]
    before = [{k: v.clone() for k, v in item.items()} for item in tensors[1]]
    assert both(*tensors, 3) == both(predictions, targets, 3)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(tensors[1], before, strict=True) for k in b)


@pytest.mark.parametrize(
    ("predictions", "targets", "words"),
    [
        ([pred()], [truth(), truth()], "1 predictions for 2 targets"),
        ([pred((box(0), 0.5, 0))], [truth()], "label 0"),
        ([pred()], [truth(box(0), labels=[2])], "target 0 has the label 2"),
        ([{**pred((box(0), 0.5)), "scores": [0.5, 0.4]}], [truth()], "2 scores"),
        ([pred()], [truth(box(0), difficult=[True, False])], "2 difficult"),
    ],
)
def test_bad_input_is_named(predictions, targets, words):
    with pytest.raises(InputError, match=words):
        average_precision(predictions, targets, num_classes=1)
