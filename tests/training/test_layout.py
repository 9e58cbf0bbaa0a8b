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


def test_a_run_goes_on_over_stages_and_back(
  make_config, tmp_path, monkeypatch, capsys
):
  """Trains, evaluates, saves and resumes with the losses of one device."""

  def config(stage, data):
    made = with_layout(make_config(), data, 1, tensor=8 // (stage * data))
    made.layout.stage, made.layout.vocab_over_stages = stage, stage > 1
    # As many key heads as heads: on one device layers would be outside.
    made.model = dataclasses.replace(made.model, num_heads=2, vocab_size=264)
    made.train.num_steps = 5
    return made

  def one_device():
    made = config(1, 8)
    made.layout.data = 1
    return made

  loop.train(one_device(), tmp_path / "one")
  launch = loop.launch
  for layout, stop in (((1, 8), 2), ((2, 4), 4), ((1, 8), None)):

    def killed(run, batch, stop=stop):
      if run.step == stop:
        raise KeyboardInterrupt
      return launch(run, batch)

    monkeypatch.setattr(loop, "launch", killed)
    if stop is None:
      loop.train(config(*layout), tmp_path / "many")
      continue
    with pytest.raises(KeyboardInterrupt):
      loop.train(config(*layout), tmp_path / "many")
  assert (
    "Programs of stages are compiled in the steps" in capsys.readouterr().out
  )
  name = "heldout_bits_per_byte"
  for field in ("loss", name):
    one, many = (
      [line.get(field) for line in metrics.read(tmp_path / run)]
      for run in ("one", "many")
    )
    assert [n is None for n in one] == [n is None for n in many]
    pairs = [
      pair for pair in zip(one, many, strict=True) if pair[0] is not None
    ]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)


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
