"""Points of a range in an order that spans it early and gets finer for ever."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


def ladder(low: float, high: float) -> Iterator[float]:
    """The van der Corput sequence in base 2, scaled: the middle, the quarters, the eighths ...

    Args:
        low: Lower end of the range.
        high: Upper end.
    """
    for number in itertools.count(1):
        yield low + (high - low) * radical_inverse(number)


def radical_inverse(number: int) -> float:
    """The bits of `number` mirrored at the binary point: 1/2, 1/4, 3/4, 1/8, 5/8, 3/8, 7/8 ..."""
    value, unit = 0.0, 0.5
    while number:
        value += unit * (number & 1)
        number >>= 1
        unit /= 2
    return value
