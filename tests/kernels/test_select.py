"""Choosing blocks of keys, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.kernels.attention import select
from jaxchunk.kernels.attention.api import attention
from jaxchunk.kernels.attention.mask import AttentionMask

pytestmark = pytest.mark.fast


def keys(seed=0, shape=(2, 24, 2, 4)):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_summaries_are_those_of_each_block():
  k = keys()
  means = select.block_means(jnp.asarray(k), 8)
  low, high = select.block_bounds(jnp.asarray(k), 8)
  for b, h, j in np.ndindex(2, 2, 3):
    block = k[b, j * 8 : (j + 1) * 8, h]
    np.testing.assert_allclose(means[b, h, j], block.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(low[b, h, j], block.min(0))
    np.testing.assert_array_equal(high[b, h, j], block.max(0))


def test_scores_are_means_over_a_block_and_its_group():
  q, k = keys(1, (2, 12, 4, 4)), keys()
  means = select.block_means(jnp.asarray(k), 8)
  got = select.block_scores(jnp.asarray(q), means, q_block=6)
  assert got.shape == (2, 2, 2, 3)
  for b, h, i, j in np.ndindex(got.shape):
    rows = q[b, i * 6 : (i + 1) * 6, 2 * h : 2 * h + 2].reshape(-1, 4)
    scores = rows @ k[b, j * 8 : (j + 1) * 8, h].T * 4**-0.5
    np.testing.assert_allclose(got[b, h, i, j], scores.mean(), rtol=1e-4)


def test_no_score_exceeds_the_bound():
  q, k = keys(1, (2, 12, 4, 4)), keys()
  bounds = select.block_bounds(jnp.asarray(k), 8)
  got = select.bounded_scores(jnp.asarray(q), bounds, q_block=6)
  for b, h, i, j in np.ndindex(got.shape):
    rows = q[b, i * 6 : (i + 1) * 6, 2 * h : 2 * h + 2].reshape(-1, 4)
    scores = rows @ k[b, j * 8 : (j + 1) * 8, h].T * 4**-0.5
    assert got[b, h, i, j] >= scores.max() - 1e-5
    # One channel a block of one key leaves nothing to estimate.
  one = select.block_bounds(jnp.asarray(k), 1)
  exact = select.bounded_scores(jnp.asarray(q), one, q_block=1)
  rows = q.reshape(2, 12, 2, 2, 4)
  want = np.einsum("btkgh,bskh->bktgs", rows, k).max(3) * 4**-0.5
  np.testing.assert_allclose(exact, want, rtol=1e-4, atol=1e-5)


@given(offset=st.integers(0, 9))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_causal_blocks_are_those_with_a_visible_pair(offset):
  got = select.causal_blocks(8, 24, q_block=4, kv_block=3, q_offset=offset)
  seen = np.asarray(AttentionMask.causal(offset).dense(8, 24))
  want = seen.reshape(1, 1, 2, 4, 8, 3).any((3, 5))
  np.testing.assert_array_equal(got, want)


def test_sinks_and_window_hold_the_own_blocks():
  got = select.sink_and_window(
    8, 24, q_block=4, kv_block=2, sinks=1, window=1, q_offset=13
  )
  # Queries 13..16 and 17..20 are in blocks 6..8 and 8..10.
  want = np.zeros((2, 12), bool)
  want[:, 0] = True
  want[0, 6:9] = want[1, 8:11] = True
  np.testing.assert_array_equal(got[0, 0], want)


@given(st.data())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_choices_by_score(data):
  rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
  # Few values, so that there are ties.
  scores = rng.integers(0, 4, (1, 2, 3, 6)).astype(np.float32)
  allowed = rng.random((1, 1, 3, 6)) < 0.7
  count = data.draw(st.integers(1, 7))
  mass = data.draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
  top = np.asarray(
    select.top_k(jnp.asarray(scores), count, allowed=jnp.asarray(allowed))
  )
  kept = np.asarray(
    select.threshold(jnp.asarray(scores), mass, allowed=jnp.asarray(allowed))
  )
  for b, h, i in np.ndindex(1, 2, 3):
    may = np.flatnonzero(allowed[0, 0, i])
    order = sorted(may, key=lambda j: (-scores[b, h, i, j], j))
    assert set(np.flatnonzero(top[b, h, i])) == set(order[:count])
    weights = np.exp(scores[b, h, i])
    need, total = 0, 0.0
    while need < len(order) and total < mass * weights[may].sum() - 1e-3:
      total += weights[order[need]]
      need += 1
    chosen = set(np.flatnonzero(kept[b, h, i]))
    assert chosen >= set(order[:need])
    assert len(chosen) <= need + 1


def test_unions():
  rng = np.random.default_rng(0)
  chosen = rng.random((1, 4, 6, 5)) < 0.3
  by_query = select.union_over_queries(jnp.asarray(chosen), 3)
  by_group = select.union_over_groups(jnp.asarray(chosen), 2)
  np.testing.assert_array_equal(by_query, chosen.reshape(1, 4, 2, 3, 5).any(3))
  np.testing.assert_array_equal(by_group, chosen.reshape(1, 2, 2, 6, 5).any(2))


@given(st.integers(0, 2**16))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_table_and_choice_are_inverse(seed):
  chosen = np.random.default_rng(seed).random((2, 2, 3, 7)) < 0.4
  table = select.table_of(jnp.asarray(chosen), int(chosen.sum(-1).max()))
  mask = AttentionMask.blocks(table, q_block=4, kv_block=2)
  np.testing.assert_array_equal(mask.table_blocks(14), chosen)
  assert ((np.diff(table) > 0) | (np.asarray(table)[..., 1:] == -1)).all()


def test_choosing_everything_is_dense_attention():
  q, k, v = (jnp.asarray(keys(n)) for n in range(3))

  @jax.jit
  def both(q, k, v):
    scores = select.block_scores(q, select.block_means(k, 4), q_block=8)
    allowed = select.causal_blocks(24, 24, q_block=8, kv_block=4)
    table = select.table_of(select.threshold(scores, 1.0, allowed=allowed))
    chosen = AttentionMask.blocks(table, q_block=8, kv_block=4)
    causal = AttentionMask.causal()
    return (
      attention(q, k, v, mask=causal & chosen),
      attention(q, k, v, mask=causal),
    )

  sparse, dense = both(q, k, v)
  np.testing.assert_allclose(sparse, dense, atol=1e-6)


def test_bad_input_is_named():
  k = jnp.asarray(keys())
  with pytest.raises(ValueError, match=r"length 24 .* kv_block=7"):
    select.block_means(k, 7)
  with pytest.raises(ValueError, match=r"count must be at least 1, got 0"):
    select.top_k(jnp.zeros((1, 1, 1, 3)), 0)
  with pytest.raises(ValueError, match=r"mass must be in \(0, 1\], got 0"):
    select.threshold(jnp.zeros((1, 1, 1, 3)), 0)
  with pytest.raises(ValueError, match=r"N=3 heads .* K=2"):
    select.union_over_groups(jnp.zeros((1, 3, 1, 3), bool), 2)
  with pytest.raises(ValueError, match=r"5 blocks of queries .* of 2"):
    select.union_over_queries(jnp.zeros((1, 1, 5, 3), bool), 2)
  with pytest.raises(ValueError, match=r"a row has 3 blocks, the table only 2"):
    select.table_of(jnp.ones((1, 1, 1, 3), bool), 2)
