"""Figs. 2 and 3 of the block removal paper, and the study of layer attribution."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ...methods.block_removal import MAX_EXHAUSTIVE
from ..config import SearchConfig
from ..records import TrialResult, TrialStatus
from .study import Facts, Picture, Row, Study

MAX_LAYERS = 6  # the longest curve of the layer study
OPTIMUM, GREEDY = "optimum of all subsets", "greedy (the paper's)"

_ORDERS = {
    "exhaustive": OPTIMUM,
    "greedy": GREEDY,
    "oneshot": "each block measured once",
    "sequential": "sequential",
    "sr_init": "SR-init",
    "attribution": "attribution",
    "random": "random",
}
_RECALIBRATED = {
    "exhaustive": "optimum with batch norms re-estimated",
    "greedy": "greedy with batch norms re-estimated",
}
_SCORES = {
    "grad_x_act": "gradient x activation (the paper's)",
    "gradient_shap": "gradient SHAP",
    "layer_l1": "layer L1",
    "random": "random",
}


def _figure_2(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    points = tuple(range(1, facts.num_blocks + 1))
    orders = dict(_ORDERS)
    if facts.num_blocks > MAX_EXHAUSTIVE:
        del orders["exhaustive"]
    rows = [Row("dense", "Unpruned", work="dense")]
    for order, label in orders.items():
        control = order in ("oneshot", "attribution", "random")
        rows.append(
            Row(
                order.replace("_", "-"), label, work="blocks", options={"order": order},
                points=points, series=label, control=control,
            )
        )  # fmt: skip
    for order, label in _RECALIBRATED.items():
        if order in orders:
            rows.append(
                Row(
                    f"{order}-bn", label, work="blocks", points=points, series=label, control=True,
                    options={"order": order, "score_recalibrate_bn": True},
                )
            )  # fmt: skip
    return tuple(rows)


def _layers(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    points = tuple(range(1, min(facts.num_layers, MAX_LAYERS) + 1))
    rows = [Row("dense", "Unpruned", work="dense")]
    for mode in ("bypass", "zero"):
        for score, name in _SCORES.items():
            if mode == "zero" and score in ("gradient_shap", "random"):
                continue
            label = f"{mode}: {name}"
            rows.append(
                Row(
                    f"{score.replace('_', '-')}-{mode}", label, work="layers",
                    options={"score": score, "mode": mode}, points=points, series=label,
                    control=score == "random",
                )
            )  # fmt: skip
    return tuple(rows)


def greedy_against_optimum(results: Sequence[TrialResult]) -> list[str]:
    """At how many sizes the greedy order removes what is best of all subsets, by seed."""
    found: dict[tuple[int, int], dict[str, Mapping[str, object]]] = {}
    for result in results:
        given = json.loads(result.candidate)
        if result.status is TrialStatus.COMPLETED and given.get("label") in (OPTIMUM, GREEDY):
            facts = {"blocks": set(result.dropped_blocks), "score": given.get("calibration")}
            found.setdefault((result.seed, given["point"]), {})[given["label"]] = facts
    lines = []
    for seed in sorted({seed for seed, _ in found}):
        pairs = [p for (s, _), p in sorted(found.items()) if s == seed and len(p) == 2]
        same = sum(p[OPTIMUM]["blocks"] == p[GREEDY]["blocks"] for p in pairs)
        equal = sum(p[OPTIMUM]["score"] == p[GREEDY]["score"] for p in pairs)
        lines.append(
            f"Seed {seed}: greedy removes the very blocks of the optimum at {same} of "
            f"{len(pairs)} sizes, and has its calibration accuracy at {equal}."
        )
    return lines


STUDIES = (
    Study(
        "blocks",
        "fig2",
        "which blocks to remove",
        "ResNet-20 on CIFAR-10 (Fig. 3: CIFAR-100, Fig. 4: ResNet-56), fine-tuned 50 epochs; "
        "pictures without numbers. The text says that greedy removal is better than both "
        "baselines (sequential, SR-init) and close to the optimum.",
        _figure_2,
        method=GREEDY,
        compare={"accuracy_before_finetune": "", "accuracy": ""},
        ranking=((OPTIMUM,), (GREEDY,), (_ORDERS["sequential"], _ORDERS["sr_init"])),
        settings={"space": {"criteria": [], "blocks": {"mode": "ranked"}}},
        picture=Picture("point", "removed blocks", "removed blocks"),
        notes=(
            "Orders are found on the calibration split, part of the training data; accuracies "
            "are on the validation split.",
        ),
        remarks=greedy_against_optimum,
    ),
    Study(
        "layers",
        "abstract",
        "which layers to take out",
        "Detectors on COCO; only the abstract is known. It says that attribution chooses other "
        "layers than L1 and better ones: ShuffleNetV2 becomes 10 % faster, while L1 loses "
        "13.7 %; RetinaNet keeps its mAP of .151, while L1 loses 1.3 points at 6.2 % more speed.",
        _layers,
        method=f"bypass: {_SCORES['grad_x_act']}",
        compare={"accuracy_before_finetune": "", "accuracy": ""},
        ranking=tuple((f"bypass: {_SCORES[s]}",) for s in ("grad_x_act", "layer_l1")),
        settings={"space": {"criteria": [], "blocks": {"mode": "ranked", "valid": "residual"}}},
        picture=Picture("point", "layers taken out", "layers out"),
        notes=(
            "A layer is a unit that keeps the shape: a residual block, elsewhere a single layer "
            "with its batch norm. Zeroed layers are still computed: their multiply-adds stay.",
        ),
    ),
)
