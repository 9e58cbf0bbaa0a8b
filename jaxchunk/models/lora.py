"""Low-rank adapters beside frozen matrices, perhaps quantized ones.

Only the adapters need gradients (`trainable=nnx.LoRAParam`): for the matrices
beside them none are computed.

Sources: Hu et al., LoRA (arXiv 2106.09685); Kalajdzievski, rank-stabilized
LoRA (arXiv 2312.03732); Liu et al., DoRA (arXiv 2402.09353). Names and scales
are those of PEFT.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from jaxchunk.kernels.vma import match_primal
from jaxchunk.models.quantized import Matrix, widened

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The matrices of a layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """`x @ W` becomes `x @ W + scale * (x @ a) @ b`.

  Attributes:
    rank: R, the width between a and b.
    alpha: The scale is `alpha / rank`.
    targets: Which matrices of a layer, out of `LINEARS`.
    rank_stabilized: The scale is `alpha / rank ** 0.5`.
    dora: Each output is also scaled, from the norm that its column of
      `W + scale * a @ b` has to a trained magnitude.

  Raises:
    ValueError: A number is not positive, or a target is not known.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = LINEARS
  rank_stabilized: bool = False
  dora: bool = False

  def __post_init__(self) -> None:
    if not isinstance(self.rank, int) or self.rank < 1:
      raise ValueError(f"lora.rank={self.rank!r} must be a positive integer")
    if not self.alpha > 0:
      raise ValueError(f"lora.alpha={self.alpha} must be positive")
    unknown = [name for name in self.targets if name not in LINEARS]
    if unknown or not self.targets:
      raise ValueError(
        f"lora.targets={self.targets!r} must be some of {list(LINEARS)}"
      )

  @property
  def scale(self) -> float:
    """Factor on the adapters' product."""
    width = self.rank**0.5 if self.rank_stabilized else self.rank
    return self.alpha / width


class Adapter(nnx.Module):
  """`a [in,R]`, `b [R,out]` and perhaps a `magnitude [out]`, in fp32."""

  def __init__(
    self, lora: LoRA, kernel: Matrix, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    self.scale = lora.scale
    inputs, outputs = kernel.shape
    dtype = jnp.promote_types(dtype, jnp.float32)
    bound = inputs**-0.5
    shape = (inputs, lora.rank)
    a = jax.random.uniform(rngs.params(), shape, dtype, -bound, bound)
    self.a = nnx.LoRAParam(a)
    self.b = nnx.LoRAParam(jnp.zeros((lora.rank, outputs), dtype))
    norms = column_norms(widened(kernel, dtype)) if lora.dora else None
    magnitude = None if norms is None else nnx.LoRAParam(norms)
    self.magnitude: Any = nnx.data(magnitude)

  def merged(self, kernel: Matrix, dtype: DTypeLike) -> Float[Array, "in out"]:
    """Of one layer, the matrix that does what `kernel` and the adapter do.

    Products and sums are in at least fp32, then rounded to the dtype.
    """
    adapted = self._sum(kernel)
    if self.magnitude is not None:
      adapted *= (self.magnitude[...] / column_norms(adapted))[None]
    return adapted.astype(dtype)

  def column_factor(self, kernel: Matrix) -> Float[Array, " out"] | None:
    """DoRA's factor on the output; its norm counts as a constant."""
    if self.magnitude is None:
      return None
    square = jnp.sum(jnp.square(self._sum(kernel)), axis=0)
    # Of a part of the rows: the parts are added up.
    square = match_primal(jax.lax.stop_gradient(square), self.magnitude[...])
    norms = jnp.sqrt(square)
    return jnp.asarray(self.magnitude[...] / norms)

  def _sum(self, kernel: Matrix) -> Float[Array, "in out"]:
    product = jnp.matmul(
      self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST
    )
    return widened(kernel, product.dtype) + self.scale * product


def column_norms(kernel: Float[Array, "in out"]) -> Float[Array, " out"]:
  """The length of each column."""
  return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0))
