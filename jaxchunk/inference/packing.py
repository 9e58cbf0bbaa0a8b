"""Many small arrays as one, so that one transfer brings them to the device."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32


@dataclasses.dataclass(frozen=True)
class Packing:
  """Where arrays of 32 bits a number lie in one array.

  Attributes:
    fields: Shape and dtype of each, by name.
  """

  fields: Mapping[str, tuple[tuple[int, ...], str]]

  @property
  def size(self) -> int:
    """Numbers in all."""
    return sum(math.prod(shape) for shape, _ in self.fields.values())

  def empty(self) -> tuple[Int32[np.ndarray, " n"], dict[str, np.ndarray]]:
    """A new array of zeros, and views of its parts to fill in."""
    whole = np.zeros(self.size, np.int32)
    views, at = {}, 0
    for name, (shape, dtype) in self.fields.items():
      size = math.prod(shape)
      views[name] = whole[at : at + size].view(dtype).reshape(shape)
      at += size
    return whole, views

  def unpack(self, whole: Int32[Array, " n"]) -> dict[str, Array]:
    """The parts, inside of a program."""
    parts, at = {}, 0
    for name, (shape, dtype) in self.fields.items():
      size = math.prod(shape)
      part = whole[at : at + size].reshape(shape)
      if dtype != "int32":
        part = lax.bitcast_convert_type(part, jnp.dtype(dtype))
      parts[name] = part
      at += size
    return parts
