"""The values of an array, where they can be known."""

from typing import Any

import jax
import numpy as np


def known_values(array: Any) -> np.ndarray | None:
  """The array's values on the host, or `None` where they cannot be known.

  They cannot inside `jit` (of an argument; of an array that a traced function
  merely refers to they can), and not of an array that lies in part on another
  host.
  """
  if isinstance(array, jax.core.Tracer):
    return None
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return None
  return np.asarray(array)
