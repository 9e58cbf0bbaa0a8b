r"""SpaCO: back-propagate a random subset of a lane's chunks, without bias.

Chunk i maps the sequence state before it, its parameters' use and its loss:
`(S_{i+1}, loss_i) = f_i(S_i, theta)`. It reads earlier chunks through their
keys and values in S_i and is read through its own, in S_{i+1}. With w_i the
loss weights and l_i the cotangent of its own part of the state, which later
chunks have summed up, the exact backward pass is, for i = N - 1, ..., 0,

    (g_i, m_ij for j < i) = B_i(w_i, l_i)      l_j = sum_{i > j} m_ij

and the gradient is sum_i g_i. B_i, the vector-Jacobian product of chunk i, is
linear. SpaCO draws b_i ~ Bernoulli(p), independently, and computes

    (g^_i, m^_ij) = B_i(b_i / p w_i, b_i / p l^_i)      l^_j = sum_{i > j} m^_ij

l^_i depends on b of later chunks only, so b_i is independent of it, and by
induction from the last chunk E l^_i = l_i and E g^_i = g_i: unbiased. A path
of the gradient through m chunks has the weight `prod(b / p)`, of mean 1; drawn
without replacement, t of k chunks, the mean of `prod(b k / t)` is less than 1
(`without_replacement_weight`): long paths are lost.

What an unchosen chunk drops is l^_i, what is owed to its *own* keys and
values. What is owed to those before it passes by unchanged: those chunks'
own draws decide about it. A state that cannot tell the two apart (a recurrent
one) counts its whole cotangent as the chunk's own: unbiased as well, but a
factor of b / p for each chunk crossed. See `weigh_cotangent` and
`skip_cotangent` of `SequenceState`.

The method is SeCO's and SpaCO's (wenhaoli-xmu/seco), with independent draws
in place of a fixed number of chunks.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxchunk.chunking.chunk import Chunk, Lane, chunk_of
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.scores import chunk_nll, weighted_sum
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.transformer import Transformer

# Folded into the key first, so that no document's dropout has the same key.
_TAG = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class SpaCO:
  """Back-propagates each chunk with probability `rate`; unbiased.

  The loss stays exact; the gradient is a random one whose mean is exact.
  Every chunk runs forward; the chosen ones forward again, and backward.

  Attributes:
    rate: p, in (0, 1]; t / k of the paper.
  """

  rate: float

  def __post_init__(self) -> None:
    number = isinstance(self.rate, int | float)
    if not number or isinstance(self.rate, bool) or not 0 < self.rate <= 1:
      raise ValueError(f"SpaCO rate={self.rate!r} must be a number in (0, 1]")


def without_replacement_weight(chunks: int, chosen: int, hops: int) -> float:
  """Mean weight of a gradient path when t of k chunks are drawn as a set.

  `prod_{j < m} (t - j) / (k - j) * k / t` for a path through m chunks; with
  independent draws it is 1.

  Args:
    chunks: k.
    chosen: t, from 1 to k.
    hops: m, the chunks on the path, at most k.

  Returns:
    The weight.
  """
  k, t = chunks, chosen
  return math.prod((t - j) / (k - j) * k / t for j in range(hops))


def draw_chunks(
  strategy: SpaCO, lane: Lane, capacity: int, rng: PRNGKeyArray
) -> Bool[Array, " chunks"]:
  """Which chunks of a lane are back-propagated.

  A function of the key (which a step has of its own), the name of the
  document that begins the lane, and the chunk's number: of nothing else.
  Lanes that begin with documents of the same name share their draws, which
  leaves the mean as it is.

  Args:
    strategy: The probability.
    lane: Tokens; the rows of a lane share the draws.
    capacity: Chunks of the lane.
    rng: The key.

  Returns:
    True for the chosen chunks.
  """
  key = jax.random.fold_in(rng, jnp.uint32(_TAG))
  key = jax.random.fold_in(key, lane.document_ids[0, 0])
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(capacity))
  return jax.vmap(lambda k: jax.random.bernoulli(k, strategy.rate))(keys)


def lane_gradient(
  stage: Stage,
  strategy: SpaCO,
  model: Transformer,
  lane: Lane,
  num_chunks: Int[Array, ""],
  totals: tuple[Float[Array, ""], list[Array]],
  chosen: Bool[Array, " chunks"],
  rng: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], list[Array]]:
  """Adds a lane's exact loss and a random gradient to the totals.

  Time is that of `num_chunks` forwards and `sum(chosen)` forwards and
  backwards; the number of chosen chunks is a value inside the program. Memory
  is that of chunk-outer with one live chunk.

  Args:
    stage: What runs.
    strategy: The probability with which `chosen` was drawn.
    model: The parameters.
    lane: Tokens; its length is the capacity.
    num_chunks: How many chunks of the lane are in use, at least 1.
    totals: `(sum(weights * nll), gradient accumulators)` so far.
    chosen: From `draw_chunks`; entries beyond `num_chunks` do not matter.
    rng: Key for dropout.

  Returns:
    The totals.
  """
  size = stage.chunk_size
  batch, length = lane.tokens.shape
  capacity = length // size

  def chunk(index: Any) -> Chunk:
    return chunk_of(model, lane, index, size, rng)

  def forward(i: Any, carry: Any) -> Any:
    states, loss = carry
    here = chunk(i)
    x, states, _ = stage.forward(model, here, stage.save(states, i))
    part = weighted_sum(here.weights, chunk_nll(model, here, x))
    return states, loss + part.astype(loss.dtype)

  states = stage.init_states(model, batch, length)
  slots = stage.init_slots(model, chunk(0), 1)
  cotangents = stage.zero_cotangents(states)
  states, slots, cotangents, totals, chosen = vary_like(
    (states, slots, cotangents, totals, chosen), model, lane, num_chunks
  )
  loss, grads = totals
  states, loss = lax.fori_loop(0, num_chunks, forward, (states, loss))

  descending = capacity - 1 - jnp.arange(capacity)
  wanted = (chosen & (jnp.arange(capacity) < num_chunks))[descending]
  # Stable: the chosen come first, the last chunk of the lane before others.
  order = descending[jnp.argsort(~wanted, stable=True)]

  def skip(n: Any, carry: Any) -> Any:
    states, cotangents, above = carry
    place = chunk(above - 1 - n).place
    return states, stage.skip_cotangents(states, cotangents, place), above

  def back(n: Any, carry: Any) -> Any:
    states, slots, cotangents, grads, above = carry
    i = order[n]
    gap = (states, cotangents, above)
    _, cotangents, _ = lax.fori_loop(0, above - 1 - i, skip, gap)
    here = chunk(i)
    factor = 1 / strategy.rate
    weights = here.weights * jnp.asarray(factor, here.weights.dtype)
    here = dataclasses.replace(here, weights=weights)
    states = stage.restore(states, i)
    kept: Any = stage.forward(model, here, states, slots)
    x, states, slots = kept
    _, dx, grads = stage.head_gradient(model, here, x, grads)
    cotangents = stage.weigh_cotangents(states, cotangents, here.place, factor)
    cotangents, grads = stage.backward(
      model, here, dx, states, cotangents, slots, 0, grads
    )
    return states, slots, cotangents, grads, i

  above = jnp.asarray(num_chunks, order.dtype)
  above, order = vary_like((above, order), model, lane, num_chunks)
  carry = (states, slots, cotangents, grads, above)
  grads = lax.fori_loop(0, wanted.sum(), back, carry)[3]
  return loss, grads
