import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxchunk.models.config import ModelConfig
from jaxchunk.training import optimizer
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.initial import abstract_model

NAMES = ("adamw", "adamw8bit", "adafactor", "muon")


@pytest.fixture(scope="module")
def params():
  """The kinds of array that a model has, but few: Muon compiles slowly."""
  shapes = {
    "embed": (32, 16),
    "blocks": {
      0: {
        "attention_norm": {"scale": (2, 16)},
        "q": {"kernel": (2, 16, 16), "bias": (2, 16)},
        "down": {"kernel": (2, 24, 16)},
      }
    },
    "final_norm": {"scale": (16,)},
    "head": (32, 16),
  }
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gradients(params, scale=1.0):
  leaves, treedef = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(
    treedef,
    [jnp.asarray(rng.normal(size=x.shape) * scale, x.dtype) for x in leaves],
  )


def begin(train, params):
  params = jax.tree.map(jnp.copy, params)
  state = optimizer.init_state(optimizer.make_optimizer(train), params)
  return params, state


@pytest.mark.fast
def test_kinds_follow_names_not_only_ranks():
  cfg = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=24, qkv_bias=True
  )
  shapes = nnx.to_pure_dict(abstract_model(cfg)[1])
  kinds = optimizer.kinds(shapes)
  block = kinds["blocks"][0]
  assert shapes["blocks"][0]["attention_norm"]["scale"].ndim == 2
  assert block["attention_norm"]["scale"] == "vector"
  assert block["q"] == {"kernel": "matrix", "bias": "vector"}
  assert block["down"]["kernel"] == "matrix"
  assert kinds["embed"] == kinds["head"] == "embedding"
  assert kinds["final_norm"]["scale"] == "vector"


@pytest.mark.fast
def test_an_unnamed_stack_of_vectors_is_no_matrix():
  tree = {"blocks": {0: {"gain": jnp.ones((3, 4)), "w": jnp.ones((3, 2, 2))}}}
  assert optimizer.kinds(tree) == {
    "blocks": {0: {"gain": "vector", "w": "matrix"}}
  }


@pytest.mark.fast
def test_cosine_schedule():
  train = TrainConfig(
    num_steps=100, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.1
  )
  rate = optimizer.learning_rate_schedule(train)
  values = np.asarray([rate(i) for i in range(100)])
  np.testing.assert_allclose(values[0], 0.2, rtol=1e-6)
  assert np.all(np.diff(values[:10]) > 0)
  assert np.all(np.diff(values[10:]) < 0)
  assert values.max() <= 2.0
  np.testing.assert_allclose(values[-1], 0.2, rtol=1e-6)


@pytest.mark.fast
def test_wsd_schedule_is_flat_until_its_decay():
  train = TrainConfig(
    num_steps=100,
    warmup_steps=10,
    schedule="wsd",
    decay_steps=20,
    learning_rate=1.0,
    final_learning_rate=0.0,
  )
  rate = optimizer.learning_rate_schedule(train)
  values = np.asarray([rate(i) for i in range(100)])
  np.testing.assert_array_equal(values[9:80], 1.0)
  assert np.all(np.diff(values[80:]) < 0)
  assert values[-1] == 0


def apply(tx, grads, params):
  return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_decay(name, params):
  train = TrainConfig(
    optimizer=name, num_steps=10, warmup_steps=0, weight_decay=0.5
  )
  decayed = optimizer.make_optimizer(train)
  plain = optimizer.make_optimizer(dataclasses.replace(train, weight_decay=0.0))
  grads = gradients(params)
  with_decay = apply(decayed, grads, params)
  without = apply(plain, grads, params)
  rate = float(optimizer.learning_rate_schedule(train)(0))

  def check(kind, a, b, p):
    factor = rate * 0.5 if kind == "matrix" else 0.0
    np.testing.assert_allclose(b - a, factor * p, rtol=2e-3, atol=1e-7)

  jax.tree.map(check, optimizer.kinds(params), with_decay, without, params)


def test_muon_orthogonalises_each_layer_alone(params):
  train = TrainConfig(
    optimizer="muon", num_steps=10, warmup_steps=0, weight_decay=0.0
  )
  tx = optimizer.make_optimizer(train)
  grads = gradients(params)
  updates = apply(tx, grads, params)
  down = updates["blocks"][0]["down"]["kernel"]
  singular = jnp.linalg.svd(down, compute_uv=False)
  # Newton-Schulz in five steps brings all singular values near to one.
  spread = singular.max(axis=-1) / singular.min(axis=-1)
  assert spread.shape == (2,)
  assert float(spread.max()) < 3

  first = optax.contrib.muon(
    optimizer.learning_rate_schedule(train),
    eps=train.epsilon,
    adam_b1=train.beta1,
    adam_b2=train.beta2,
    consistent_rms=0.2,
  )
  one = {"w": params["blocks"][0]["down"]["kernel"][0]}
  grad = {"w": grads["blocks"][0]["down"]["kernel"][0]}
  alone = apply(first, grad, one)
  np.testing.assert_allclose(down[0], alone["w"], rtol=1e-4, atol=1e-6)


def test_update_divides_once_and_clips(params):
  train = TrainConfig(num_steps=10, warmup_steps=0, clip_norm=0.5)
  update = optimizer.make_update(train)
  grads = gradients(params, 30.0)
  _, state, metrics = update(
    *begin(train, params), jnp.float32(30), jnp.float32(10), grads
  )
  norm = optax.tree.norm(grads) / 10
  np.testing.assert_allclose(metrics.loss, 3.0)
  np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
  # Adam's first moment is the clipped gradient times 1 - beta1.
  moment = optax.tree.norm(state.inner[0].mu)
  np.testing.assert_allclose(moment, 0.5 * (1 - train.beta1), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_update_donates_its_state(name, params):
  train = TrainConfig(optimizer=name, num_steps=10, warmup_steps=0)
  update = optimizer.make_update(train)
  old = begin(train, params)
  new = update(*old, jnp.float32(1), jnp.float32(1), gradients(params))
  jax.block_until_ready(new)
  assert all(x.is_deleted() for x in jax.tree.leaves(old))


@pytest.mark.parametrize(
  ("name", "bad"),
  [("adamw", "loss"), *((name, "gradient") for name in NAMES)],
)
def test_a_step_that_is_not_finite_changes_nothing(name, bad, params):
  train = TrainConfig(optimizer=name, num_steps=10, warmup_steps=0)
  update = optimizer.make_update(train)
  good = gradients(params)
  state = update(*begin(train, params), jnp.float32(1), jnp.float32(1), good)
  before = jax.tree.map(np.array, state[:2])
  loss, grads = jnp.float32(np.nan), good
  if bad == "gradient":
    loss = jnp.float32(1)
    grads = {**good, "embed": good["embed"].at[1, 1].set(jnp.inf)}
  after, skipped, metrics = update(*state[:2], loss, jnp.float32(1), grads)
  assert metrics.skipped == metrics.skipped_in_a_row == 1
  assert skipped.applied == 1
  jax.tree.map(np.testing.assert_array_equal, before[0], after)
  jax.tree.map(np.testing.assert_array_equal, before[1].inner, skipped.inner)
  _, _, metrics = update(after, skipped, jnp.float32(1), jnp.float32(1), good)
  assert (metrics.skipped, metrics.skipped_in_a_row) == (1, 0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_on_the_host_gives_the_same_updates(name, params):
  train = TrainConfig(optimizer=name, num_steps=10, warmup_steps=0)
  away = dataclasses.replace(train, optimizer_memory="host")
  good, device = gradients(params), jax.tree.leaves(params)[0].sharding
  bad = {**good, "embed": good["embed"].at[1, 1].set(jnp.inf)}
  ends = []
  for options in (train, away):
    params_now, state = begin(options, params)
    places = optimizer.state_shardings(options, state, device)
    state = jax.device_put(state, places)
    update = optimizer.make_update(options, places)
    for grads in (good, bad, jax.tree.map(jnp.negative, good), good):
      old = params_now, state
      params_now, state, _ = update(*old, jnp.float32(1), jnp.float32(2), grads)
      assert all(x.is_deleted() for x in jax.tree.leaves(old))
    found = jax.tree.map(lambda x: x.sharding, state.inner)
    ends.append(jax.device_get((params_now, state)))
  host = jax.tree.map(lambda x: x.memory_kind == "pinned_host", found)
  kinds = optimizer.kinds(state.inner)
  assert host == jax.tree.map(lambda kind: kind != "vector", kinds)
  assert any(jax.tree.leaves(host))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *ends
  )
