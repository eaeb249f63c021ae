"""The model card beside an export: what was removed, how good and fast it is, how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

CARD = "README.md"
Z = 1.959964  # of a normal distribution's 95 %
MAX_GROUPS = 60  # rows of the table of channels

Facts = Mapping[str, Any]


def model_card(recipe: Facts, export: Facts) -> str:
    """The card of an export, in Markdown.

    Args:
        recipe: What `recipe.json` holds, the tests included.
        export: What `export.json` holds.
    """
    name = _text(recipe["model"]["name"])
    parts = (
        _section("", [
            f"# {name}, pruned", "",
            f"Trial {recipe['trial']['trial_id']} of the search `{_text(recipe['search'])}`: the "
            f"dense {name} with blocks and channels cut out.", "",
            *_figures(recipe),
        ]),
        _section("What was removed", _removed(recipe)),
        _section("Data", _data(recipe)),
        _section("Files", _files(export)),
        _section("Use", _use(recipe, export)),
        _section("Licence", [_licence(recipe)]),
        _section("Made with", _versions(recipe, export)),
    )  # fmt: skip
    return "\n".join(parts)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` images: the score interval of Wilson 1927.

    doi:10.1080/01621459.1927.10502953. It stays in 0..1, also for shares near the ends.
    """
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2) / (1 + Z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def _section(title: str, lines: list[str]) -> str:
    head = [f"## {title}", ""] if title else []
    return "\n".join([*head, *lines, ""])


def _figures(recipe: Facts) -> Iterator[str]:
    trial, dense = recipe["trial"], recipe["baseline"]
    yield "| | pruned | dense |"
    yield "|---|---|---|"
    count = recipe["test"]["num_images"]
    yield (
        f"| {_metric(recipe)}, test split ({count:,} images) | {_tested(recipe['test'])} | "
        f"{_tested(recipe.get('dense_test'))} |"
    )
    yield (
        f"| {_metric(recipe)}, validation split | {trial['accuracy']:.4f} | "
        f"{dense['accuracy']:.4f} |"
    )
    if trial["latency_ms"] is not None:
        yield (
            f"| latency, ms | {trial['latency_ms']:.3f} (p10 {_known(trial, 'latency_ms_p10')}, "
            f"p90 {_known(trial, 'latency_ms_p90')}), {trial['speedup']:.2f} times as fast | "
            f"{dense['latency_ms']:.3f} |"
        )
    for name, found in dense.get("latency_by_probe", {}).items():
        pruned_ms, dense_ms = (
            _known(trial["latency_ms_by_probe"], name),
            _known(found, "latency_ms"),
        )
        yield f"| latency on {name}, ms | {pruned_ms} | {dense_ms} |"
    for name, value in trial.get("metrics", {}).items():
        beside = _known(dense.get("metrics", {}), name, 4)
        yield f"| {_text(name)}, validation split | {value:.4f} | {beside} |"
    for label, key, form in (
        ("multiply-adds of one image", "macs", ","),
        ("parameters", "num_params", ","),
        ("peak memory, MiB", "peak_memory_mib", ".2f"),
    ):
        if trial.get(key) is not None and dense.get(key) is not None:
            yield f"| {label} | {trial[key]:{form}} | {dense[key]:{form}} |"
    if trial["latency_ms"] is not None:
        yield ""
        yield f"Latency: {_settings(dense.get('probe', {}))}; pruned and dense ran in turns."
    for name, found in dense.get("latency_by_probe", {}).items():
        yield f"On {name}: {_settings(found.get('probe', {}))}."


def _metric(recipe: Facts) -> str:
    metric = str(recipe["metric"])
    return "accuracy (top-1)" if metric == "top-1" else metric


def _tested(figures: Facts | None) -> str:
    if figures is None:
        return "not evaluated"
    text = f"{figures['accuracy']:.4f}"
    if "interval_95" in figures:
        low, high = figures["interval_95"]
        text += f" (95 % interval {low:.4f} to {high:.4f}, Wilson)"
    return text


def _known(figures: Facts, name: str, digits: int = 3) -> str:
    value = figures.get(name)
    return "not measured" if value is None else f"{value:.{digits}f}"


def _settings(probe: Facts) -> str:
    device = _text(probe.get("gpu") or probe.get("cpu") or "unknown hardware")
    return (
        f"eager torch {probe.get('torch', '?')} on {device}, batch size "
        f"{probe.get('batch_size', '?')}, {probe.get('threads', '?')} thread(s), "
        f"{probe.get('runs', '?')} runs"
    )


def _removed(recipe: Facts) -> list[str]:
    trial, recover, channels = recipe["trial"], recipe["recover"], recipe["channels"]
    changed = {name: w for name, w in channels.items() if w["kept"] < w["dense"]}
    blocks = recipe["dropped_blocks"]
    lines = [
        f"- Blocks: {len(blocks)} ({', '.join(map(_text, blocks))})." if blocks
        else "- Blocks: none.",
        f"- Channels: {_count(channels)}; {_criterion(trial['candidate'])}.",
        f"- Afterwards: {_recovery(trial, recover)}.",
    ]  # fmt: skip
    if changed:
        lines += ["", "| channels of | dense | kept |", "|---|---|---|"]
        lines += [
            f"| {_text(name)} | {w['dense']} | {w['kept']} |"
            for name, w in list(changed.items())[:MAX_GROUPS]
        ]
    if len(changed) > MAX_GROUPS:
        lines += ["", f"{len(changed) - MAX_GROUPS} further groups: `channels` in recipe.json."]
    return lines


def _count(channels: Mapping[str, Mapping[str, int]]) -> str:
    dense, kept = (sum(w[key] for w in channels.values()) for key in ("dense", "kept"))
    if dense == kept:
        return "none"
    return f"{dense - kept:,} of {dense:,} in {len(channels)} groups of coupled layers"


def _criterion(candidate: Facts) -> str:
    if candidate.get("criterion") is None:
        return "no criterion was needed"
    criterion, rule = _text(candidate["criterion"]), _text(candidate["select"])
    text = f"scored by `{criterion}`, chosen by the rule `{rule}`"
    if candidate.get("k") is not None:
        text += f" with k = {candidate['k']:.3g}"
    if candidate.get("dsd_lambda") is not None:
        text += f" after sparse training with lambda = {candidate['dsd_lambda']:.2g}"
    return text


def _recovery(trial: Facts, recover: Facts) -> str:
    steps = []
    if recover.get("recalibrate_bn"):
        steps.append("batch norms were re-estimated on training images")
    if trial["epochs"] > 0:
        steps.append(f"fine-tuned for {trial['epochs']:g} epochs, learning rate {recover['lr']:g}")
        if recover.get("distill"):
            steps.append(f"distilled from the dense model with weight {recover['distill']:g}")
    return "; ".join(steps) or "nothing"


def _data(recipe: Facts) -> list[str]:
    data = recipe["data"]
    shape = " x ".join(map(str, recipe["input"]["shape"]))
    origin = "the data set's own" if data["official_test"] else "drawn from the data set"
    return [
        f"{_text(data['name'])}, images of {shape}: {data['train']:,} to train, "
        f"{data['val']:,} to validate, {data['test']:,} to test ({origin}). The trial was chosen "
        "by its figures on the validation split, which are optimistic for that reason. Only "
        "exports read the test split.",
    ]


def _files(export: Facts) -> list[str]:
    settings = export["settings"]
    lines = [
        "| file | KiB | loaded by | largest difference | latency, ms | eager beside it, ms |",
        "|---|---|---|---|---|---|",
    ]
    for form in export["forms"].values():
        opset = f", opset {form['opset']}" if form["opset"] else ""
        lines.append(
            f"| {form['file']} | {form['num_bytes'] / 1024:,.0f} | {form['runtime']}{opset} | "
            f"{form['difference']:.1e} of {form['largest_output']:.2g} | "
            f"{_beside(form['latency_ms'])} | {_beside(form['eager_ms'])} |"
        )
    cpu = _text(export["environment"].get("cpu") or "unknown hardware")
    return [
        *lines,
        "",
        f"Each file was loaded in a fresh process and compared with the trial's model on "
        f"{settings['images_compared']} real images, one alone and the others together; the "
        "difference stands beside the largest output. Latency there: "
        f"{cpu}, batch size {settings['batch_size']}, {settings['threads']} thread(s), "
        f"{settings['runs']} runs of each in turns. Every form takes any batch size.",
    ]


def _beside(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _use(recipe: Facts, export: Facts) -> list[str]:
    given = recipe["input"]
    own = ":" in recipe["model"]["name"] and not recipe["model"]["name"].startswith(
        ("torchvision:", "timm:")
    )
    argument = "run_code=True" if own and export["asked"][0] == "safetensors" else ""
    return [
        "```python", "from load import load", "", f"model = load({argument})",
        "outputs = model(images)", "```", "",
        f"Images are float32, [batch, {', '.join(map(str, given['shape']))}], in 0..1 and "
        f"normalised: minus {_numbers(given['mean'])}, divided by {_numbers(given['std'])} "
        "(mean and standard deviation of the channels). "
        f"{recipe['model']['num_classes']} classes, in the order of `classes` in recipe.json.",
    ]  # fmt: skip


def _numbers(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"


def _licence(recipe: Facts) -> str:
    if recipe["licence"]:
        return f"Of the dense model's weights: {_text(recipe['licence'])}."
    return (
        "Unknown: that of the dense model's weights and of the data holds. Say it with "
        "`model.licence` in the search's config, or here, before you pass this on."
    )


def _versions(recipe: Facts, export: Facts) -> list[str]:
    libraries = export["environment"]["libraries"]
    known = ", ".join(f"{name} {version}" for name, version in libraries.items() if version)
    return [f"{known}; Python {export['environment']['python']}."]


def _text(value: object) -> str:
    """A name of the user's as plain text of one line, with nothing that Markdown or HTML obeys."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", line)
