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
    for step, removed in enumerate((20, 36)):
        for name, (label, figures) in printed.items():
            rows.append(_row(name, label, removed, step + 1, {TOP1: figures[step]}))
        rows.append(_row("blockwipg", "BlockWIPG without reconstruction", removed, 0, {}))
    return tuple(rows)


def _table_3(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    printed = {"I_m": (46.70, 46.65), "I_n": (43.65, 43.55), "I_p": (42.42, 42.33)}
    rows = [Row("dense", "Unpruned", work="dense", paper={MAP: 46.72})]
    for step, removed in enumerate((10, 20)):
        for terms, figures in printed.items():
            paper = {MAP: figures[step]}
            rows.append(_row("blockwipg", terms, removed, step + 1, paper, terms=terms))
        rows.append(_row("random", "random channels", removed, step + 1, {}))
    return tuple(rows)


def _row(
    criterion: str,
    label: str,
    removed: int,
    steps: int,
    paper: dict[str, float],
    *,
    terms: str | None = None,
) -> Row:
    """A row that removes `removed` % of the channels inside each block, in `steps` steps."""
    key = (terms or criterion).replace("_", "-") + ("" if steps else "-plain")
    return Row(
        f"{key}-{removed}",
        label,
        f"{removed} % of the channels removed",
        criterion=criterion,
        options={"terms": terms} if terms else {},
        select="ratio",
        amount=1 - removed / 100,
        settings={"recover": {"reconstruct": {"steps": steps}}},
        paper=paper,
        control=not paper,
    )


_NOTES = (
    "The pruned accuracy is data-free: after the blocks were reconstructed on random vectors, "
    "with no image and no new batch-norm statistics.",
    "Channels inside residual blocks only: block outputs keep their shape. All criteria go block "
    "by block: score, remove, reconstruct. The smaller ratio takes one step, the larger two.",
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
