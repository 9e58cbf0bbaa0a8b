"""Several adapters beside one model, another for each token.

The factors of all adapters stand side by side, `a [in,A*R]` and `b [A*R,out]`.
A token multiplies with all of them and keeps, of the A*R numbers in between,
those of its own adapter: more products than needed, but of matrices that are
read once for all tokens and are small beside the model's.

Source: the problem is that of Punica (Chen et al., arXiv 2310.18547).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.vma import match_primal
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.lora import LINEARS, Adapter
from jaxchunk.models.quantized import Matrix
from jaxchunk.models.tape import Tape, low_rank_parts
from jaxchunk.models.transformer import Transformer

Factors = Mapping[str, tuple[Array, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterSet:
  """A adapters of rank up to R.

  Attributes:
    stacks: For each position of the window pattern `a [L',in,A*R]` and
      `b [L',A*R,out]`, the scale in it, by the matrix's name.
    owners: Whose each of the A*R columns is.
  """

  stacks: tuple[Factors, ...]
  owners: Int[Array, " AR"]

  def layer(self, position: int, index: Int[Array, ""] | int) -> Factors:
    """Of one layer."""
    return jax.tree.map(
      lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False),
      self.stacks[position],
    )


def chosen(
  owners: Int[Array, " AR"], numbers: Int[Array, " T"]
) -> Float[Array, "T AR"]:
  """1 where a column is of the token's adapter; a token of -1 has none."""
  return (numbers[:, None] == owners[None]).astype(jnp.float32)


class SelectedAdapters(Tape):
  """Adds each token's own adapter to products; nothing is differentiated.

  Args:
    factors: Of the layer.
    selected: As `chosen` gives it, for the row's tokens.
  """

  def __init__(self, factors: Factors, selected: Float[Array, "T AR"]):
    super().__init__()
    self._factors, self._selected = factors, selected

  def product(
    self,
    name: str,
    spec: str,
    x: Array,
    w: Matrix,
    *,
    keep: bool = True,
    like: Array | None = None,
  ) -> Array:
    """See `Tape.product`; x is of one row."""
    y = super().product(name, spec, x, w, keep=False, like=like)
    if name not in self._factors:
      return y
    parts = low_rank_parts(spec, w, *self._factors[name])
    h = jnp.einsum(parts.a_spec, x, parts.a.astype(x.dtype))
    h = h * self._selected.astype(x.dtype)[None]
    part = jnp.einsum(parts.b_spec, h, parts.b.astype(x.dtype))
    return y + (part if like is None else match_primal(part, like))


def adapter_set(
  cfg: ModelConfig, models: Mapping[str, Transformer]
) -> AdapterSet | None:
  """Puts the adapters of several models beside each other.

  Args:
    cfg: Of the model that they were trained beside.
    models: With adapters, by name.

  Returns:
    The adapters, numbered in the order of the names; `None` if there are none.

  Raises:
    ValueError: A model has none, or one that differs from `cfg` in more than
      its adapters, or adapters that scale columns (DoRA).
  """
  if not models:
    return None
  for name, model in models.items():
    lora = model.cfg.lora
    if lora is None:
      raise ValueError(f"adapter {name!r}: the model has no adapters")
    if dataclasses.replace(model.cfg, lora=None) != cfg:
      raise ValueError(f"adapter {name!r} is beside a model of another form")
    if lora.dora:
      raise ValueError(
        f"adapter {name!r} is a DoRA, which scales the model's own columns and "
        "so cannot be one of several; merge_lora it into a model of its own"
      )
  rank = max(model.cfg.lora.rank for model in models.values() if model.cfg.lora)
  every = list(models.values())
  stacks = tuple(
    {
      name: factors
      for name in LINEARS
      if (factors := _side_by_side(every, position, name, rank)) is not None
    }
    for position in range(len(cfg.window_pattern))
  )
  owners = jnp.repeat(jnp.arange(len(every), dtype=jnp.int32), rank)
  return AdapterSet(stacks, owners)


def _side_by_side(
  models: Sequence[Transformer], position: int, name: str, rank: int
) -> tuple[Array, Array] | None:
  found = []
  for model in models:
    linear = getattr(model.blocks[position], name, None)
    adapter = None if linear is None else linear.adapter
    found.append(None if adapter is None else _padded(adapter, rank))
  shapes = next((pair for pair in found if pair is not None), None)
  if shapes is None:
    return None
  nothing = jax.tree.map(jnp.zeros_like, shapes)
  pairs = [nothing if pair is None else pair for pair in found]
  a = jnp.concatenate([pair[0] for pair in pairs], axis=2)
  b = jnp.concatenate([pair[1] for pair in pairs], axis=1)
  return a, b


def _padded(adapter: Adapter, rank: int) -> tuple[Array, Array]:
  a, b = adapter.a[...], adapter.b[...] * adapter.scale
  short = rank - a.shape[2]
  return (
    jnp.pad(a, ((0, 0), (0, 0), (0, short))),
    jnp.pad(b, ((0, 0), (0, short), (0, 0))),
  )
