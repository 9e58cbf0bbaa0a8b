"""Exact gradient, chunk by chunk: keys and values grow, activations do not.

Forward, ascending: every chunk leaves its keys and values behind; the last K
("live") chunks also keep their activations. Backward, descending: live chunks
from their slots, the others after running forward again. What a chunk's
queries owe to earlier keys is added to the sequence state's cotangent, which
is therefore whole when its own chunk's turn comes.

Peak memory is K * act(C) + KV + dKV. K = 0 is SeCO, K >= 1 ChunkFlow
(arXiv 2503.02356).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxchunk.chunking.chunk import Chunk, Lane, chunk_of
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.scores import chunk_nll
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.transformer import Transformer


def schedule(num_chunks: int, live_chunks: int) -> list[tuple[str, int]]:
  """The operations on a lane's chunks, in order, as `(op, chunk)`.

  `F_drop` runs a chunk forward for its sequence state, `F_keep` also keeps
  what the backward needs, `B` is the backward.
  """
  first = max(num_chunks - live_chunks, 0)
  return [
    *(("F_drop", i) for i in range(first)),
    *(("F_keep", i) for i in range(first, num_chunks)),
    *(("B", i) for i in reversed(range(first, num_chunks))),
    *((op, i) for i in reversed(range(first)) for op in ("F_keep", "B")),
  ]


def lane_gradient(
  stage: Stage,
  live_chunks: int,
  model: Transformer,
  lane: Lane,
  num_chunks: Int[Array, ""],
  totals: tuple[Float[Array, ""], list[Array]],
  rng: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], list[Array]]:
  """Adds a lane's loss and gradients to the totals.

  Args:
    stage: What runs.
    live_chunks: K, how many chunks keep their activations at once.
    model: The parameters.
    lane: Tokens; its length is the capacity.
    num_chunks: How many chunks of the lane are in use, at least 1; may be
      traced.
    totals: `(sum(weights * nll), gradient accumulators)` so far.
    rng: Key for dropout.

  Returns:
    The totals. Executes `schedule(num_chunks, live_chunks)`.
  """
  size = stage.chunk_size
  batch, length = lane.tokens.shape
  capacity = length // size
  live = min(live_chunks, capacity)
  first = jnp.maximum(num_chunks - live, 0)

  def chunk(index: Any) -> Any:
    return chunk_of(model, lane, index, size, rng)

  def drop(i: Any, states: Any) -> Any:
    states = stage.save(states, i)
    return stage.forward(model, chunk(i), states)[1]

  def keep(i: Any, slot: Any, carry: Any) -> Any:
    outputs, states, slots = carry
    x, states, slots = stage.forward(model, chunk(i), states, slots, slot)
    return outputs.at[slot].set(x), states, slots

  def back(i: Any, slot: Any, kept: Any, carry: Any) -> Any:
    outputs, states, slots = kept
    (loss, grads), cotangents = carry
    here = chunk(i)
    part, dx, grads = stage.head_gradient(model, here, outputs[slot], grads)
    cotangents, grads = stage.backward(
      model, here, dx, states, cotangents, slots, slot, grads
    )
    loss = stage.add_router_losses(loss + part.astype(loss.dtype), slots, slot)
    return (loss, grads), cotangents

  states = stage.init_states(model, batch, length)
  count = max(live, 1)
  slots = stage.init_slots(model, chunk(0), count)
  outputs = jnp.zeros((count, batch, size, model.cfg.d_model), model.cfg.dtype)
  cotangents = stage.zero_cotangents(states)
  slots, outputs, totals = vary_like((slots, outputs, totals), lane, num_chunks)
  states, cotangents = vary_like((states, cotangents), model, lane, num_chunks)

  if live < capacity:
    states = lax.fori_loop(0, first, drop, states)
  kept, carry = (outputs, states, slots), (totals, cotangents)

  def keep_live(i: Any, kept: Any) -> Any:
    outputs, states, slots = kept
    return keep(i, i % live, (outputs, stage.save(states, i), slots))

  def back_live(n: Any, carry: Any) -> Any:
    i = num_chunks - 1 - n
    return back(i, i % live, kept, carry)

  if live == 1:
    # No loop: as fast as an ordinary step where the lane is one chunk.
    kept = keep_live(first, kept)
    carry = back(first, 0, kept, carry)
  elif live > 1:
    kept = lax.fori_loop(first, num_chunks, keep_live, kept)
    carry = lax.fori_loop(0, num_chunks - first, back_live, carry)

  def again(n: Any, both: Any) -> Any:
    (outputs, states, slots), carry = both
    i = first - 1 - n
    kept = keep(i, 0, (outputs, stage.restore(states, i), slots))
    return kept, back(i, 0, kept, carry)

  if live < capacity:
    _, carry = lax.fori_loop(0, first, again, (kept, carry))
  return carry[0]


def lane_nll(
  stage: Stage,
  model: Transformer,
  lane: Lane,
  num_chunks: Int[Array, ""],
) -> Float[Array, "B S"]:
  """Negative log-likelihood of every target of a lane; forward only.

  Args:
    stage: What runs.
    model: The parameters.
    lane: Tokens; its length is the capacity.
    num_chunks: How many chunks are in use; the others give 0.

  Returns:
    The nll in at least fp32, without weights.
  """
  return lane_map(chunk_nll, stage, model, lane, num_chunks)


def lane_map(
  score: Callable[[Transformer, Chunk, Array], Any],
  stage: Stage,
  model: Transformer,
  lane: Lane,
  num_chunks: Int[Array, ""],
) -> Any:
  """`score` of every token of a lane, from the last layer; forward only.

  Args:
    score: Takes the model, a chunk and the last layer's output `[B,C,D]`, and
      gives a pytree of `[B,C]`.
    stage: What runs.
    model: The parameters.
    lane: Tokens; its length S is the capacity.
    num_chunks: How many chunks are in use; the others give 0.

  Returns:
    The pytree, each leaf `[B,S]`.
  """
  size = stage.chunk_size
  batch, length = lane.tokens.shape
  states = stage.init_states(model, batch, length)

  def first() -> Any:
    x = jnp.zeros((batch, size, model.cfg.d_model), model.cfg.dtype)
    here = chunk_of(model, lane, 0, size)
    return score(with_head, here, vary_like(x, lane))

  with_head = stage.shards.with_head(model, stage.trainable)
  kinds = jax.eval_shape(first)
  out = jax.tree.map(lambda a: jnp.zeros((batch, length), a.dtype), kinds)

  def body(i: Any, carry: Any) -> Any:
    states, out = carry
    here = chunk_of(model, lane, i, size)
    x, states, _ = stage.forward(model, here, stage.save(states, i), None)

    def put(whole: Array, part: Array) -> Array:
      return lax.dynamic_update_slice_in_dim(whole, part, i * size, 1)

    return states, jax.tree.map(put, out, score(with_head, here, x))

  states = vary_like(states, model, lane, num_chunks)
  out = vary_like(out, lane, num_chunks)
  return lax.fori_loop(0, num_chunks, body, (states, out))[1]
