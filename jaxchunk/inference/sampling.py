"""From logits to the next token: greedy, top-k and top-p, as pure functions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """How the next token is chosen; the order is that of the fields.

  Attributes:
    temperature: Logits are divided by it; 0 takes the likeliest token.
    top_k: Only the k likeliest tokens; `None` is all.
    top_p: Only the likeliest tokens that together have at least this
      probability, one at least; `None` is all.

  Raises:
    ValueError: A number is out of range; names it and its value.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self) -> None:
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f"temperature={self.temperature} must be 0 (the likeliest token) or a "
        "positive number"
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(
        f"top_k={self.top_k} must be at least 1, or None for every token"
      )
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(
        f"top_p={self.top_p} must be in (0, 1], or None for every token"
      )


@functools.partial(jax.jit, static_argnames=("sampler",))
def sample(
  logits: Float[Array, "B V"], key: PRNGKeyArray, *, sampler: Sampler
) -> Int[Array, " B"]:
  """Draws a token for every row.

  Args:
    logits: In fp32 or wider.
    key: Decides the draw; without effect at temperature 0.
    sampler: How; one small program is compiled for each.

  Returns:
    Token ids, int32.
  """
  if sampler.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  filtered = filter_logits(logits, sampler)
  return jax.random.categorical(key, filtered).astype(jnp.int32)


def filter_logits(
  logits: Float[Array, "B V"], sampler: Sampler
) -> Float[Array, "B V"]:
  """Logits whose softmax is what a temperature above 0 samples from."""
  # The largest becomes 0, so that no temperature makes it infinite.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  smallest = float(jnp.finfo(logits.dtype).tiny)
  logits = logits / max(sampler.temperature, smallest)
  if sampler.top_k is not None:
    logits = keep_top_k(logits, sampler.top_k)
  if sampler.top_p is not None:
    logits = keep_top_p(logits, sampler.top_p)
  return logits


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
  """The k largest logits, -inf elsewhere; of equal ones, the lower ids."""
  if k >= logits.shape[-1]:
    return logits
  values, ids = jax.lax.top_k(logits, k)
  return _only(logits, ids, values)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
  """The smallest set of largest logits with probability >= p, else -inf.

  A token stays if those before it, in descending order, have less than p
  together: the first one always does. Of equal ones, the lower ids.
  """
  if p >= 1:
    # A rounded sum may reach 1 before the last token.
    return logits
  ids = jnp.argsort(logits, axis=-1, descending=True, stable=True)
  values = jnp.take_along_axis(logits, ids, axis=-1)
  probs = jax.nn.softmax(values)
  before = jnp.cumsum(probs, axis=-1) - probs
  return _only(logits, ids, jnp.where(before < p, values, -jnp.inf))


def _only(
  logits: Float[Array, "B V"], ids: Int[Array, "B R"], values: Array
) -> Float[Array, "B V"]:
  nothing = jnp.full_like(logits, -jnp.inf)
  return jnp.put_along_axis(nothing, ids, values, axis=-1, inplace=False)
