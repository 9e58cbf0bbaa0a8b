"""The executor does not know which sequence state it runs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxchunk.chunking import chunk_outer, layer_outer
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.trainable import Trainable
from jaxchunk.models.tape import Tape
from tests.chunking.conftest import PLAIN, build

C = 8


@dataclasses.dataclass(frozen=True)
class Decay:
  """A recurrent state: `M <- g M + sum_s g^(C-1-s) k_s v_s`, `o_t = q_t M_t`.

  Snapshots are full copies of M, one per chunk.
  """

  heads: int
  width: int
  chunks: int
  gate: float = 0.9

  def init(self, layers: int, batch: int, capacity: int) -> Any:
    dtype = jnp.zeros(()).dtype
    matrix = (layers, batch, self.heads, self.width, self.width)
    chunk = (layers, batch, self.heads, C, self.width)
    return {
      "after": jnp.zeros(matrix, dtype),
      "before": jnp.zeros(matrix, dtype),
      "k": jnp.zeros(chunk, dtype),
      "v": jnp.zeros(chunk, dtype),
      "snapshots": jnp.zeros((capacity // C, *matrix), dtype),
    }

  def run(self, before, q, k, v):
    steps = jnp.arange(C)
    decay = jnp.where(
      steps[:, None] >= steps[None],
      self.gate ** (steps[:, None] - steps[None]).astype(q.dtype),
      0,
    )
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k) * decay[None, None, None]
    inside = jnp.einsum("BKGTS,BKSH->BKGTH", scores, v)
    past = jnp.einsum("BKGTH,BKHE->BKGTE", q, before)
    fade = self.gate ** (steps + 1).astype(q.dtype)
    o = inside + past * fade[None, None, None, :, None]
    tail = self.gate ** (C - 1 - steps).astype(q.dtype)
    new = jnp.einsum("BKSH,BKSE,S->BKHE", k, v, tail)
    return o, self.gate**C * before + new

  def write(self, state, layer, place, k, v):
    before = state["after"][layer]
    _, after = self.run(before, k[:, :, None], k, v)
    new = {"before": before, "after": after, "k": k, "v": v}
    put = {name: state[name].at[layer].set(a) for name, a in new.items()}
    return state | put

  def attend(self, state, layer, place, q):
    k, v = state["k"][layer], state["v"][layer]
    return self.run(state["before"][layer], q, k, v)[0], ()

  def attend_bwd(
    self, state, cotangent, layer, place, q, k, v, o, residual, do
  ):
    before = lax.dynamic_index_in_dim(
      state["snapshots"], place.index, keepdims=False
    )[layer]
    _, vjp = jax.vjp(self.run, before, q, k, v)
    d_before, dq, dk, dv = vjp((do, cotangent[layer]))
    return (dq, dk, dv), cotangent.at[layer].set(d_before)

  def reset(self, state):
    return jax.tree.map(jnp.zeros_like, state)

  def save(self, state, index):
    saved = state["snapshots"].at[index].set(state["after"])
    return state | {"snapshots": saved}

  def restore(self, state, index):
    at = lax.dynamic_index_in_dim(state["snapshots"], index, keepdims=False)
    return state | {"after": at}

  def zero_cotangent(self, state):
    return jnp.zeros_like(state["after"])

  def weigh_cotangent(self, state, cotangent, place, factor):
    return cotangent * factor

  def skip_cotangent(self, state, cotangent, place):
    return jnp.zeros_like(cotangent)


def lane_of(chunks: int) -> Lane:
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (2, chunks * C)
  ids = jnp.ones(shape, jnp.int32)
  row = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.randint(key, shape, 0, PLAIN.vocab_size)

  return Lane(
    draw(keys[0]),
    draw(keys[1]),
    jax.random.uniform(keys[2], shape),
    ids,
    row,
    ids,
  )


def plain_loss(model, lane, spec):
  """All chunks in order by ordinary autodiff."""
  x = model.embed_tokens(lane.tokens)
  ropes = model.rope_tables(lane.positions)
  stack = model.blocks[0]
  for n in range(model.cfg.num_layers):
    block = jax.tree.map(lambda a, n=n: a[n], stack)
    q, k, v = block.pre(x, ropes, Tape())
    memory = jnp.zeros((2, spec.heads, spec.width, spec.width), x.dtype)
    outs = []
    for i in range(x.shape[1] // C):
      cut = slice(i * C, (i + 1) * C)
      o, memory = spec.run(memory, q[:, :, :, cut], k[:, :, cut], v[:, :, cut])
      outs.append(o)
    x = block.post(x, jnp.concatenate(outs, axis=3), Tape())
  log_p = jax.nn.log_softmax(model.logits(model.final_norm(x)))
  nll = -jnp.take_along_axis(log_p, lane.targets[..., None], -1)[..., 0]
  return jnp.sum(nll * lane.weights)


@pytest.mark.parametrize("live", [0, 1, 2, 5, None])
def test_recurrent_state(x64, live):
  model, chunks = build(PLAIN), 4
  lane = lane_of(chunks)
  spec = Decay(PLAIN.kv_heads, PLAIN.head_width, chunks)
  stage = Stage(C, (spec,), Trainable.of(model))
  totals = (jnp.zeros(()), stage.trainable.zeros(model))
  count = jnp.int32(chunks)
  if live is None:
    program = functools.partial(layer_outer.lane_gradient, stage)
  else:
    program = functools.partial(chunk_outer.lane_gradient, stage, live)
  loss, grads = jax.jit(program)(model, lane, count, totals)
  want_loss, want = jax.jit(jax.value_and_grad(plain_loss), static_argnums=2)(
    model, lane, spec
  )
  assert abs(loss - want_loss) <= 1e-12 * want_loss
  for a, b in zip(grads, jax.tree.leaves(want), strict=True):
    assert jnp.linalg.norm(a - b) <= 1e-12 * jnp.linalg.norm(b)
