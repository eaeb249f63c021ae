"""Tables 2a and 3 of BlockWIPG, data-free channel pruning."""

from __future__ import annotations

from ..config import SearchConfig
from .study import Facts, Row, Study

TOP1, MAP = "top-1 (%)", "mAP@50 (%)"
DATA_FREE = {
    "space": {"keep": {"scope": "internal"}},
    "recover": {"recalibrate_bn": False},  # which reads training images
}


def _table_2a(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    printed = {
        "random": ("Random", (75.20, 74.90)),
        "magnitude_l1": ("Magnitude", (76.08, 75.09)),
        "synflow": ("SynFlow", (76.10, 75.12)),
        "blockwipg": ("BlockWIPG", (76.05, 75.38)),
    }
    rows = [Row("dense", "Vanilla", work="dense", paper={TOP1: 76.13})]
    for column, removed in enumerate((20, 36)):
        for name, (label, figures) in printed.items():
            rows.append(_row(name, label, removed, {TOP1: figures[column]}))
        label = "BlockWIPG scored once"
        rows.append(_row("blockwipg", label, removed, {}, once=True))
    return tuple(rows)


def _table_3(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    printed = {"I_m": (46.70, 46.65), "I_n": (43.65, 43.55), "I_p": (42.42, 42.33)}
    rows = [Row("dense", "Unpruned", work="dense", paper={MAP: 46.72})]
    for column, removed in enumerate((10, 20)):
        for terms, figures in printed.items():
            rows.append(_row("blockwipg", terms, removed, {MAP: figures[column]}, terms=terms))
        rows.append(_row("random", "random channels", removed, {}))
    return tuple(rows)


def _row(
    criterion: str,
    label: str,
    removed: int,
    paper: dict[str, float],
    *,
    once: bool = False,
    terms: str | None = None,
) -> Row:
    """A row that removes `removed` % of the channels inside each block."""
    key = (terms or criterion).replace("_", "-") + ("-once" if once else "")
    return Row(
        f"{key}-{removed}",
        label,
        f"{removed} % of the channels removed",
        work="blockwise",
        criterion=criterion,
        options={"terms": terms} if terms else {},
        select="ratio",
        amount=1 - removed / 100,
        reconstruct="blockwise" if criterion == "blockwipg" and not once else "after",
        paper=paper,
        control=not paper,
    )


_NOTES = (
    "The pruned accuracy is data-free: after the blocks were reconstructed on random vectors, "
    "with no image and no new batch-norm statistics.",
    "Channels inside residual blocks only: block outputs keep their shape. BlockWIPG scores, "
    "prunes and reconstructs one block after the other; the other rows score the dense model, "
    "remove all channels, and reconstruct the blocks in the same way.",
)

STUDIES = (
    Study(
        "blockwipg",
        "2a",
        "data-free pruning",
        "ResNet-50 on ImageNet, dense 76.20 % for the rivals and 76.13 % for BlockWIPG. The text "
        "says that at 20 % only SynFlow is better, the table that Magnitude is, too. At 36 % "
        "Random's 74.90 (-1.87) and SynFlow's 75.12 (-0.76) do not fit 76.20.",
        _table_2a,
        method="BlockWIPG",
        compare={"accuracy_before_finetune": TOP1, "accuracy": TOP1},
        settings=DATA_FREE,
        notes=_NOTES,
    ),
    Study(
        "blockwipg",
        "3",
        "the terms of the score",
        "Faster R-CNN with ResNet-50 on maize images, mAP@50, dense 46.72 %; ours classifies.",
        _table_3,
        method="I_m",
        compare={"accuracy_before_finetune": MAP, "accuracy": MAP},
        settings=DATA_FREE,
        notes=_NOTES,
    ),
)
