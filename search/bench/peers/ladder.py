"""Points of a range in an order that spans it early and gets finer for ever."""

from __future__ import annotations

from collections.abc import Iterator


def ladder(low: float, high: float, *, start: int = 0, step: int = 1) -> Iterator[float]:
    """The van der Corput sequence in base 2, scaled: the middle, the quarters, the eighths ...

    Args:
        low: Lower end of the range.
        high: Upper end.
        start: The first point to take, from 0.
        step: Every how many points one is taken: `step` workers share the sequence.
    """
    number = start
    while True:
        yield low + (high - low) * radical_inverse(number + 1)
        number += step


def radical_inverse(number: int) -> float:
    """The bits of `number` mirrored at the binary point: 1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8 ..."""
    value, unit = 0.0, 0.5
    while number:
        value += unit * (number & 1)
        number >>= 1
        unit /= 2
    return value
