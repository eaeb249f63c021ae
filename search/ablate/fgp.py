"""The tables and figures of FGP (Lv et al. 2024, "FGP: Feature-Gradient-Prune")."""

from __future__ import annotations

from ..config import SearchConfig
from .study import Facts, Picture, Row, Study

ACCURACY, MACS = "CIFAR-10 top-1 (%)", "MACs (M)"
CIFAR100, PARAMS = "CIFAR-100 top-1 (%)", "params (M)"
MACS_OF_K = {0.35: 74.16 / 314.03, 0.4: 83.15 / 314.03}  # Table 1, VGG-16: what k means in MACs
TEXT_K = "with k as the text defines it"
CLASS_COUNTS = (5, 10, 15, 20, 30, 50, 75, 100)  # Fig. 3b
FEW_CLASS_COUNTS = (2, 3, 5, 7)  # for data of ten classes


def _macs(config: SearchConfig) -> dict[float, float]:
    """The fraction of the dense MACs for each k: the paper's where it states one, else k - .13."""
    return {k: MACS_OF_K.get(k, max(0.05, k - 0.13)) for k in config.ablate.k}


def _table_1(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    printed = {
        "dsd": {ACCURACY: 92.91, CIFAR100: 73.36, MACS: 162.90, PARAMS: 5.4},
        "hrank": {ACCURACY: 91.23, CIFAR100: 72.31, MACS: 73.62, PARAMS: 1.23},
    }
    fgp = {
        0.35: {ACCURACY: 92.68, CIFAR100: 72.52, MACS: 74.16, PARAMS: 1.47},
        0.4: {ACCURACY: 93.49, CIFAR100: 72.82, MACS: 83.15, PARAMS: 1.73},
    }
    labels = {"dsd": "Slimming", "hrank": "HRank", "fgp": "FGP"}
    controls = {
        "slimming": "|tau| without sparse training",
        "magnitude_l1": "L1 magnitude",
        "random": "random channels",
    }
    rows = [
        Row(
            "dense", "Unpruned", work="dense",
            paper={ACCURACY: 93.92, CIFAR100: 74.10, MACS: 314.03, PARAMS: 17.7},
        )
    ]  # fmt: skip
    for k, fraction in _macs(config).items():
        group = f"at {100 * fraction:.1f} % of the MACs, the paper's for k = {k:g}"
        for name, label in (labels | controls).items():
            paper = fgp.get(k, {}) if name == "fgp" else printed.get(name, {})
            rows.append(
                Row(
                    f"{name}-macs{k:g}", label, group, criterion=name,
                    options={"strategy": "slimming"} if name == "dsd" else {},
                    select="macs", amount=fraction, paper=paper, control=name in controls,
                )
            )  # fmt: skip
    for k in config.ablate.k:
        rows.append(
            Row(
                f"fgp-k{k:g}", f"FGP, share k = {k:g} of the score", TEXT_K,
                criterion="fgp", select="cumulative", amount=k,
            )
        )  # fmt: skip
    return tuple(rows)


def _table_3(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    k = config.ablate.k[-1]
    forms = {
        "feature_only": ("features only", {ACCURACY: 93.08, MACS: 97.52}),
        "gradient_only": ("gradients only", {ACCURACY: 92.79, MACS: 94.21}),
        "both": ("FGP", {ACCURACY: 93.49, MACS: 83.15}),
    }
    rows = [Row("dense", "Unpruned", work="dense", paper={ACCURACY: 93.92, MACS: 314.03})]
    for rule, amount, group in (
        ("cumulative", k, f"at the same k = {k:g} (share of the score)"),
        ("macs", _macs(config)[k], f"at the same MACs, {100 * _macs(config)[k]:.1f} %"),
    ):
        for form, (label, paper) in forms.items():
            rows.append(
                Row(
                    f"{form.replace('_', '-')}-{rule}", label, group, criterion="fgp",
                    options={"criterion": form}, select=rule, amount=amount, paper=paper,
                )
            )  # fmt: skip
        for name, label in (("magnitude_l1", "L1 magnitude"), ("random", "random channels")):
            rows.append(
                Row(
                    f"{name}-{rule}", label, group, criterion=name, select=rule, amount=amount,
                    control=True,
                )
            )  # fmt: skip
    return tuple(rows)


def _figure_3a(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    rows = [Row("dense", "Unpruned", work="dense")]
    for name, label in (
        ("fgp", "FGP"), ("magnitude_l1", "L1 magnitude"), ("random", "random channels"),
    ):  # fmt: skip
        for tenth in range(1, 10):
            k = tenth / 10
            rows.append(
                Row(
                    f"{name}-k{k:g}", f"{label}, k = {k:g}", f"k = {k:g}", criterion=name,
                    select="cumulative", amount=k, x=k, series=label, control=name != "fgp",
                    match=None if name == "fgp" else "fgp",
                )
            )  # fmt: skip
    return tuple(rows)


def _figure_3b(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    gaps = {5: 0.68, 10: 0.68, 15: 0.52, 100: 1.58}
    known = CLASS_COUNTS if facts.num_classes > 10 else FEW_CLASS_COUNTS
    counts = [n for n in known if n < facts.num_classes] + [facts.num_classes]
    k = config.ablate.k[-1]
    rows: list[Row] = []
    for n in counts:
        paper = {"gap (points)": gaps[n]} if n in gaps else {}
        group = f"{n} classes"
        cut = n if n < facts.num_classes else None
        rows.append(Row(f"dense-c{n}", "Unpruned", group, work="dense", num_classes=cut, x=n))
        for name, label in (("fgp", "FGP"), ("random", "random channels")):
            rows.append(
                Row(
                    f"{name}-c{n}", label, group, criterion=name, select="cumulative", amount=k,
                    num_classes=cut, x=n, series=label, control=name != "fgp",
                    match=None if name == "fgp" else "fgp",
                    paper=paper if name == "fgp" else {},
                )
            )  # fmt: skip
    return tuple(rows)


def _figure_4(config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
    k = config.ablate.k[-1]
    modes = {
        "cumulative": ("Peak k", {"VGG-16 top-1 (%)": 92.60}),
        "peak30": ("Peak 30 %", {"VGG-16 top-1 (%)": 85.17}),
        "peak50_rand30": ("Peak 50 % Rand 30 %", {}),
        "bot50_rand30": ("Bot 50 % Rand 30 %", {}),
        "rand30": ("Rand 30 %", {"VGG-16 top-1 (%)": 85.17}),
    }
    rows = [Row("dense", "Unpruned", work="dense")]
    for rule, (label, paper) in modes.items():
        amount = k if rule == "cumulative" else None
        rows.append(
            Row(
                rule.replace("_", "-"), label, criterion="fgp", select=rule,
                amount=amount, paper=paper, series=label,
            )
        )  # fmt: skip
    rows.append(
        Row(
            "magnitude_l1-peak30", "L1 magnitude, Peak 30 %", criterion="magnitude_l1",
            select="peak30", series="L1 magnitude, Peak 30 %", control=True,
        )
    )  # fmt: skip
    return tuple(rows)


_VGG = "VGG-16 on CIFAR-10"
STUDIES = (
    Study(
        "fgp",
        "1",
        "comparison of pruning methods",
        f"{_VGG} (and CIFAR-100), fine-tuned 10 epochs, test accuracy. The table's MACs fit "
        "neither reading of k (share of the score, share of the channels), so that rows are "
        "compared at the MACs that it states. It gives Slimming at 51.9 % of the MACs only, and "
        "5.4 M parameters as 12 % of 17.7 M.",
        _table_1,
        method="FGP",
        compare={"accuracy": ACCURACY},
        notes=(
            "Slimming is sparse training (ablate.dsd_lambda, dsd_epochs) and |tau| within each "
            "layer; it leaves channels on residual paths alone.",
        ),
    ),
    Study(
        "fgp",
        "3",
        "features, gradients or both",
        f"{_VGG}. The paper's feature-only and gradient-only rows are other methods (AOFP, "
        "GFBS) at other MACs; ours are FGP's own score without one factor. The text gives AOFP "
        "93.30 %, the table 93.08 %.",
        _table_3,
        method="FGP",
        compare={"accuracy": ACCURACY},
    ),
    Study(
        "fgp",
        "fig3a",
        "accuracy against k",
        f"{_VGG}; a picture without numbers. The text says that accuracy rises with k and "
        "levels off from 0.35 to 0.4.",
        _figure_3a,
        method="FGP",
        compare={"accuracy": ""},
        notes=("The controls keep the MACs that FGP keeps at the same k and seed.",),
        picture=Picture("macs", "multiply-adds kept (% of dense)", "k"),
    ),
    Study(
        "fgp",
        "fig3b",
        "accuracy lost against the number of classes",
        "VGG-16 on the classes of CIFAR-100, k = 0.4; accuracy lost against the unpruned model. "
        "The text gives four of the eight points.",
        _figure_3b,
        method="FGP",
        compare={"accuracy": ""},
        picture=Picture("point", "classes of the data", "classes", gap=True),
        notes=(
            "Every number of classes has a dense model of its own, trained on them alone; the "
            "control keeps the MACs that FGP keeps with it.",
        ),
    ),
    Study(
        "fgp",
        "fig4",
        "which channels are retained",
        f"{_VGG} and ResNet-50; a picture. The text gives 92.60 % for Peak k, and one number, "
        "85.17 %, for Peak 30 % and Rand 30 % together. The modes differ in width: Peak k keeps "
        "as many channels as hold k of the score, the others 30 %.",
        _figure_4,
        method="Peak k",
        compare={"accuracy": "VGG-16 top-1 (%)"},
        notes=("k is the last of ablate.k.",),
        picture=Picture("bars", "below each bar: multiply-adds kept (% of dense)", ""),
    ),
)
