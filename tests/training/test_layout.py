"""Runs over the devices of a layout: the losses of one, and changed layouts."""

import dataclasses

import numpy as np
import pytest

from jaxchunk.training import checkpoint, loop, metrics, report
from jaxchunk.training.config import ConfigError, validate


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
  monkeypatch.setattr(report, "draw", lambda workdir: None)


def losses(workdir):
  return [line["loss"] for line in metrics.read(workdir)]


def with_layout(config, data, context, fsdp=1, tensor=1):
  config.layout.data, config.layout.context = data, context
  config.layout.fsdp, config.layout.tensor = fsdp, tensor
  config.model = dataclasses.replace(
    config.model, num_kv_heads=2, vocab_size=260
  )
  config.train.num_steps, config.train.eval_every = 6, 3
  config.checkpoint.save_every = 2
  return config


def test_a_run_goes_on_under_another_layout(make_config, tmp_path, monkeypatch):
  loop.train(with_layout(make_config(), 1, 1), tmp_path / "one")
  launch = loop.launch
  # From parameters in parts to two groups of four, and to one device.
  for layout, stop in (((1, 2, 2, 2), 2), ((2, 4), 4), ((1, 1), None)):

    def killed(run, batch, stop=stop):
      if run.step == stop:
        raise KeyboardInterrupt
      return launch(run, batch)

    monkeypatch.setattr(loop, "launch", killed)
    config = with_layout(make_config(), *layout)
    if stop is None:
      loop.train(config, tmp_path / "many")
      continue
    with pytest.raises(KeyboardInterrupt):
      loop.train(config, tmp_path / "many")
  one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
  assert len(many) == 6
  np.testing.assert_allclose(many, one, rtol=1e-5)
  assert checkpoint.load_for_inference(tmp_path / "many")[2] == 6


def test_layouts_that_cannot_be_are_named(make_config, tmp_path):
  config = with_layout(make_config(), 3, 1)
  with pytest.raises(ConfigError, match=r"takes 3 .* there are 8; .*nearest"):
    loop.train(config, tmp_path / "run")
  config = with_layout(make_config(), 1, 3)
  with pytest.raises(ConfigError, match=r"chunk_size=64 .*context=3 .* 66"):
    validate(config)
  config = with_layout(make_config(), 0, 1)
  with pytest.raises(ConfigError, match=r"layout.data=0 must be at least 1"):
    validate(config)
  config = with_layout(make_config(), 8, 1)
  config.train.kv_memory = "host"
  with pytest.raises(ConfigError, match="kv_memory='host' runs on one device"):
    validate(config)
