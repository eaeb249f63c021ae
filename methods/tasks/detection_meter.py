"""Figures of a detector's outputs: mean average precision, the best F1, and a smooth loss.

mAP as COCO defines it (Lin et al. 2014, arXiv:1405.0312), by torchmetrics with
faster-coco-eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

Detections = Mapping[str, Tensor]
LIBRARIES = ("torchmetrics", "faster_coco_eval")
MATCH_IOU = 0.5  # IoU from which a detection has found an object, for F1

Accuracy = Literal["map50_95", "map50"]


class DetectionMeter:
    """Adds up detections and objects, and computes all figures at the end.

    Args:
        classes: Names; label 1 is the first.
        accuracy: Which figure `accuracy` is.
    """

    def __init__(self, classes: Sequence[str], accuracy: Accuracy = "map50_95") -> None:
        self._classes, self._accuracy = tuple(classes), accuracy
        self._detections: list[dict[str, Tensor]] = []
        self._targets: list[dict[str, Tensor]] = []

    def update(self, output: Sequence[Detections], targets: Sequence[Detections], /) -> None:
        """Takes in one batch.

        Args:
            output: For each image `boxes` [n, 4] xyxy, `scores` [n] and `labels` [n], from 1.
            targets: For each image `boxes`, `labels`, and `iscrowd` where objects are ignored.
        """
        assert len(output) == len(targets)
        for found, wanted in zip(output, targets, strict=True):
            self._detections.append({key: value.detach().cpu() for key, value in found.items()})
            crowd = wanted.get("iscrowd", torch.zeros_like(wanted["labels"]))
            self._targets.append(
                {key: wanted[key].cpu() for key in ("boxes", "labels")} | {"iscrowd": crowd.cpu()}
            )

    def compute(self) -> dict[str, float]:
        """All figures, each in 0..1.

        Returns:
            `accuracy` (one of the next two), `map50_95`: mean over IoU thresholds .5 to .95 and
            classes of the average precision; `map50`: at .5 alone; `ap_CLASS`: map50_95 of each
            class that has objects; `f1`: at the score threshold where it is best, all classes
            together, at IoU .5; `f1_threshold`: that score; `loss`: the mean over the objects of
            1 - the largest score times IoU of a detection of its class. The training loss cannot
            be had from detections; this one is as smooth.
        """
        figures = self._average_precisions()
        f1, threshold = best_f1(self._detections, self._targets)
        figures |= {"f1": f1, "f1_threshold": threshold}
        figures["loss"] = missing(self._detections, self._targets)
        return {"accuracy": figures[self._accuracy], **figures}

    def _average_precisions(self) -> dict[str, float]:
        if not any(len(target["labels"]) for target in self._targets):
            return {"map50_95": 0.0, "map50": 0.0}
        metric = _metric()
        metric.update(self._detections, self._targets)
        found = metric.compute()
        labels = found["classes"].reshape(-1).tolist()
        of_class = zip(labels, found["map_per_class"].reshape(-1).tolist(), strict=True)
        return {
            "map50_95": max(0.0, float(found["map"])),
            "map50": max(0.0, float(found["map_50"])),
            **{_key(self._classes[n - 1]): value for n, value in of_class if value >= 0},
        }


def best_f1(
    detections: Sequence[Detections], targets: Sequence[Detections]
) -> tuple[float, float]:
    """F1 over all classes at the score threshold where it is largest.

    In the order of their scores, detections take the free object of their class that they
    overlap most, if the IoU is at least .5. Those that overlap an ignored object do not count.

    Returns:
        (F1, threshold); (0, 1) where nothing was found.
    """
    scores, hits = [], []
    for found, wanted in zip(detections, targets, strict=True):
        counted, hit = _match(found, wanted)
        scores.append(found["scores"][counted])
        hits.append(hit[counted])
    num_objects = sum(int((target["iscrowd"] == 0).sum()) for target in targets)
    every = torch.cat(scores).double() if scores else torch.zeros(0)
    if not len(every) or not num_objects:
        return 0.0, 1.0
    order = every.argsort(descending=True, stable=True)
    true = torch.cat(hits)[order].cumsum(0).double()
    f1 = 2 * true / (torch.arange(1, len(order) + 1) + num_objects)
    # Equal scores are taken together: no threshold parts them.
    ends = torch.ones(len(order), dtype=torch.bool)
    ends[:-1] = every[order][1:] != every[order][:-1]
    best = int(torch.where(ends, f1, -1.0).argmax())
    return float(f1[best]), float(every[order][best])


def missing(detections: Sequence[Detections], targets: Sequence[Detections]) -> float:
    """Mean over the objects of 1 - the largest score * IoU of a detection of its class.

    Returns:
        0 to 1; 0 without objects.
    """
    lost = []
    for found, wanted in zip(detections, targets, strict=True):
        real = wanted["iscrowd"] == 0
        if not len(found["labels"]):
            lost.append(torch.ones(int(real.sum())))
            continue
        quality = _overlaps(wanted, found) * found["scores"]
        lost.append(1 - quality.amax(1)[real])
    every = torch.cat(lost) if lost else torch.zeros(0)
    return float(every.double().mean()) if len(every) else 0.0


def _match(found: Detections, wanted: Detections) -> tuple[Tensor, Tensor]:
    """Which detections of an image count, and which of them are right, bool [n] each."""
    overlaps = _overlaps(found, wanted)
    crowd = wanted["iscrowd"] > 0
    free = ~crowd
    hit = torch.zeros(len(overlaps), dtype=torch.bool)
    near = (overlaps[:, free] >= MATCH_IOU).any(1)
    order = found["scores"].argsort(descending=True, stable=True)
    for index in order[near[order]].tolist():
        mine = torch.where(free, overlaps[index], 0.0)
        if len(mine) and float(mine.max()) >= MATCH_IOU:
            free[mine.argmax()] = False
            hit[index] = True
    excused = (overlaps[:, crowd] >= MATCH_IOU).any(1) & ~hit
    return ~excused, hit


def _overlaps(first: Detections, second: Detections) -> Tensor:
    """IoU of all pairs of boxes, 0 where the classes differ, [n, m]."""
    same = first["labels"][:, None] == second["labels"]
    return _iou(first["boxes"].float(), second["boxes"].float()) * same


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of all pairs of boxes xyxy [n, 4] and [m, 4], [n, m].

    Own: torchvision takes a second to import, in every process that knows the tasks.
    """
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    both = (high - low).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return both / (areas[0][:, None] + areas[1] - both).clamp(min=1e-9)


def check_libraries() -> None:
    """Refuses to start without the libraries that compute mAP.

    Raises:
        ValueError: Naming what is missing.
    """
    missing_here = [name for name in LIBRARIES if find_spec(name) is None]
    if missing_here:
        raise ValueError(
            f"`task` (=detection) must find the libraries that compute mAP: there is no "
            f"{missing_here[0]}. Install them with `pip install 'prune-search[detection]'`."
        )


def _metric() -> Any:
    from torchmetrics.detection import MeanAveragePrecision  # 1 s to import

    metric = MeanAveragePrecision(class_metrics=True, backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    return metric


def _key(name: str) -> str:
    return "ap_" + "_".join(name.split())
