"""How one member of a front is asked for: by a metric, at the knee, or in plain words.

The words are `BEST [BOUND [and BOUND]...]`: fastest within 1 %, most accurate under 3 ms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .yaml_source import ConfigError, show


@dataclass(frozen=True)
class Wish:
    """Which member is wanted: exactly one of the first three, among those within the bounds.

    Attributes:
        minimize: Metric of which less is wanted.
        maximize: Metric of which more is wanted.
        knee: Whether the best compromise between the objectives is wanted.
        where: Bounds such as `accuracy_drop <= 0.01`.
    """

    minimize: str | None = None
    maximize: str | None = None
    knee: bool = False
    where: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        minimize: str | None = None,
        maximize: str | None = None,
        knee: bool = False,
        phrase: str | None = None,
        where: Sequence[str] = (),
    ) -> Wish | None:
        """The wish in one of the four ways it can be given; None if it is given in none.

        Raises:
            ConfigError: If it is given in several, there are bounds without one, or the phrase
                is not understood.
        """
        ways = (minimize is not None) + (maximize is not None) + knee + (phrase is not None)
        if ways > 1:
            raise ConfigError(
                "`--min`, `--max`, `--knee` and `--choose` must not be combined: each names one "
                "member. Choose one."
            )
        if ways == 0 and where:
            raise ConfigError(
                f"`--where` (={', '.join(where)}) must stand beside `--min`, `--max`, `--knee` or "
                "`--choose`: it bounds what they choose from. Add one, for example "
                "--min latency_ms."
            )
        if phrase is not None:
            meant = parse_phrase(phrase)
            return cls(meant.minimize, meant.maximize, meant.knee, (*meant.where, *where))
        return cls(minimize, maximize, knee, tuple(where)) if ways else None


def parse_phrase(text: str) -> Wish:
    """What a phrase such as `fastest within 1 % and under 2 M parameters` means.

    `within N %` is N percentage points below the dense model's accuracy. A named probe follows
    with `on`: `fastest on edge`, `under 3 ms on edge`.

    Raises:
        ConfigError: If it is not of the form `BEST [BOUND [and BOUND]...]`.
    """
    words = "|".join(_BEST).replace(" ", r"\s+")
    best = re.match(rf"\s*({words})(?:\s+on\s+(\w+))?(?=\s|$)", text, re.IGNORECASE)
    if best is None:
        raise _not_understood(text, text.strip() or "nothing")
    option, metric = _BEST[" ".join(best[1].lower().split())]
    if best[2] is not None:
        if metric != "latency_ms":
            raise _not_understood(text, best[0].strip())
        metric = f"{metric}@{best[2]}"
    rest = text[best.end() :].strip()
    where = tuple(_bound(part, text) for part in re.split(r"\s+and\s+", rest)) if rest else ()
    return Wish(
        minimize=metric if option == "min" else None,
        maximize=metric if option == "max" else None,
        knee=option == "knee",
        where=where,
    )


def _bound(part: str, text: str) -> str:
    for pattern, make in _BOUNDS:
        found = re.fullmatch(pattern, part.strip(), re.IGNORECASE)
        if found is not None:
            return make(found)
    raise _not_understood(text, part.strip() or "nothing")


def _not_understood(text: str, part: str) -> ConfigError:
    return ConfigError(
        f"`--choose` (={show(text)}) must be `BEST [BOUND [and BOUND]...]`: {show(part)!r} is not "
        f"understood. BEST is {', '.join(_BEST)}; BOUND is within N %, under N ms, under N MiB, "
        "under N MACs, under N parameters (N with k, M or G before the last two), at least N %, "
        "at least N x. Write for example 'fastest within 1 %' or 'most accurate under 3 ms'."
    )


def _at(found: re.Match[str]) -> str:
    """The probe of a bound: `@edge`, or nothing."""
    return f"@{found['probe']}" if found["probe"] else ""


def _share(found: re.Match[str]) -> str:
    return f"{float(found['n']) / 100:.12g}"


def _scaled(found: re.Match[str]) -> str:
    return f"{float(found['n']) * _SCALES[(found['scale'] or '').lower()]:.12g}"


_BEST = {
    "fastest": ("min", "latency_ms"),
    "most accurate": ("max", "accuracy"),
    "smallest": ("min", "num_params"),
    "fewest macs": ("min", "macs"),
    "least memory": ("min", "peak_memory_mib"),
    "knee": ("knee", ""),
}
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_N = r"(?P<n>\d+(?:\.\d+)?)\s*"
_ON = r"(?:\s+on\s+(?P<probe>\w+))?"
_COUNT = r"(?P<scale>[kMG])?\s*"
_BOUNDS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (rf"within\s+{_N}%", lambda m: f"accuracy_drop <= {_share(m)}"),
    (rf"at\s+least\s+{_N}%", lambda m: f"accuracy >= {_share(m)}"),
    (rf"under\s+{_N}ms{_ON}", lambda m: f"latency_ms{_at(m)} < {m['n']}"),
    (rf"at\s+least\s+{_N}x{_ON}", lambda m: f"speedup{_at(m)} >= {m['n']}"),
    (rf"under\s+{_N}MiB", lambda m: f"peak_memory_mib < {m['n']}"),
    (rf"under\s+{_N}{_COUNT}MACs", lambda m: f"macs < {_scaled(m)}"),
    (rf"under\s+{_N}{_COUNT}parameters", lambda m: f"num_params < {_scaled(m)}"),
)
