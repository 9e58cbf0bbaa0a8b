"""What a run needs by the compiler's account, here that of the CPU."""

import dataclasses
import types

import jax
import pytest

from jaxchunk.models.lora import LoRA
from jaxchunk.training import fits

TARGET = types.SimpleNamespace(
  device=jax.devices("cpu")[0],
  devices=jax.devices("cpu"),
  platform="cpu",
  memory=1000,
)


def size(cfg):
  """Parameters of the model of `make_config`, one key head, tied."""
  D, F, H, N = cfg.d_model, cfg.d_ff, cfg.head_dim, cfg.num_heads
  layer = 2 * D + 2 * D * N * H + 2 * D * H + 3 * D * F
  return cfg.vocab_size * D + cfg.num_layers * layer + D


def test_what_a_run_keeps(config):
  count = size(config.model)
  kept = fits.kept_bytes(config)
  # The state also counts updates, in five numbers.
  assert kept == {
    "parameters": 4 * count,
    "gradients": 4 * count,
    "optimizer": 8 * count + 4 * 5,
  }
  assert fits.optimizer_bytes(config) == (kept["optimizer"], 0)
  config.train.optimizer_memory = "host"
  device, host = fits.optimizer_bytes(config)
  # Norms stay.
  norms = 2 * 4 * 5 * config.model.d_model
  assert (device, host) == (norms + 20, 8 * count - norms)


def test_every_program_is_counted_with_all_that_lies_there(config):
  needs = list(fits.needs(config, TARGET, 200))
  assert [need.program for need in needs] == [
    "lane of 256 tokens",
    "lane of 128 tokens",
    "lane of 64 tokens",
    "evaluation of 256 tokens",
    "update",
  ]
  kept = fits.kept_bytes(config)
  for need in needs:
    all_kept = sum(kept.values())
    if need.program.startswith("evaluation"):
      all_kept -= kept["gradients"]
    # What only the program needs: more for a longer lane, little else.
    assert all_kept < need.device < all_kept + 2**22
    assert need.host == 0 and need.refused is None
  assert needs[0].device > needs[1].device > needs[2].device


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}], ids=str)
def test_what_a_device_of_many_keeps(config, sizes):
  """Moments once in all (ZeRO-1); with fsdp parameters and gradients too."""
  config.model = dataclasses.replace(config.model, vocab_size=264)
  one = fits.kept_bytes(config)
  for name, value in sizes.items():
    setattr(config.layout, name, value)
  kept = fits.kept_bytes(config)
  # Five counts are everywhere.
  assert kept["optimizer"] - 20 == (one["optimizer"] - 20) // 8
  norms = 4 * 5 * config.model.d_model
  whole = one["parameters"] - norms
  split = 8 if "fsdp" in sizes else 1
  assert kept["parameters"] == whole // split + norms
  update = fits.update_need(config, TARGET)
  # Beside parameters the update holds the sums and moments of its own part,
  # and while it runs the new parameters.
  own = kept["optimizer"] + one["gradients"] // 8
  assert own <= update.device - kept["parameters"] < own + 2 * one["parameters"]


def test_the_peak_is_at_most_the_sum_of_all_that_is_named(config):
  kept = fits.kept_bytes(config)
  for need in fits.needs(config, TARGET, 60):
    assert kept["parameters"] + kept["optimizer"] < need.peak <= need.device


def test_chunks_that_keep_their_inputs_alone_need_less(config):
  config.train.live_chunks = 4
  every, inputs = (
    fits.lane_need(
      dataclasses.replace(
        config, train=dataclasses.replace(config.train, keep=keep)
      ),
      TARGET,
      1024,
    ).device
    for keep in ("all", "inputs")
  )
  assert inputs < every


def test_sums_over_devices_are_counted(config):
  config.layout.data = 8
  names = [need.program for need in fits.needs(config, TARGET, 60)]
  assert names[-2:] == ["sums over devices", "update"]
  kept, need = fits.kept_bytes(config), fits.sums_need(config, TARGET)
  # Each device's own sums, and its part of those of all.
  least = kept["parameters"] + kept["optimizer"] + kept["gradients"] * 9 / 8
  assert least <= need.device < least + 3 * kept["gradients"]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_stages_are_counted_with_the_lanes_that_are_under_way(config, schedule):
  # As many key heads as heads: on one device layers would be outside.
  config.model = dataclasses.replace(
    config.model, num_layers=4, num_kv_heads=2, vocab_size=264
  )
  config.layout.stage, config.layout.data = 2, 4
  config.layout.schedule = schedule
  config.data.batch_tokens = 4 * 128
  needs = {need.program: need for need in fits.needs(config, TARGET, 100)}
  assert list(needs) == [
    "stages with lanes of 128 tokens",
    "stages with lanes of 64 tokens",
    "evaluation of 128 tokens",
    "sums over devices",
    "update",
  ]
  one = needs["stages with lanes of 128 tokens"].device
  kept = fits.kept_bytes(config)
  # A V takes layers in another order than they are kept in.
  copies = 2 if schedule == "zb_v" else 1
  assert one >= sum(kept.values()) + (copies - 1) * kept["parameters"]
  # With room for a second one, two long lanes are under way.
  config.data.batch_tokens *= 4
  two = fits.lane_need(config, TARGET, 128)
  assert two.device > one
  config.data.batch_tokens *= 4
  assert fits.lane_need(config, TARGET, 128) == two


def test_frozen_parameters_count_during_an_update(config):
  config.model = dataclasses.replace(config.model, lora=LoRA(rank=2))
  kept = fits.kept_bytes(config)
  assert kept["parameters"] - kept["gradients"] == 4 * size(config.model)
  need = fits.update_need(config, TARGET)
  assert need.device >= sum(kept.values())


def test_what_the_compiler_refuses_is_told_with_its_size():
  class Lowered:
    in_avals = (jax.ShapeDtypeStruct((3,), "float32"),)

    def compile(self):
      raise jax.errors.JaxRuntimeError(self.text)

  lowered = Lowered()
  lowered.text = "RESOURCE_EXHAUSTED: HLO temporaries (1.5G) exceeds\nmore"
  need = fits._need("x", lowered, 100, 7)
  assert need.device == 100 + 12 + 3 * 2**29 and need.host == 7
  # Named is all that the program takes, its arguments too.
  assert need.peak == 100 + 3 * 2**29
  assert need.refused == lowered.text.partition("\n")[0]
  lowered.text = "INTERNAL: something else"
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    fits._need("x", lowered, 0, 0)


def test_the_runtime_keeps_a_part():
  assert fits.limit(TARGET) == 970
