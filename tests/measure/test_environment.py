from __future__ import annotations

import json

from llmops.measure.environment import environment
from llmops.measure.options import MeasureOptions
from llmops.measure.sensors import probe


def test_plain_values_that_name_machine_versions_and_sensor():
    import torch

    sensor = probe(MeasureOptions(sensor="none"))
    found = environment("cpu", sensor)
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["ram_bytes"] > 1 << 28 and found["cores"] >= 1 and found["cpu"]
    assert (found["sensor"], found["sensor_provenance"]) == ("none", "null")
    assert found["gpu"] == [] and "transformers" in found["versions"]


def test_reasons_of_skipped_sensors_are_kept():
    found = environment("cpu", probe(MeasureOptions(sensor="nvml"), "cpu"))
    assert "nvml" in found["sensors_skipped"]
