"""Adam whose moments take one byte a number.

Each row of an array is cut into blocks of 256 numbers; a block has a scale in
fp32 and codes of 8 bits on a curve: a moment is `scale * code ** power`, so
that small numbers keep their relative size (power 3 for the first moment; 8
for the second, whose numbers span the square of that range). Rounding is at
random and right on average: to nearest, a moment that decays by less than half
a code a step would stay for ever. A second moment that is not 0 is never
rounded to 0, which would make its step huge.

Source: block-wise quantization as in Dettmers et al., 8-bit optimizers
(arXiv 2110.02861), with a power in place of their table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

_BLOCK = 256
# Smaller arrays, norms and biases, keep their moments in fp32.
_LEAST = 4096
_MU, _NU = 3, 8


class Moment(NamedTuple):
  """A quantized array.

  Attributes:
    codes: `[*B,n]`, int8 or uint8.
    scales: `[*B,blocks]`, fp32: the largest magnitude of each block.
  """

  codes: Int[Array, "*B n"]
  scales: Float[Array, "*B blocks"]


class Adam8bitState(NamedTuple):
  """The state of `scale_by_adam_8bit`.

  Attributes:
    time: Updates so far.
    mu: First moments: a `Moment`, or an fp32 array, for each parameter.
    nu: Second moments.
  """

  time: Int[Array, ""]
  mu: Any
  nu: Any


def scale_by_adam_8bit(
  b1: float,
  b2: float,
  eps: float,
  *,
  large: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with moments of 8 bits.

  Args:
    b1: Decay of the first moment.
    b2: Decay of the second moment.
    eps: Added to the root of the second moment.
    large: From parameters to which of them are matrices: a stack of vectors
      looks like one. `None` is all with two axes.
  """

  def init(params: Any) -> Adam8bitState:
    which = jax.tree.map(lambda _: True, params)
    if large is not None:
      which = large(params)
    return Adam8bitState(
      jnp.zeros((), jnp.int32),
      jax.tree.map(lambda p, w: _zeros(p, jnp.int8, w), params, which),
      jax.tree.map(lambda p, w: _zeros(p, jnp.uint8, w), params, which),
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    time = state.time + 1

    key = jax.random.fold_in(jax.random.key(0), time)

    def one(g: Array, mu: Any, nu: Any, number: int) -> tuple[Any, Any, Any]:
      g = g.astype(jnp.float32)
      m = b1 * _decoded(mu, _MU) + (1 - b1) * g
      v = b2 * _decoded(nu, _NU) + (1 - b2) * jnp.square(g)
      step = (m / (1 - b1**time)) / (jnp.sqrt(v / (1 - b2**time)) + eps)
      keys = jax.random.split(jax.random.fold_in(key, number))
      mu, nu = _encoded(m, mu, _MU, keys[0]), _encoded(v, nu, _NU, keys[1])
      return step, mu, nu

    leaves, treedef = jax.tree.flatten(updates)
    numbers = jax.tree.unflatten(treedef, range(len(leaves)))
    done = jax.tree.map(one, updates, state.mu, state.nu, numbers)
    steps, mu, nu = (
      jax.tree.map(lambda _, three, n=n: three[n], updates, done)
      for n in range(3)
    )
    return steps, Adam8bitState(time, mu, nu)

  return optax.GradientTransformation(init, update)


def is_quantized(shape: tuple[int, ...]) -> bool:
  """Whether the moments of such a matrix, or stack of them, have 8 bits."""
  return len(shape) >= 2 and shape[-1] * shape[-2] >= _LEAST


def _zeros(param: Array, dtype: Any, is_large: bool) -> Moment | Array:
  if not (is_large and is_quantized(param.shape)):
    return jnp.zeros(param.shape, jnp.float32)
  *rows, n = param.shape
  scales = jnp.zeros((*rows, -(-n // _BLOCK)), jnp.float32)
  return Moment(jnp.zeros(param.shape, dtype), scales)


def _spread(scales: Array, n: int) -> Array:
  """The scale of each number."""
  return jnp.repeat(scales, _BLOCK, axis=-1)[..., :n]


def _decoded(moment: Moment | Array, power: int) -> Array:
  if not isinstance(moment, Moment):
    return moment
  codes = moment.codes.astype(jnp.float32)
  codes /= jnp.iinfo(moment.codes.dtype).max
  curve = jnp.sign(codes) * jnp.abs(codes) ** power
  return curve * _spread(moment.scales, codes.shape[-1])


def _encoded(
  x: Array, like: Moment | Array, power: int, key: PRNGKeyArray
) -> Moment | Array:
  if not isinstance(like, Moment):
    return x
  *rows, n = x.shape
  blocks = like.scales.shape[-1]
  padding = [(0, 0)] * len(rows) + [(0, blocks * _BLOCK - n)]
  padded = jnp.pad(jnp.abs(x), padding).reshape(*rows, blocks, _BLOCK)
  scales = padded.max(-1)
  share = jnp.abs(x) / jnp.maximum(_spread(scales, n), 1e-38)
  dtype = like.codes.dtype
  most = jnp.iinfo(dtype).max
  low = jnp.minimum(jnp.floor(share ** (1 / power) * most), most - 1)
  ends = [((low + end) / most) ** power for end in (0, 1)]
  odds = (share - ends[0]) / (ends[1] - ends[0])
  codes = low + (jax.random.uniform(key, x.shape) < odds)
  if dtype == jnp.uint8:
    codes = jnp.where(x > 0, jnp.maximum(codes, 1), 0)
  return Moment((jnp.sign(x) * codes).astype(dtype), scales)
