"""An ablation as Markdown: the paper's figures beside ours, and what they say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from ..config import SearchConfig
from ..records import TrialResult
from .cells import METRICS, Cell, Entry, cells, entries, is_matrix, series_of
from .study import Row, Study


def markdown(
    study: Study,
    config: SearchConfig,
    rows: Sequence[Row],
    results: Sequence[TrialResult],
    *,
    environment: Mapping[str, Any],
    command: str,
    seeds: int,
) -> str:
    """The whole report.

    Args:
        study: What was re-run.
        config: With what.
        rows: Its rows.
        results: The ledger.
        environment: `environment.json` of the folder.
        command: What re-runs it.
        seeds: How many there are to be.
    """
    found = cells(rows, results, seeds)
    lines = [
        f"# {study.name}: {study.title}, {config.model.name} on {config.data.name}",
        "",
        *_terms(study, config, rows, environment, command, seeds),
        "",
        *(_matrices(study, found) if is_matrix(found) else _tables(found)),
        "## What it says",
        "",
        *(f"- {sentence}" for sentence in _sentences(study, found, results)),
        "",
    ]
    return "\n".join(lines)


# --- terms -----------------------------------------------------------------------------------


def _terms(
    study: Study,
    config: SearchConfig,
    rows: Sequence[Row],
    environment: Mapping[str, Any],
    command: str,
    seeds: int,
) -> list[str]:
    data, recover = config.data, config.recover
    pixels = f" at {data.image_size} px" if data.image_size else ""
    limit = f", {data.limit} training and validation images" if data.limit else ""
    source = (
        f"checkpoint {config.model.checkpoint}"
        if config.model.checkpoint
        else f"trained {config.baseline.epochs} epochs, each seed anew"
    )
    sparse = (
        f" Sparse training: {config.ablate.dsd_epochs:g} epochs, lambda "
        f"{config.ablate.dsd_lambda:g}, lr {config.sparse_training.lr:g}, q "
        f"{config.ablate.dsd_q:g}."
        if any(row.criterion == "dsd" for row in rows)
        else ""
    )
    tool = environment.get("gpu") or environment["cpu"]
    return [
        f"**Ours**: {config.model.name} on {data.name}{pixels}{limit}; dense model {source}; "
        f"fine-tuned {recover.epochs:g} epochs at lr {recover.lr:g}; batch {data.batch_size}; "
        f"{seeds} {'seeds' if seeds > 1 else 'seed'}. Accuracies are on the validation split, "
        f"in per cent: the mean over the seeds (least to most).{sparse}",
        "",
        f"**Paper**: {study.setting}",
        "",
        f"Hardware: {tool}, {environment['cores']} cores; python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
        + ".",
        "",
        f"Re-run it: `{command}`",
        *(line for note in study.notes for line in ("", note)),
    ]


# --- tables ----------------------------------------------------------------------------------


def _tables(found: Sequence[Cell]) -> list[str]:
    """One table a group; the paper's columns first."""
    printed_most = sorted(found, key=lambda cell: -len(cell.row.paper))
    columns = list(dict.fromkeys(name for cell in printed_most for name in cell.row.paper))
    ours = [name for name in METRICS if name != "gap"]
    head = ["", *(f"paper: {name}" for name in columns), *(METRICS[m] for m in ours), "seeds"]
    lines = []
    for group in dict.fromkeys(cell.row.group for cell in found):
        members = [cell for cell in found if cell.row.group == group]
        lines += [f"## {group[0].upper()}{group[1:]}", ""] if group else []
        lines += [_row(head), _row(["---"] * len(head))]
        for cell in members:
            printed = [_printed(cell.row.paper.get(name)) for name in columns]
            values = [_range(cell.values(m).values()) for m in ours]
            if cell.row.work == "dense":
                values[0] = ""  # nothing was pruned
            lines.append(_row([_name(cell), *printed, *values, _seeds(cell)]))
        lines.append("")
    return lines


def _matrices(study: Study, found: Sequence[Cell]) -> list[str]:
    """One table a metric: curves down, positions across."""
    assert study.picture is not None
    positions = sorted({cell.position for cell in found if cell.position is not None})
    curves = list(dict.fromkeys(series_of(c) for c in found if c.position is not None))
    metrics = [m for m in METRICS if m != "num_params" and (m != "gap" or study.picture.gap)]
    lines: list[str] = []
    for metric in metrics:
        head = [study.picture.position, *(f"{position:g}" for position in positions)]
        lines += [f"## {METRICS[metric][0].upper()}{METRICS[metric][1:]}", "", _row(head)]
        lines.append(_row(["---"] * len(head)))
        if metric == "gap":
            lines.append(_row(["paper", *(_gap(found, position) for position in positions)]))
        for curve in curves:
            at = {c.position: c for c in found if series_of(c) == curve}
            here = [at.get(position) for position in positions]
            texts = [_range(c.values(metric).values()) if c else "" for c in here]
            first = next(c for c in here if c is not None)
            lines.append(_row([_name(first, curve), *texts]))
        lines.append("")
        alone = [c for c in found if c.position is None and metric.startswith("accuracy")]
        if alone:
            values = (f"{_name(c)} {_range(c.values(metric).values())}" for c in alone)
            lines += [f"Beside it: {'; '.join(values)}.", ""]
    missing = sum(cell.num_failed for cell in found)
    return [*lines, *([f"{missing} trials failed and are left out.", ""] if missing else [])]


def _gap(found: Sequence[Cell], position: float) -> str:
    printed = [v for c in found if c.position == position for v in c.row.paper.values()]
    return _printed(printed[0] if printed else None)


def _name(cell: Cell, label: str | None = None) -> str:
    return (label or cell.row.label).replace("|", "\\|") + (" (ours)" * cell.row.control)


def _seeds(cell: Cell) -> str:
    failed = f", {cell.num_failed} failed" if cell.num_failed else ""
    return f"{len(cell.results)}{failed}"


def _printed(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _range(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "none"
    mean = f"{sum(found) / len(found):.2f}"
    least, most = f"{min(found):.2f}", f"{max(found):.2f}"
    return mean if least == most else f"{mean} ({least} to {most})"


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"


# --- what it says ----------------------------------------------------------------------------


def _sentences(study: Study, found: Sequence[Cell], results: Sequence[TrialResult]) -> list[str]:
    groups = [""] if is_matrix(found) else list(dict.fromkeys(cell.row.group for cell in found))
    said = []
    for group in groups:
        members = found if is_matrix(found) else [c for c in found if c.row.group == group]
        for metric, column in study.compare.items():
            ranked = sorted(entries(members, metric), key=lambda entry: -entry.mean)
            if len(ranked) > 1:
                head = ", ".join(filter(None, [group, METRICS[metric].removesuffix(" (%)")]))
                said.append(f"**{head[0].upper()}{head[1:]}**: {_verdict(study, ranked, column)}")
    failed = sum(cell.num_failed for cell in found)
    return said + study.remarks(results) + ([f"{failed} trials failed."] if failed else [])


def _verdict(study: Study, ranked: Sequence[Entry], column: str) -> str:
    """Our order, the paper's, how far they agree, and what the seeds can tell apart."""
    parts = ["our order is " + " > ".join(f"{e.label} {e.mean:.2f}" for e in ranked)]
    parts.append(_against_paper(study, ranked, column))
    clear = sum(a.clearly_above(b) for a, b in combinations(ranked, 2))
    total = len(ranked) * (len(ranked) - 1) // 2
    if min(len(entry.values) for entry in ranked) < 2:
        parts.append("with one seed there is no range to tell rows apart by")
    else:
        parts.append(f"{clear} of {total} pairs differ by more than the seeds' range")
        parts += _method(study, ranked)
    parts += _chance(ranked)
    return "; ".join(part for part in parts if part).replace("|", "\\|") + "."


def _against_paper(study: Study, ranked: Sequence[Entry], column: str) -> str:
    figures = {e.label: e.row.paper[column] for e in ranked if column in e.row.paper}
    if len(figures) < 2:
        known = {entry.label for entry in ranked}
        tiers = enumerate(study.ranking)
        figures = {label: float(-t) for t, tier in tiers for label in tier if label in known}
    if len(figures) < 2:
        return "the paper prints no figures to rank by"
    order = sorted(figures, key=lambda label: -figures[label])
    means = {entry.label: entry.mean for entry in ranked}
    signs = [
        (figures[a] - figures[b]) * (means[a] - means[b])
        for a, b in combinations(order, 2)
        if figures[a] != figures[b]
    ]
    same, other = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    tau = (same - other) / len(signs) if signs else 0.0
    return (
        f"the paper's is {_chain(order, figures)}; {same} of {len(signs)} pairs are in the same "
        f"order (Kendall's tau {tau:+.2f})"
    )


def _chain(order: Sequence[str], figures: Mapping[str, float]) -> str:
    text = order[0]
    for a, b in zip(order, order[1:], strict=False):
        text += f" {'>' if figures[a] > figures[b] else 'and'} {b}"
    return text


def _method(study: Study, ranked: Sequence[Entry]) -> list[str]:
    own = next((entry for entry in ranked if entry.label == study.method), None)
    if own is None:
        return []
    others = [entry for entry in ranked if entry is not own]
    better = [e.label for e in others if own.clearly_above(e)]
    worse = [e.label for e in others if e.clearly_above(own)]
    rest = [e.label for e in others if e.label not in (*better, *worse)]
    words = [f"{own.label} is number {ranked.index(own) + 1} of {len(ranked)}"]
    for verb, labels in (("clearly above", better), ("clearly below", worse)):
        words += [f"{verb} {', '.join(labels)}"] if labels else []
    words += [f"not told apart from {', '.join(rest)}"] if rest else []
    return [", ".join(words)]


def _chance(ranked: Sequence[Entry]) -> list[str]:
    """What random rows beat; they must not win unnoticed."""
    for place, entry in enumerate(ranked):
        if _is_random(entry.row):
            if place == 0:
                return [f"the random control wins ({entry.label})"]
            below = [e.label for e in ranked[place + 1 :] if not _is_random(e.row)]
            return [f"random is better than {', '.join(below)}"] if below else []
    return []


def _is_random(row: Row) -> bool:
    drawn = (row.criterion, row.options.get("order"), row.options.get("score"))
    return "random" in drawn or row.select == "rand30"
