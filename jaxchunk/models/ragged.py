"""Products of rows with the matrix of their group, and their gradients.

What `jaxchunk.models.tape` gives for one matrix, for many: rows are sorted by
group, and the products and both gradients are ragged ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.vma import match_primal

_WEIGHTS = lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


@jax.custom_vjp
def ragged_product(
  x: Float[Array, "M D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
  """Each row times the matrix of its group.

  The same as `x[start:stop] @ w[e]` for the rows of every group e. On CPU XLA
  multiplies every row by every matrix and drops the rest.

  Args:
    x: Rows, those of group 0 first.
    w: Matrices; cast to x's dtype, differentiated in at least fp32.
    sizes: Rows of each group; what is behind them belongs to none.

  Returns:
    The products in x's dtype; rows of no group give 0.
  """
  y = lax.ragged_dot(x, w.astype(x.dtype), sizes)
  return _of_groups(y, sizes)


def _of_groups(y: Array, sizes: Array) -> Array:
  """Zero behind the groups: what kernels leave there is their own affair."""
  mine = jnp.arange(y.shape[0]) < sizes.sum()
  return jnp.where(mine[:, None], y, 0)


def _fwd(x: Array, w: Array, sizes: Array) -> tuple[Array, Any]:
  return ragged_product(x, w, sizes), (x, w, sizes)


def _bwd(saved: Any, dy: Array) -> tuple[Array, Array, None]:
  x, w, sizes = saved
  dy = _of_groups(dy, sizes)
  dx = lax.ragged_dot(dy, w.astype(dy.dtype).swapaxes(1, 2), sizes)
  wide = jnp.promote_types(w.dtype, jnp.float32)
  dw = lax.ragged_dot_general(
    x, dy, sizes, _WEIGHTS, preferred_element_type=wide
  )
  dx = match_primal(_of_groups(dx, sizes), x)
  return dx, match_primal(dw.astype(w.dtype), w), None


ragged_product.defvjp(_fwd, _bwd)


@jax.custom_vjp
def replayed_ragged_product(
  y: Float[Array, "M F"],
  x: Float[Array, "M D"],
  w: Float[Array, "E D F"],
  sizes: Int[Array, " E"],
) -> Float[Array, "M F"]:
  """y, with the gradient of `ragged_product(x, w, sizes)`."""
  del x, w, sizes
  return y


def _replayed_fwd(
  y: Array, x: Array, w: Array, sizes: Array
) -> tuple[Array, Any]:
  return y, (x, w, sizes)


def _replayed_bwd(saved: Any, dy: Array) -> tuple[None, Array, Array, None]:
  return None, *_bwd(saved, dy)


replayed_ragged_product.defvjp(_replayed_fwd, _replayed_bwd)
