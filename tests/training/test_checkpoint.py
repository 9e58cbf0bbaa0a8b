import dataclasses
import gc
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.models.transformer import Transformer
from jaxchunk.training import checkpoint, optimizer
from jaxchunk.training import config as config_lib
from jaxchunk.training.checkpoint import CheckpointError
from jaxchunk.training.initial import abstract_model
from jaxchunk.training.saver import Saver

# Where one read of several fails, Orbax drops the coroutines and futures of
# the others, and Python says so when it collects them.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _collect_what_was_dropped():
  """Here and not in the middle of some later test."""
  yield
  gc.collect()


@pytest.fixture
def arrays(config):
  _, shapes, _ = abstract_model(config.model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    nnx.to_pure_dict(shapes),
  )
  tx = optimizer.make_optimizer(config.train)
  return params, optimizer.init_state(tx, params)


def save(manager, step, config, arrays):
  params, state = arrays
  params = jax.tree.map(lambda x: x + step, params)
  checkpoint.write(
    manager,
    step,
    arrays={"params": params, "optimizer": state},
    meta={"config": config_lib.to_json(config), "cursor": {"place": step}},
  )


def restore(manager, config, arrays):
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  params, state = (checkpoint.target_like(x, device) for x in arrays)
  return checkpoint.restore(manager, config, params=params, optimizer=state)


def save_all(workdir, config, arrays, steps=(1, 2)):
  with checkpoint.open_manager(workdir, config.checkpoint) as manager:
    for step in steps:
      save(manager, step, config, arrays)


def restore_from(workdir, config, arrays):
  with checkpoint.open_manager(workdir, config.checkpoint) as manager:
    return restore(manager, config, arrays)


def largest_file(folder: Path) -> Path:
  files = [path for path in folder.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(step: Path) -> None:
  path = largest_file(step / "params")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(step: Path) -> None:
  os.truncate(largest_file(step / "params"), 40)


def empty(step: Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def half_a_meta(step: Path) -> None:
  path = step / "meta" / "metadata"
  path.write_text(path.read_text()[:50])


def no_optimizer(step: Path) -> None:
  shutil.rmtree(step / "optimizer")


DAMAGES = [flip_a_bit, truncate, empty, half_a_meta, no_optimizer]


def test_round_trip_and_what_is_kept(tmp_path, config, arrays):
  config.checkpoint.keep_every = 4
  save_all(tmp_path, config, arrays, range(1, 8))
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [4, 6, 7]
  restored = restore_from(tmp_path, config, arrays)
  assert restored.step == 7
  assert restored.meta["cursor"] == {"place": 7}
  expected = jax.tree.map(lambda x: x + 7, arrays[0]), arrays[1]
  found = restored.params, restored.optimizer
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_nothing_to_restore(tmp_path, config, arrays):
  assert restore_from(tmp_path, config, arrays) is None


def test_saved_arrays_may_be_donated_at_once(tmp_path, config, arrays):
  params, state = arrays
  expected = jax.tree.map(np.array, params)
  overwrite = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0
  )
  with (
    checkpoint.open_manager(tmp_path, config.checkpoint) as manager,
    Saver(manager) as saver,
  ):
    meta = {"config": config_lib.to_json(config)}
    saver.begin(1, params=params, optimizer=state, meta=meta)
    target = jax.tree.map(lambda x: x, params)
    jax.block_until_ready(overwrite(params))
    saver.commit()
    saver.wait()
    restored = restore(manager, config, (target, state))
  jax.tree.map(np.testing.assert_array_equal, expected, restored.params)


def test_restores_onto_a_mesh(tmp_path, config, arrays):
  save_all(tmp_path, config, arrays, [1])
  mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
  everywhere = jax.NamedSharding(mesh, jax.P())
  with checkpoint.open_manager(tmp_path, config.checkpoint) as manager:
    restored = checkpoint.restore(
      manager, config, params=checkpoint.target_like(arrays[0], everywhere)
    )
  assert restored.optimizer is None
  assert restored.params["embed"].sharding == everywhere


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_newest_falls_back(
  tmp_path, config, arrays, damage, caplog
):
  save_all(tmp_path, config, arrays)
  damage(tmp_path / "checkpoints" / "2")
  restored = restore_from(tmp_path, config, arrays)
  assert restored.step == 1
  assert "CHECKPOINT 2 CANNOT BE READ" in caplog.text
  assert (tmp_path / checkpoint.SET_ASIDE / "2").is_dir()
  assert (tmp_path / "checkpoints" / "1").is_dir()
  # The step can be made and saved again, and found.
  save_all(tmp_path, config, arrays, [2])
  assert restore_from(tmp_path, config, arrays).step == 2


def test_all_damaged_is_one_error_and_nothing_moves(tmp_path, config, arrays):
  save_all(tmp_path, config, arrays)
  for step in "12":
    truncate(tmp_path / "checkpoints" / step)
  with pytest.raises(CheckpointError, match=r"none of .*\[1, 2\].*--workdir"):
    restore_from(tmp_path, config, arrays)
  kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert kept == ["1", "2"]


def test_an_interrupted_save_is_cleaned_up(tmp_path, config, arrays):
  save_all(tmp_path, config, arrays, [1])
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp-0")
  assert restore_from(tmp_path, config, arrays).step == 1
  assert [path.name for path in folder.iterdir()] == ["1"]


def test_another_architecture_names_the_fields(tmp_path, config, arrays):
  save_all(tmp_path, config, arrays)
  other = dataclasses.replace(
    config, model=dataclasses.replace(config.model, num_layers=3, d_ff=32)
  )
  with pytest.raises(CheckpointError) as error:
    restore_from(tmp_path, other, arrays)
  text = str(error.value)
  assert "model.num_layers (stored 2, now 3)" in text
  assert "model.d_ff (stored 16, now 32)" in text
  assert "--workdir" in text
  assert not (tmp_path / checkpoint.SET_ASIDE).exists()


def test_another_optimizer_is_an_error(tmp_path, config, arrays):
  save_all(tmp_path, config, arrays)
  config.train.optimizer = "adafactor"
  with pytest.raises(CheckpointError, match=r"train\.optimizer .*adamw"):
    restore_from(tmp_path, config, arrays)


def test_other_settings_are_told(tmp_path, config, arrays, caplog):
  save_all(tmp_path, config, arrays)
  config.train.num_steps = 99
  assert restore_from(tmp_path, config, arrays).step == 2
  assert "train.num_steps (stored 8, now 99)" in caplog.text


def test_a_failed_write_is_one_error(tmp_path, config, arrays):
  with (
    pytest.raises(CheckpointError, match="could not be written"),
    checkpoint.open_manager(tmp_path, config.checkpoint) as manager,
  ):
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    save(manager, 1, config, arrays)


@pytest.mark.fast
def test_checksums_see_one_bit():
  x = {"a": jnp.arange(7.0), "b": jnp.ones(3, jnp.bfloat16), "c": jnp.ones(2)}
  x["d"] = jnp.asarray([True, False])
  before = checkpoint.checksums(x)
  bits = np.asarray(x["b"]).view(np.uint16).copy()
  bits[1] ^= 1
  after = checkpoint.checksums({**x, "b": jnp.asarray(bits.view("bfloat16"))})
  assert before["a"] == after["a"]
  assert before["b"] != after["b"]


def test_model_for_inference(tmp_path, config, arrays):
  save_all(tmp_path, config, arrays)
  flip_a_bit(tmp_path / "checkpoints" / "2")
  before = sorted(tmp_path.rglob("*"))
  model, tokenizer, step = checkpoint.load_for_inference(tmp_path)
  assert step == 1
  assert isinstance(model, Transformer)
  assert model.cfg == config.model.frozen()
  assert tokenizer == str(tmp_path / "tokenizer")
  np.testing.assert_array_equal(model.embed[...], arrays[0]["embed"] + 1)
  assert model(jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 259)
  assert sorted(tmp_path.rglob("*")) == before


def test_no_model_for_inference(tmp_path):
  with pytest.raises(CheckpointError, match=r"no folder 'checkpoints'"):
    checkpoint.load_for_inference(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
    checkpoint.load_for_inference(tmp_path)
