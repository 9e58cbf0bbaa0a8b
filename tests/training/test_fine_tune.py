"""Runs that begin with published weights, whole or beside adapters."""

import dataclasses
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.models.context import extend_context
from jaxchunk.models.lora import LoRA
from jaxchunk.models.quantized import Quantization
from jaxchunk.models.rope import YarnScaling
from jaxchunk.training import checkpoint, loop, metrics, report
from jaxchunk.training.checkpoint import CheckpointError
from jaxchunk.training.config import ConfigError, validate

_ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
  monkeypatch.setattr(report, "draw", lambda workdir: None)


@pytest.fixture(name="folder")
def fixture_folder(config, tmp_path):
  """The weights of a model, as published."""
  jc.save_hf(jc.Transformer(config.model, rngs=nnx.Rngs(7)), tmp_path / "base")
  return str(tmp_path / "base")


def fine_tuning(config, folder, lora=None, quantization=None):
  config.model = load_config(folder, lora=lora, quantization=quantization)
  config.train.init_from = folder
  config.train.num_steps = 4
  config.train.eval_every = 0
  config.checkpoint.save_every = 2
  return config


def get_config_of(name):
  return runpy.run_path(str(_ROOT / "configs" / f"{name}.py"))["get_config"]


def arrays_of(model, kind=nnx.Param):
  return dict(nnx.to_flat_state(nnx.state(model, kind)))


def losses(workdir):
  return [line["loss"] for line in metrics.read(workdir)]


def test_a_run_begins_with_the_weights_of_the_folder(config, folder, tmp_path):
  config = fine_tuning(config, folder)
  config.train.learning_rate = 1e-30
  config.train.weight_decay = 0.0
  config.train.num_steps, config.train.warmup_steps = 1, 0
  loop.train(config, tmp_path / "run")
  model, _, _ = checkpoint.load_for_inference(tmp_path / "run")
  want = arrays_of(jc.load_hf(folder))
  for path, value in arrays_of(model).items():
    np.testing.assert_array_equal(value.get_value(), want[path].get_value())


@pytest.mark.parametrize(
  ("recipe", "ending"), [("sft_h200", ",512k"), ("lora_24gb", "")]
)
def test_recipes_run(config, folder, tmp_path, recipe, ending):
  """On a small model and its data; without kernels, there being no GPU."""
  run = get_config_of(recipe)(f"{folder}{ending}")
  assert run.train.kv_memory == "host"
  run.data = config.data
  run.train.implementation = None
  run.train.chunk_size = 128
  run.train.num_steps, run.train.warmup_steps = 2, 1
  result = loop.train(run, tmp_path / "run")
  assert result.step == 2 and result.heldout_bits_per_byte is not None
  assert np.isfinite(losses(tmp_path / "run")).all()


def test_adapters_alone_are_trained_and_saved(
  config, folder, tmp_path, monkeypatch
):
  lora = LoRA(rank=2, alpha=4.0, dora=True)
  config = fine_tuning(config, folder, lora)
  write, written = checkpoint.write, []

  def spied(*args, arrays, meta):
    written.append(dict(arrays))
    return write(*args, arrays=arrays, meta=meta)

  monkeypatch.setattr(checkpoint, "write", spied)
  loop.train(config, tmp_path / "run")
  model, _, _ = checkpoint.load_for_inference(tmp_path / "run")
  base = arrays_of(jc.load_hf(folder))
  got = arrays_of(model)
  adapters = {path for path in got if "adapter" in path}
  assert adapters == set(got) - set(base) and len(adapters) == 21
  for path in base:
    np.testing.assert_array_equal(got[path].get_value(), base[path].get_value())
  moved = [p for p in adapters if p[-1] == "b" and got[p].get_value().any()]
  assert len(moved) == 7
  # A checkpoint has nothing else, and its moments.
  for arrays in written:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    assert len([n for n in names if n.startswith("['params']")]) == 21
    large = [n for n, (_, leaf) in zip(names, leaves, strict=True) if leaf.ndim]
    assert all("adapter" in n for n in large) and len(large) == 3 * 21


@pytest.mark.parametrize(
  "quantization", [None, Quantization(kind="nf4", block=8)], ids=str
)
def test_a_run_with_adapters_goes_on_exactly(
  config, folder, tmp_path, monkeypatch, quantization
):
  config = fine_tuning(config, folder, LoRA(rank=2), quantization)
  loop.train(config, tmp_path / "whole")
  launch = loop.launch

  def killed(run, batch):
    if run.step == 3:
      raise KeyboardInterrupt
    return launch(run, batch)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop, "launch", killed)
    loop.train(config, tmp_path / "parts")
  loop.train(config, tmp_path / "parts")
  assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
  models = [
    checkpoint.load_for_inference(tmp_path / name)[0]
    for name in ("parts", "whole")
  ]
  jax.tree.map(np.testing.assert_array_equal, *models)


def test_adapters_go_on_beside_what_they_began_with(config, folder, tmp_path):
  config = fine_tuning(config, folder, LoRA(rank=2))
  config.train.num_steps = 2
  loop.train(config, tmp_path / "run")
  other = jc.Transformer(
    dataclasses.replace(config.model, lora=None), rngs=nnx.Rngs(8)
  )
  jc.save_hf(other, folder, overwrite=True)
  config.train.num_steps = 4
  with pytest.raises(CheckpointError, match="not those that they were trained"):
    loop.train(config, tmp_path / "run")
  with pytest.raises(CheckpointError, match="put the model back as it was"):
    checkpoint.load_for_inference(tmp_path / "run")


def test_ids_of_other_parts_of_a_model_may_be_named(config, folder, tmp_path):
  """As Gemma 3's tokenizer does of images."""
  config = fine_tuning(config, folder)
  config.model.vocab_size = 258  # of 259 that the tokenizer has
  config.data.bos, config.data.eos = True, False
  small = jc.Transformer(config.model, rngs=nnx.Rngs(0))
  jc.save_hf(small, folder, overwrite=True)
  loop.train(config, tmp_path / "run")
  assert len(losses(tmp_path / "run")) == 4


def test_a_folder_with_another_model_is_refused(config, folder, tmp_path):
  config = fine_tuning(config, folder)
  config.model.activation = "gelu"
  with pytest.raises(ConfigError, match=r"another model .*activation='gelu'"):
    loop.train(config, tmp_path / "run")
  config.train.init_from = str(tmp_path / "nowhere")
  with pytest.raises(ConfigError, match=r"nowhere.*has no config\.json"):
    loop.train(config, tmp_path / "other")


def test_a_context_may_be_stretched(config, folder, tmp_path):
  config = fine_tuning(config, folder)
  folder_length = config.model.context_length
  config.model = extend_context(config.model, 4 * folder_length)
  config.data.length_stages = (60, 100)
  loop.train(config, tmp_path / "run")
  model, _, _ = checkpoint.load_for_inference(tmp_path / "run")
  assert model.cfg.rope.scaling == YarnScaling(
    factor=4.0, original_length=folder_length
  )
  # As long as the context is that of the folder, it is a mistake.
  config.model.context_length = folder_length
  with pytest.raises(ConfigError, match="another model"):
    loop.train(config, tmp_path / "other")


def test_how_a_model_is_used_may_differ(config, folder, tmp_path):
  config = fine_tuning(config, folder)
  config.model.dropout = 0.1
  config.model.context_length = 4096
  loop.train(config, tmp_path / "run")
  assert len(losses(tmp_path / "run")) == 4


@pytest.mark.parametrize(
  "name, arguments",
  [
    ("sft", ""),
    ("lora", ""),
    ("lora", ",int8"),
    ("long_context", ",32768"),
    ("long_context", ",32768,theta"),
  ],
)
def test_configurations_for_a_folder_are_valid(
  name, arguments, config, folder, tmp_path
):
  get_config = get_config_of(name)
  if name == "lora" and arguments:
    # Its smallest matrix has 16 inputs.
    with pytest.raises(ValueError, match=r"multiple of quantization\.block=64"):
      validate(get_config(folder + arguments))
    return
  made = get_config(folder + arguments)
  validate(made)
  assert made.train.init_from == folder
  wrong = {"lora": ",int5", "long_context": ",12,ntk", "sft": "/nowhere"}
  with pytest.raises(ValueError, match=r"int5|ntk|config\.json"):
    get_config(folder + wrong[name])
  with pytest.raises(ConfigError, match="name the model's folder"):
    get_config()
