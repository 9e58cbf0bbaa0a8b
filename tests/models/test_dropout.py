"""Dropout drawn per token from what the token is, not from where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.models.dropout import DropoutKeys, dropout

pytestmark = pytest.mark.fast

_WIDTH = 512


def keys_of(documents, positions, seed=0):
  as_row = [jnp.asarray(a, jnp.int32)[None] for a in (documents, positions)]
  return DropoutKeys.of(jax.random.key(seed), *as_row)


def kept(keys, rate=0.25, site=0):
  ones = jnp.ones((*keys.keys.shape, _WIDTH))
  return np.asarray(dropout(ones, rate, keys, site=site))


def test_a_share_of_channels_is_zero_and_the_mean_stays():
  out = kept(keys_of(np.zeros(200), np.arange(200)))
  assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
  # Six standard deviations of the mean of 200 x 512 draws.
  assert abs((out == 0).mean() - 0.25) < 6 * (0.25 * 0.75 / out.size) ** 0.5


def test_a_token_drops_the_same_channels_anywhere():
  here = kept(keys_of([3, 3, 8, 8], [0, 1, 0, 1]))[0]
  there = kept(keys_of([8, 3, 5], [1, 0, 2]))[0]
  np.testing.assert_array_equal(there[0], here[3])
  np.testing.assert_array_equal(there[1], here[0])


def test_documents_positions_layers_sites_and_seeds_differ():
  keys = keys_of([1, 1, 2], [0, 1, 0])
  masks = [
    *kept(keys)[0],
    kept(keys, site=1)[0, 0],
    kept(keys.layer(0))[0, 0],
    kept(keys.layer(jnp.asarray(1)))[0, 0],
    kept(keys_of([1], [0], seed=1))[0, 0],
  ]
  assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_no_keys_or_no_rate_is_no_dropout():
  x = jnp.ones((1, 2, 4))
  assert dropout(x, 0.5, None, site=0) is x
  assert dropout(x, 0.0, keys_of([0, 0], [0, 1]), site=0) is x


def test_the_dtype_stays():
  x = jnp.ones((1, 2, 4), jnp.bfloat16)
  out = dropout(x, 0.5, keys_of([0, 0], [0, 1]), site=0)
  assert out.dtype == jnp.bfloat16
