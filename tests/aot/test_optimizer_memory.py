"""Device memory of updates that go by layer."""

import pytest

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.data.config import DataConfig
from jaxchunk.training import fits
from jaxchunk.training.config import Config, TrainConfig


def config_of(layers, **options):
  cfg = jc.ModelConfig(
    vocab_size=4096,
    d_model=512,
    num_layers=layers,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    d_ff=1024,
    dtype="bfloat16",
  )
  train = TrainConfig(num_steps=10, **options)
  return Config(model=cfg, data=DataConfig(), train=train)


def beside(config, target):
  """Bytes beside all that a run keeps on the device, and those on the host."""
  kept = fits.kept_bytes(config)
  need = fits.update_need(config, targets.target(target))
  own, _ = fits.optimizer_bytes(config)
  return need.device - kept["parameters"] - kept["gradients"] - own, need.host


@pytest.mark.parametrize(
  ("target", "options"),
  [
    ("v5p", {"optimizer_memory": "host"}),
    ("h200", {"optimizer_memory": "host"}),
    # On an H200 the codes of one stack after the other are copied.
    ("v5p", {"optimizer": "adamw8bit"}),
  ],
  ids=str,
)
def test_device_memory_does_not_grow_with_the_layers(target, options):
  (few, _), (many, host) = (
    beside(config_of(layers, **options), target) for layers in (4, 24)
  )
  assert many <= 1.05 * few
  _, moments = fits.optimizer_bytes(config_of(24, **options))
  assert 0.995 * moments <= host <= 1.005 * moments
