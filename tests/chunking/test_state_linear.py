"""Linear attention as a sequence state: gradients by chunks are exact."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.chunking import chunk_outer, layer_outer
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.trainable import Trainable
from jaxchunk.kernels.attention.api import grouped, ungrouped
from jaxchunk.kernels.linear_attention.api import linear_attention
from jaxchunk.kernels.state_linear import LinearState
from jaxchunk.models.tape import Tape
from tests.chunking.conftest import PLAIN, build

C, CHUNKS = 8, 4
# Documents inside a chunk, over several, from border to border; padding.
CUTS = ([0, 3, 19, 24, 32], [0, 16, 21, 29])
DECAY = (math.log(0.9), math.log(0.6))


def state(log_decay, dtype="float64"):
  return LinearState(
    num_kv_heads=PLAIN.kv_heads,
    head_dim=PLAIN.head_width,
    chunk_size=C,
    scale=PLAIN.score_scale,
    log_decay=log_decay,
    dtype=dtype,
    block_size=4,
  )


def lane_of(packed, dtype="float64"):
  rng = np.random.default_rng(0)
  shape = (2, CHUNKS * C)
  ids = np.ones(shape, np.int32)
  if packed:
    ids[:] = 0
    for row, cuts in enumerate(CUTS):
      for n, (a, b) in enumerate(itertools.pairwise(cuts)):
        ids[row, a:b] = n + 1
  draw = functools.partial(rng.integers, 0, PLAIN.vocab_size, shape)
  weights = np.where(ids > 0, rng.random(shape), 0).astype(dtype)
  tokens, targets = (draw().astype(np.int32) for _ in range(2))
  row = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  return Lane(*map(jnp.asarray, (tokens, targets, weights, ids, row, ids)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def executed(spec, live, model, lane, num_chunks=None):
  """Loss and gradients by chunks; `live` of `None` is layer by layer."""
  num_chunks = jnp.int32(CHUNKS) if num_chunks is None else num_chunks
  stage = Stage(C, (spec,), Trainable.of(model))
  totals = (jnp.zeros((), lane.weights.dtype), stage.trainable.zeros(model))
  if live is None:
    return layer_outer.lane_gradient(stage, model, lane, num_chunks, totals)
  return chunk_outer.lane_gradient(stage, live, model, lane, num_chunks, totals)


@functools.partial(jax.jit, static_argnames="log_decay")
def expected(model, lane, log_decay):
  """The reference over whole rows, by ordinary autodiff."""

  def loss(model):
    x = model.embed_tokens(lane.tokens)
    ropes = model.rope_tables(lane.positions)
    for n in range(model.cfg.num_layers):
      block = jax.tree.map(lambda a, n=n: a[n], model.blocks[0])
      q, k, v = block.pre(x, ropes, Tape())
      o = linear_attention(
        ungrouped(q),
        *(a.transpose(0, 2, 1, 3) for a in (k, v)),
        log_decay=None if log_decay is None else jnp.asarray(log_decay),
        segment_ids=lane.segment_ids,
        scale=model.cfg.score_scale,
        implementation="reference",
      )
      x = block.post(x, grouped(o, k.shape[1]), Tape())
    log_p = jax.nn.log_softmax(model.logits(model.final_norm(x)))
    nll = -jnp.take_along_axis(log_p, lane.targets[..., None], -1)[..., 0]
    return jnp.sum(nll * lane.weights)

  return jax.value_and_grad(loss)(model)


@pytest.mark.parametrize(
  "live, log_decay",
  [(1, DECAY), (2, None), (None, DECAY)],
  ids=["one live", "two live, no decay", "by layers"],
)
def test_gradients_are_those_of_whole_rows(x64, live, log_decay):
  model, lane = build(PLAIN), lane_of(packed=True)
  loss, grads = executed(state(log_decay), live, model, lane)
  want_loss, want = expected(model, lane, log_decay)
  assert abs(loss - want_loss) <= 1e-11 * want_loss
  for a, b in zip(grads, jax.tree.leaves(want), strict=True):
    assert jnp.linalg.norm(a - b) <= 1e-11 * jnp.linalg.norm(b)


@pytest.mark.parametrize("live", [1, None])
def test_a_lane_that_is_used_in_part(x64, live):
  """The arrays hold four chunks, the sequence has three."""
  model, lane = build(PLAIN), lane_of(packed=False)
  weights = lane.weights.at[:, 3 * C :].set(0)
  ids = lane.segment_ids.at[:, 3 * C :].set(0)
  lane = Lane(lane.tokens, lane.targets, weights, ids, lane.positions, ids)
  loss, grads = executed(state(DECAY), live, model, lane, jnp.int32(3))
  want_loss, want = expected(model, lane, DECAY)
  assert abs(loss - want_loss) <= 1e-11 * want_loss
  for a, b in zip(grads, jax.tree.leaves(want), strict=True):
    assert jnp.linalg.norm(a - b) <= 1e-11 * jnp.linalg.norm(b)


@pytest.mark.parametrize("live", [0, None])
def test_documents_do_not_touch_each_other(live):
  """Only the second document has weights: the others' tokens change no bit."""
  model, lane = build(PLAIN, "float32"), lane_of(packed=True, dtype="float32")
  own = lane.segment_ids == 2
  results = []
  for tokens in (lane.tokens, (lane.tokens + 7) % PLAIN.vocab_size):
    here = Lane(
      jnp.where(own, lane.tokens, tokens),
      lane.targets,
      jnp.where(own, lane.weights, 0),
      lane.segment_ids,
      lane.positions,
      lane.document_ids,
    )
    results.append(executed(state(DECAY, "float32"), live, model, here))
  (loss, grads), (same_loss, same) = results
  assert loss > 0
  np.testing.assert_array_equal(loss, same_loss)
  for a, b in zip(grads, same, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.fast
def test_decays_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r"num_kv_heads=2 numbers"):
    state((math.log(0.9),))
  with pytest.raises(ValueError, match=r"give log\(0.9\)"):
    state((0.9, 0.5))
