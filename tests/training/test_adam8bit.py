"""Moments of a byte a number, and parameters rounded at random."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchunk.training import optimizer
from jaxchunk.training.adam8bit import Moment, scale_by_adam_8bit
from jaxchunk.training.apply import stochastic_rounding
from jaxchunk.training.config import TrainConfig


def _gradients(step, scale=1.0):
  rng = np.random.default_rng(step)
  # Columns of very different size, as in real matrices.
  sizes = 10.0 ** rng.uniform(-2, 0, (1, 1, 300))
  g = rng.normal(size=(2, 80, 300)) * sizes * scale
  return {"w": jnp.asarray(g, jnp.float32), "b": jnp.asarray(g[0, 0, :5])}


def test_steps_are_near_those_of_adam():
  exact = optax.scale_by_adam(0.9, 0.95, 1e-8)
  eight = scale_by_adam_8bit(0.9, 0.95, 1e-8)
  states = [tx.init(_gradients(0)) for tx in (exact, eight)]
  for step in range(12):
    grads = _gradients(step)
    want, states[0] = exact.update(grads, states[0])
    got, states[1] = jax.jit(eight.update)(grads, states[1])
    error = np.linalg.norm(got["w"] - want["w"]) / np.linalg.norm(want["w"])
    # Codes are 2% apart at the top of a block, and 10% at a hundredth.
    assert error < 0.08
    # Small arrays are exact, and no step is out of bounds.
    np.testing.assert_allclose(got["b"], want["b"], rtol=1e-5, atol=1e-6)
    assert np.abs(got["w"]).max() < 2 * np.abs(want["w"]).max()


def test_a_slow_decay_is_not_lost():
  """After one gradient v is `0.001 * 0.999 ** n`, to nearest it would stay."""
  eight = scale_by_adam_8bit(0.9, 0.999, 1e-8)
  ones, zeros = {"w": jnp.ones((64, 256))}, {"w": jnp.zeros((64, 256))}
  # One number keeps the scale of every block.
  peaks = {"w": zeros["w"].at[:, 0].set(4.0)}
  update = jax.jit(eight.update)
  _, state = update(ones, eight.init(ones))
  for _ in range(200):
    _, state = update(peaks, state)
  codes = state.nu["w"].codes[:, 1:].astype(np.float32) / 255
  v = codes**8 * np.asarray(state.nu["w"].scales)
  assert v.mean() == pytest.approx(0.001 * 0.999**200, rel=0.03)


def test_the_state_takes_a_quarter():
  params = {"w": jnp.zeros((4, 256, 512))}
  sizes = [
    sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
    for tx in (
      optax.scale_by_adam(),
      scale_by_adam_8bit(0.9, 0.95, 1e-8),
    )
  ]
  assert sizes[1] / sizes[0] < 0.26


def test_a_second_moment_never_vanishes():
  eight = scale_by_adam_8bit(0.9, 0.95, 1e-8)
  grads = {"w": jnp.full((64, 256), 1e-9).at[0, 0].set(1.0)}
  _, state = eight.update(grads, eight.init(grads))
  assert isinstance(state.nu["w"], Moment)
  assert int(state.nu["w"].codes.min()) >= 1
  steps, _ = eight.update(grads, state)
  assert np.abs(steps["w"]).max() < 2


def test_zero_gradients_make_no_step():
  eight = scale_by_adam_8bit(0.9, 0.95, 1e-8)
  grads = {"w": jnp.zeros((64, 256))}
  steps, state = eight.update(grads, eight.init(grads))
  assert not np.asarray(steps["w"]).any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_rounding_at_random_is_right_on_average():
  # A third of the way between two neighbours in bf16, 2**-7 apart.
  x = jnp.full((30_000,), 1 + 2**-7 / 3, jnp.float32)
  rounded = stochastic_rounding(x, jax.random.key(0)).astype(jnp.float32)
  assert set(np.unique(rounded)) == {1.0, 1 + 2**-7}
  error = float(rounded.mean()) - float(x[0])
  # Three standard errors of the mean.
  assert abs(error) < 3 * 2**-7 * (2 / 9) ** 0.5 / 30_000**0.5
  exact = jnp.asarray([1.5, -2.0, 0.0, jnp.inf, -jnp.inf], jnp.float32)
  np.testing.assert_array_equal(
    stochastic_rounding(exact, jax.random.key(1)).astype(jnp.float32), exact
  )
  nan = stochastic_rounding(jnp.full((3,), jnp.nan), jax.random.key(2))
  assert np.isnan(nan.astype(jnp.float32)).all()


@pytest.mark.parametrize("memory", ["device", "host"])
def test_small_updates_count_in_bf16(memory):
  """Each a twentieth of a unit: to nearest, none would ever move a weight."""

  def trained(stochastic):
    train = TrainConfig(
      optimizer="adamw8bit",
      learning_rate=2**-9 / 10,
      num_steps=100,
      warmup_steps=0,
      final_learning_rate=1.0,
      weight_decay=0.0,
      clip_norm=None,
      stochastic_rounding=stochastic,
      optimizer_memory=memory,
    )
    # As many scales as make a matrix of 8 bits, which they are not.
    stack = {
      "w": jnp.ones((2, 64, 64), jnp.bfloat16),
      "norm": {"scale": jnp.ones((2, 2048), jnp.bfloat16)},
    }
    params = {
      "blocks": {0: stack},
      "embed": jnp.ones((64, 64), jnp.bfloat16),
    }
    tx = optimizer.make_optimizer(train)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = optimizer.state_shardings(
      train, optimizer.init_state(tx, params), device
    )
    init = jax.jit(lambda p: optimizer.init_state(tx, p), out_shardings=places)
    state = init(params)
    update = optimizer.make_update(train, places)
    one = jnp.ones(())
    for _ in range(40):
      grads = jax.tree.map(lambda p: jnp.ones(p.shape), params)
      params, state, _ = update(params, state, one, one, grads)
    return params

  still, moved = trained(False), trained(True)
  for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(moved), strict=True):
    np.testing.assert_array_equal(a, 1)
    want = 1 - 40 * 2**-9 / 10
    assert float(b.astype(jnp.float32).mean()) == pytest.approx(want, abs=3e-4)
  # Layers do not share their luck.
  layers = moved["blocks"][0]["w"]
  assert (layers[0] != layers[1]).any()
