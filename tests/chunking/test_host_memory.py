"""Keys, values and gradients in host memory: the same sums, the same bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxchunk as jc
from jaxchunk.kernels.state import ChunkPlace
from jaxchunk.kernels.state_host import KVHost
from tests.chunking.conftest import PLAIN, build

C = 8
# A row of segments that end inside chunks; the first is longer than four.
SEGMENTS = ([37, 5, 19],)


def batch():
  rng = np.random.default_rng(0)
  ids = np.zeros((len(SEGMENTS), 64), np.int32)
  for row, lengths in zip(ids, SEGMENTS, strict=True):
    row[: sum(lengths)] = np.repeat(1 + np.arange(len(lengths)), lengths)
  return {
    "tokens": rng.integers(0, PLAIN.vocab_size, ids.shape),
    "targets": rng.integers(0, PLAIN.vocab_size, ids.shape),
    "weights": rng.uniform(1, 2, ids.shape).astype(np.float32) * (ids > 0),
    "segment_ids": ids,
  }


@pytest.mark.parametrize(
  ("pattern", "live_chunks"), [((None,), 2), ((5, None), 0)]
)
def test_same_loss_and_gradients_as_in_one_piece(pattern, live_chunks):
  cfg = dataclasses.replace(PLAIN, num_layers=2, window_pattern=pattern)
  model = build(cfg, "float32")
  loss, grads = jc.chunked_value_and_grad(
    model, batch(), chunk_size=16, live_chunks=live_chunks, kv_memory="host"
  )
  wanted_loss, wanted = jc.full_value_and_grad(model, batch())
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
  for got, want in zip(
    jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True
  ):
    error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
    assert error <= 1e-5


@pytest.mark.parametrize(
  ("index", "window", "first"),
  [(1, None, 0), (5, None, 4), (7, None, 5), (3, 5, 2), (3, 10, 1), (0, 9, 0)],
)
def test_only_chunks_with_visible_keys_are_fetched(index, window, first):
  ids = np.zeros((1, 64), np.int32)
  ids[0, :61] = np.repeat([1, 2, 3], [37, 5, 19])
  spec = KVHost(
    num_kv_heads=1, head_dim=4, chunk_size=C, scale=1.0, window=window
  )
  start = index * C
  place = ChunkPlace(
    jnp.int32(index),
    jnp.int32(start),
    jnp.asarray(ids[:, start : start + C]),
    jnp.asarray(ids),
  )
  assert int(spec.first_chunk(place)) == first


def test_layer_outer_is_refused():
  with pytest.raises(ValueError, match="kv_memory='host' needs strategy"):
    jc.chunked_value_and_grad(
      build(PLAIN, "float32"),
      batch(),
      chunk_size=C,
      strategy="layer_outer",
      kv_memory="host",
    )
  with pytest.raises(ValueError, match="kv_memory='disk' is not one of"):
    jc.chunked_value_and_grad(
      build(PLAIN, "float32"), batch(), chunk_size=C, kv_memory="disk"
    )
