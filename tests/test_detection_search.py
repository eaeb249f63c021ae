"""Detection in the search: what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_coco import write as write_coco_files

from prunesearch.search.config import ConfigError, parse_config
from prunesearch.search.setup import pose

CONFIG = """\
name: scenes
model: {name: yolov5n}
task: {detection: {accuracy: map50}}
data: {name: coco, root: ROOT, image_size: 64, batch_size: 16, calibration_size: 16}
baseline: {epochs: 2, lr: 0.02}
space:
  criteria: [magnitude_l1, taylor]
  blocks: {mode: mask, order: oneshot, score: loss, max_drop: 0.5}
  keep: {per: model, low: 0.4, high: 1.0}
recover: {recalibrate_bn: true, recalibration_images: 32, epochs: 0.5, lr: 0.01}
objectives: {accuracy: maximize, macs: minimize}
search: {trials: 2, seed: 0, early_stop: false}
resources: {max_concurrent: 1}
latency: {runs: 10}
"""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"space": {"criteria": ["fgp"]}}, "space.criteria"),
        ({"recover": {"distill": 0.5}}, "recover.distill"),
        ({"model": {"name": "resnet20"}}, "boxes"),
        ({"task": {"detection": {"accuracy": "map75"}}}, "accuracy"),
        ({"data": {"image_size": 72}}, "data.image_size"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, change, named):
    root = write_coco_files(write_coco_files(tmp_path), "val")
    content = YAML(typ="safe").load(CONFIG)
    content["data"] |= {"root": str(root), "batch_size": 2}
    for section, values in change.items():
        content[section] = {**content[section], **values}
    with pytest.raises(ConfigError, match=named):
        pose(parse_config(content))
