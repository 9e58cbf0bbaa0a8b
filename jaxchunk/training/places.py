"""Where a run's parameters are: on one device, or in parts on many."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import (
  AbstractMesh,
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
)

from jaxchunk.chunking.pipeline import stored_shards
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.training import initial

Tree = Any
"""A nested dictionary of shardings, as parameters are of arrays."""


@dataclasses.dataclass(frozen=True)
class Places:
  """Of a run's arrays.

  Attributes:
    everywhere: What every device has.
    params: What is trained.
    updated: The same while it is updated, and its moments: once in all.
    frozen: The other parameters.
  """

  everywhere: Sharding
  params: Tree
  updated: Tree
  frozen: Tree

  def of(self, path: str, _: tuple[int, ...]) -> Sharding:
    """Of a parameter by its path, such as "blocks/0/q/kernel"."""
    names = [int(n) if n.isdigit() else n for n in path.split("/")]
    for found in (self.params, self.frozen):
      for name in names:
        found = found.get(name) if isinstance(found, dict) else None
      # A quantized matrix is several arrays, which lie together.
      if found is not None:
        return jax.tree.leaves(found)[0]
    return self.everywhere


def places_of(
  model: Transformer, layout: Layout | None, mesh: Mesh | AbstractMesh | None
) -> Places:
  """Where the parameters of a model are.

  Args:
    model: The model, real or abstract.
    layout: What splits them; `None` is one device, the first.
    mesh: Of the layout.

  Raises:
    ValueError: A parameter cannot be split evenly; names it.
    NotImplementedError: The model is quantized, and would be split.
  """
  _, *states = nnx.split(model, initial.trainable(model.cfg), ...)
  params, frozen = map(nnx.to_pure_dict, states)
  if layout is None or mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    same = jax.tree.map(lambda _: one, params)
    return Places(one, same, same, jax.tree.map(lambda _: one, frozen))
  shards = stored_shards(layout, model)
  paths = nnx.to_flat_state(nnx.state(model)).paths
  specs = {path: shards.spec(n) for n, path in enumerate(paths)}

  def spec(path: tuple[Any, ...]) -> PartitionSpec:
    return specs[tuple(key.key for key in path)]

  def keep(path: tuple[Any, ...], _: Any) -> Sharding:
    return NamedSharding(mesh, spec(path))

  def update(path: tuple[Any, ...], leaf: Any) -> Sharding:
    return NamedSharding(mesh, layout.spread(spec(path), leaf.shape))

  by_path = jax.tree_util.tree_map_with_path
  return Places(
    everywhere=NamedSharding(mesh, PartitionSpec()),
    params=by_path(keep, params),
    updated=by_path(update, params),
    frozen=by_path(keep, frozen),
  )
