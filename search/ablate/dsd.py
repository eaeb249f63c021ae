"""The ablation tables of DSD (decoupled sparse training of batch-norm scales)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import SearchConfig
from .study import Facts, Row, Study

BEFORE, AFTER = "pruned (%)", "fine-tuned (%)"
COMPARE = {"accuracy_before_finetune": BEFORE, "accuracy": AFTER}
Form = tuple[str, Mapping[str, Any], float, float]
OURS = ("both stages, running mean of the measure (EMA .95)", {"strategy": "both", "ema": 0.95})

_ACTIONS = {"P": "penalize", "R": "reward"}
_PARTS = {"E": "important", "N": "redundant"}


def _strategy(parameter: str, name: str) -> dict[str, str]:
    """Options of a strategy such as `ER+NP`: reward the essential, penalise the rest."""
    found = {f"{parameter}_{part}": "none" for part in _PARTS.values()}
    for word in name.replace("/", "").split("+"):
        if word:
            found[f"{parameter}_{_PARTS[word[0]]}"] = _ACTIONS[word[1]]
    return found


def _forms(parameter: str, figures: Mapping[str, tuple[float, float]]) -> list[Form]:
    return [
        (name, _strategy(parameter, name), before, after)
        for name, (before, after) in figures.items()
    ]


def _metrics(*figures: tuple[float, float]) -> list[Form]:
    names = {
        "abs_gradient": "|grad tau|",
        "abs_scale": "|tau|",
        "product": "grad tau x tau",
        "abs_product": "|grad tau x tau|",
    }
    return [
        (label, {"metric": name}, *pair)
        for (name, label), pair in zip(names.items(), figures, strict=True)
    ]


def _stages(*figures: tuple[float, float]) -> list[Form]:
    names = {
        "slimming": "Slimming",
        "phase1_only": "decoupled sparsity",
        "both": "decoupled sparsity and fine-tuning",
    }
    return [
        (label, {"strategy": name}, *pair)
        for (name, label), pair in zip(names.items(), figures, strict=True)
    ]


def _rows(forms: list[Form], dense: float) -> Callable[[SearchConfig, Facts], tuple[Row, ...]]:
    """The forms at the config's q, and controls: ours, and without sparse training."""

    def rows(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
        keep = round(1 - config.ablate.dsd_q, 6)
        found = [Row("dense", "Unpruned", work="dense", paper={AFTER: dense})]
        for index, (label, options, before, after) in enumerate(forms):
            paper = {BEFORE: before, AFTER: after}
            found.append(
                Row(
                    f"form{index + 1}", label, criterion="dsd", options=options,
                    select="global", amount=keep, paper=paper,
                )
            )  # fmt: skip
        if any("strategy" in options for _, options, _, _ in forms):
            label, options = OURS
            found.append(
                Row(
                    "ours", label, criterion="dsd", options=options, select="global",
                    amount=keep, control=True,
                )
            )  # fmt: skip
        for name, label in (("slimming", "|tau|"), ("random", "random channels")):
            found.append(
                Row(
                    name, f"{label} without sparse training", criterion=name, select="global",
                    amount=keep, control=True,
                )
            )  # fmt: skip
        return tuple(found)

    return rows


def _study(
    table: str, title: str, terms: str, forms: list[Form], method: str, *notes: str
) -> Study:
    return Study(
        "dsd",
        table,
        title,
        terms,
        _rows(forms, 93.95 if terms.startswith(_RESNET) else 72.39),
        method,
        COMPARE,
        settings={"space": {"keep": {"scope": "internal"}}, "recover": {"recalibrate_bn": False}},
        notes=(
            "All rows remove the share ablate.dsd_q of the channels that lie inside residual "
            "blocks, ranked over the whole model. The pruned accuracy is that of the weights as "
            "they stand, without new batch-norm statistics.",
            *notes,
        ),
    )


_RESNET = "ResNet-56 on CIFAR-10, 300 epochs of sparse training, 160 of fine-tuning"
_DOTA = "YOLOv5m-obb on DOTA, mAP@.5; ours classifies"
_TAU = "what the gradient of tau is given: E essential, N the rest, P penalised, R rewarded"
_BETA = "what the gradient of beta is given: E essential, N the rest, P penalised, R rewarded"
_STAGES, _METRIC = "the two stages of sparse training", "the measure of importance"
_BOTH, _PRODUCT = "decoupled sparsity and fine-tuning", "|grad tau x tau|"
_BEST_BETA = "In this table the paper's own choice is NP although ER is best before fine-tuning."

STUDIES = (
    _study(
        "5", _STAGES, f"{_RESNET}; 52.87 % of the parameters removed.",
        _stages((86.95, 91.97), (69.59, 93.99), (91.2, 94.54)), _BOTH,
    ),
    _study(
        "6", _STAGES, f"{_DOTA}; 85 % removed.",
        _stages((0.0, 66.7), (48.1, 68.4), (56.7, 69.5)), _BOTH,
    ),
    _study(
        "7", _TAU, f"{_RESNET}; 52.97 % removed. The last row is 94.54 % in Table 5.",
        _forms("tau", {
            "EP": (0.56, 79.59), "ER": (50.2, 81.74), "NR": (0.45, 80.57),
            "NP+EP": (86.95, 91.97), "NP": (40.35, 80.9), "ER+NP": (91.2, 93.61),
        }), "ER+NP",
    ),
    _study(
        "8", _TAU, f"{_DOTA}; 80 % removed.",
        _forms("tau", {
            "EP": (0.0, 0.05), "ER": (0.0, 0.06), "NR": (0.0, 0.03),
            "NP+EP": (0.0, 66.7), "NP": (29.0, 68.3), "ER+NP": (56.7, 69.5),
        }), "ER+NP",
    ),
    _study(
        "9", _METRIC, f"{_RESNET}; 65 % removed.",
        _metrics((11.25, 92.05), (38.01, 93.3), (16.90, 92.71), (46.63, 94.11)), _PRODUCT,
    ),
    _study(
        "10", _METRIC, f"{_DOTA}; 80 % removed.",
        _metrics((0.0, 67.2), (0.0, 66.8), (0.1, 68.3), (56.7, 69.5)), _PRODUCT,
    ),
    _study(
        "11", _BETA, f"{_RESNET}; 65 % removed.",
        _forms("beta", {
            "/": (24.55, 93.73), "ER+NP": (0.0, 93.84), "EP": (16.77, 93.4),
            "ER": (92.47, 93.25), "NR": (13.06, 93.32), "NP+EP": (74.72, 93.67),
            "NP": (46.63, 94.11),
        }), "NP", _BEST_BETA,
    ),
    _study(
        "12", _BETA, f"{_DOTA}; 80 % removed. The text gives EP, not NP, 69.5 %.",
        _forms("beta", {
            "/": (0.0, 64.5), "ER+NP": (0.0, 68.9), "EP": (0.0, 68.5), "ER": (0.0, 66.7),
            "NR": (0.0, 0.0), "NP+EP": (0.0, 68.7), "NP": (56.7, 69.5),
        }), "NP",
    ),
)  # fmt: skip
