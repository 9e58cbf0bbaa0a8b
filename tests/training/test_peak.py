import types

import jax
import pytest

from jaxchunk.training.peak import peak_of

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
  ("kind", "flops"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
  ],
)
def test_known_devices_have_their_data_sheets_figure(kind, flops):
  peak = peak_of(types.SimpleNamespace(device_kind=kind), "bfloat16")
  assert peak.flops == flops
  assert kind in peak.source
  assert "data sheet" in peak.source


def test_other_devices_are_measured():
  peak = peak_of(jax.devices("cpu")[0], "float32")
  assert 1e8 < peak.flops < 1e14
  assert "measured" in peak.source
