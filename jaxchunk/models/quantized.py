"""Matrices held in four or eight bits.

A model of 8B takes 16 GB in bf16, 8.5 GB in int8 and 4.5 GB in nf4. Such
matrices are not trained: adapters beside them are (QLoRA). A matrix is widened
where it is multiplied, and only its codes are kept between the forward and the
backward pass.

Sources: Dettmers et al., QLoRA (arXiv 2305.14314), whose NormalFloat this is:
the codes are those of bitsandbytes. Its second quantization, of the scales, is
left out; they are bf16 instead of fp32, 4.25 bits a number in all.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Integer

from jaxchunk.models.turned import Turned

Kind = Literal["nf4", "int8"]

# Quantiles of a normal distribution, scaled to [-1, 1]; 0 is among them
# (appendix E of the paper).
_NF4 = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
  *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)
_CODES = {"nf4": jnp.uint4, "int8": jnp.int8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
  """How the matrices of the layers are held.

  Attributes:
    kind: "nf4", 4.25 bits a number, or "int8", 8.25.
    block: Inputs of one output that share a scale; divides the inputs of every
      matrix.

  Raises:
    ValueError: The kind is not known, or the block no positive integer.
  """

  kind: Kind = "nf4"
  block: int = 64

  def __post_init__(self) -> None:
    if self.kind not in _CODES:
      raise ValueError(
        f"quantization.kind={self.kind!r} is not one of {list(_CODES)}"
      )
    if not isinstance(self.block, int) or self.block < 1:
      raise ValueError(
        f"quantization.block={self.block!r} must be a positive integer"
      )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("codes", "scales"),
  meta_fields=("kind", "view"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A matrix, or a stack of them: `value(code) * scale`.

  Attributes:
    codes: One a number, in four or eight bits.
    scales: One for each block of inputs and each output.
    kind: What a code means.
    view: The shape that the matrix is seen in; `None` is that of its codes.
  """

  codes: Integer[Array, "*L in out"]
  scales: Float[Array, "*L blocks out"]
  kind: Kind
  view: tuple[int, ...] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """`[*L,in,out]`, or the view's."""
    return self.codes.shape if self.view is None else self.view

  def reshape(self, shape: tuple[int, ...]) -> "Quantized":
    """The same matrix, widened to another shape."""
    return dataclasses.replace(self, view=shape)

  def widened(self, dtype: DTypeLike) -> Float[Array, "..."]:
    """The matrix; computed in at least fp32, then rounded to the dtype."""
    wide = jnp.promote_types(dtype, jnp.float32)
    *stack, inputs, outputs = self.codes.shape
    blocks = self.scales.shape[-2]
    codes = self.codes.reshape(*stack, blocks, inputs // blocks, outputs)
    values = codes.astype(wide) if self.kind == "int8" else _nf4_values(codes)
    values = values.astype(wide) * self.scales[..., None, :].astype(wide)
    return values.reshape(self.shape).astype(dtype)


Matrix = Array | Quantized | Turned


def quantized(
  kernel: Float[Array, "*L in out"], quantization: Quantization
) -> Quantized:
  """The nearest matrix whose numbers are codes times scales.

  Args:
    kernel: A matrix or a stack of them.
    quantization: How to hold it.

  Raises:
    ValueError: The block does not divide the inputs.
  """
  *stack, inputs, outputs = kernel.shape
  if inputs % quantization.block:
    raise ValueError(
      f"a matrix of {inputs} inputs cannot be cut into blocks of "
      f"quantization.block={quantization.block}; choose a divisor"
    )
  wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  wide = wide.reshape(*stack, -1, quantization.block, outputs)
  largest = jnp.max(jnp.abs(wide), axis=-2, keepdims=True)
  steps = 1.0 if quantization.kind == "nf4" else 127.0
  scales = (largest / steps).astype(jnp.bfloat16)
  # Codes for the scale as it is held.
  held = scales.astype(wide.dtype)
  ratio = wide / jnp.where(held == 0, 1, held)
  if quantization.kind == "nf4":
    codes = _nf4_codes(ratio)
  else:
    codes = jnp.clip(jnp.round(ratio), -127, 127).astype(jnp.int8)
  return Quantized(
    codes.reshape(kernel.shape), scales.squeeze(-2), quantization.kind
  )


def widened(matrix: Matrix, dtype: DTypeLike) -> Float[Array, "..."]:
  """A matrix as an array of a dtype, however it is held."""
  if isinstance(matrix, Quantized | Turned):
    return matrix.widened(dtype)
  return matrix.astype(dtype)


def _nf4_codes(ratio: Array) -> Array:
  """The nearest of the sixteen values: how many midpoints lie below."""
  above = [
    (ratio > (low + high) / 2).astype(jnp.uint8)
    for low, high in itertools.pairwise(_NF4)
  ]
  return functools.reduce(jnp.add, above).astype(jnp.uint4)


def _nf4_values(codes: Array) -> Array:
  """A tree of choices, bit by bit: a table's lookups are slow on TPUs."""
  codes = codes.astype(jnp.uint8)
  values: list[Any] = list(_NF4)
  for bit in range(4):
    chosen = (codes >> bit) & 1 != 0
    values = [
      jnp.where(chosen, jnp.float32(high), jnp.float32(low))
      for low, high in zip(values[::2], values[1::2], strict=True)
    ]
  return jnp.asarray(values[0])


class QuantizedParam(nnx.Variable[Array]):
  """Part of a matrix that is never trained."""


class QuantizedKernel(nnx.Module):
  """In place of a `kernel`: `codes [in,out]` and `scales [blocks,out]`."""

  def __init__(
    self, kernel: Float[Array, "in out"], quantization: Quantization
  ):
    held = quantized(kernel, quantization)
    self.codes = QuantizedParam(held.codes)
    self.scales = QuantizedParam(held.scales)
    self.kind = quantization.kind

  @property
  def matrix(self) -> Quantized:
    """The matrix; of a stack of layers, all of them."""
    return Quantized(self.codes[...], self.scales[...], self.kind)
