"""Device memory of an update whose optimizer state is in host memory."""

import pytest

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.data.config import DataConfig
from jaxchunk.training import fits
from jaxchunk.training.config import Config, TrainConfig


def config_of(layers):
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
  train = TrainConfig(num_steps=10, optimizer_memory="host")
  return Config(model=cfg, data=DataConfig(), train=train)


@pytest.mark.parametrize("name", ["v5p", "h200"])
def test_device_memory_does_not_grow_with_the_layers(name):
  def beside(layers):
    """Bytes beside parameters and gradients, and those on the host."""
    config = config_of(layers)
    kept = fits.kept_bytes(config)
    need = fits.update_need(config, targets.target(name))
    return need.device - kept["parameters"] - kept["gradients"], need.host

  (few, _), (many, host) = beside(4), beside(24)
  assert many <= 1.05 * few
  # Two moments of everything but norms.
  size = 2 * fits.kept_bytes(config_of(24))["parameters"]
  assert 0.995 * size <= host <= 1.005 * size
