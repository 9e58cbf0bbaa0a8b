"""What is said of a chunk's tokens, from the last layer's output."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxchunk.chunking.chunk import Chunk
from jaxchunk.kernels.cross_entropy.api import linear_cross_entropy
from jaxchunk.kernels.cross_entropy.xla import over_parts, own_labels
from jaxchunk.kernels.vma import varying_axes
from jaxchunk.models.transformer import Transformer


def chunk_nll(
  model: Transformer, chunk: Chunk, x: Float[Array, "B C D"]
) -> Float[Array, "B C"]:
  """Negative log-likelihood of each target, from the last layer's output.

  Inside a `jax.shard_map` the head may be a part of the vocabulary.
  """
  h, w, targets = model.final_norm(x), model.unembed, chunk.targets
  split = varying_axes(w) - varying_axes(h)
  here = None
  if split:
    (axis,) = split
    targets, here = own_labels(targets, w.shape[0], axis)
  nll, lse = linear_cross_entropy(
    h, w, targets, softcap=model.cfg.logit_softcap
  )
  return nll if here is None else over_parts(nll, lse, here, axis)[0]


class TokenScores(NamedTuple):
  """What is known of each target of a sequence.

  Attributes:
    nll: Negative log-likelihood, in at least fp32, without weights.
    greedy: Whether the target is the likeliest token.
  """

  nll: Any
  greedy: Any


# Rows of logits that exist at a time where the likeliest token is looked for.
_LOGIT_ROWS = 128


def chunk_scores(
  model: Transformer, chunk: Chunk, x: Float[Array, "B C D"]
) -> TokenScores:
  """`chunk_nll`, and which targets greedy decoding would choose.

  Memory: 128 rows of logits at a time.
  """

  def is_likeliest(row: tuple[Array, Array]) -> Array:
    x_D, target = row
    logits = model.logits(x_D[None, None])[0, 0]
    return jnp.argmax(logits) == target

  normed = model.final_norm(x)
  rows = (normed.reshape(-1, x.shape[-1]), chunk.targets.reshape(-1))
  greedy = lax.map(is_likeliest, rows, batch_size=_LOGIT_ROWS)
  return TokenScores(
    chunk_nll(model, chunk, x), greedy.reshape(chunk.targets.shape)
  )


def weighted_sum(
  weights: Float[Array, "B T"], nll: Float[Array, "B T"]
) -> Float[Array, ""]:
  """`sum(weights * nll)`, in which weight 0 masks any nll."""
  # A masked target may have any nll, even none: 0 * nan is not 0.
  return jnp.sum(jnp.where(weights == 0, 0, weights.astype(nll.dtype) * nll))
