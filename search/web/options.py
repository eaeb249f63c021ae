"""What a config may name, as JSON: a process of its own, because the registries import torch."""

from __future__ import annotations

import json


def main() -> None:
    """Prints it."""
    from ..tables import known_datasets, known_methods, known_models

    print(json.dumps({**known_models(), **known_datasets(), **known_methods()}))


if __name__ == "__main__":
    main()
