"""A part of the zoo in the suite; `prune-search bench zoo` runs all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prunesearch.search.bench.zoo import CASES, Case, _run, _verdict, bench_zoo, zoo_markdown
from prunesearch.search.bench.zoo_case import run_case

# name, pixels, arguments, removable blocks, at least so many groups
SUBSET: list[tuple[str, int, dict[str, Any], int, int]] = [
    ("torchvision:shufflenet_v2_x0_5", 64, {}, 0, 16),
    ("torchvision:mobilenet_v3_small", 64, {}, 6, 20),
    ("torchvision:mnasnet0_5", 64, {}, 9, 20),
    ("torchvision:regnet_y_400mf", 64, {}, 12, 20),
    ("torchvision:squeezenet1_1", 64, {}, 0, 20),
    ("torchvision:lraspp_mobilenet_v3_large", 64, {}, 9, 20),
    ("torchvision:swin_t", 64, {}, 8, 12),
    ("timm:convnextv2_atto", 64, {}, 8, 4),
    ("timm:ghostnet_100", 64, {}, 0, 5),
    ("timm:vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8}, 11, 12),
    ("torchvision:ssdlite320_mobilenet_v3_large", 320, {}, 0, 10),
]


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "blocks", "groups"), SUBSET, ids=[s[0] for s in SUBSET]
)
def test_pruned_replayed_reloaded(
    name: str, size: int, kwargs: dict[str, Any], blocks: int, groups: int
) -> None:
    row = run_case(name, size, kwargs)
    assert _verdict(row) == ""
    assert row["blocks"] >= blocks and row["groups"] >= groups, row
    assert row["macs_pruned"] < row["macs"]


def test_cases_are_many_and_their_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_a_crash_is_a_row() -> None:
    row = _run(Case("resnet200", 32), 120, 8)
    assert "must be a known name" in row["reason"]
    assert _run(Case("resnet20", 32), 0.01, 8)["reason"] == "took more than 0.01 s"


def test_the_table_is_made_in_portions(tmp_path: Path) -> None:
    out, said = tmp_path / "zoo", []
    with pytest.raises(ValueError, match="--models.*Did you mean `resnet20`"):
        bench_zoo(out, said.append, models=["resnet21"])
    bench_zoo(out, said.append, models=["resnet20"])
    result = bench_zoo(out, said.append, models=["vgg16_cifar"])
    assert said == ["resnet20: pass", "vgg16_cifar: pass"]
    assert list(pd.read_parquet(f"{out}.parquet").model) == ["resnet20", "vgg16_cifar"]
    text = Path(f"{out}.md").read_text()
    assert text == zoo_markdown(result)
    assert "2 of 2 architectures pass" in text and "| resnet20 | 32 | 1 of 6 |" in text
