"""Where an engine's arrays are: one device, or several that share the heads."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
  SingleDeviceSharding,
)

from jaxchunk.chunking.layouts import check_heads
from jaxchunk.chunking.shards import Shards
from jaxchunk.inference.step import State
from jaxchunk.models.adapter_set import AdapterSet
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import Rules

_WHOLE, _HEADS = PartitionSpec(), PartitionSpec(None, "tensor")
# Whose inputs, not outputs, are split over the heads or the MLP's width.
_INWARD = ("o", "down")


@dataclasses.dataclass(frozen=True)
class Placement:
  """The devices of one copy of the model.

  Attributes:
    devices: In order.
    mesh: Of several; `None` for one.
    shards: How they split the parameters.
    vocab: The mesh axis that splits embedding and head, if one does.
  """

  devices: tuple[jax.Device, ...]
  mesh: Mesh | None = None
  shards: Shards = dataclasses.field(default_factory=Shards)
  vocab: tuple[str, ...] = ()

  @property
  def everywhere(self) -> Sharding:
    """Of what every device has whole."""
    return self._sharding(_WHOLE)

  def _sharding(self, spec: PartitionSpec) -> Sharding:
    if self.mesh is None:
      return SingleDeviceSharding(self.devices[0])
    return NamedSharding(self.mesh, spec)

  def put_model(self, model: Transformer) -> Transformer:
    """The model, on these devices."""
    leaves, treedef = jax.tree.flatten(model)
    wanted = [self._sharding(self.shards.spec(n)) for n in range(len(leaves))]
    return jax.tree.unflatten(treedef, jax.device_put(leaves, wanted))

  def put_adapters(self, adapters: AdapterSet | None) -> AdapterSet | None:
    """Adapters beside it."""
    if adapters is None:
      return None
    placed: AdapterSet = jax.device_put(
      adapters, jax.tree.map(self._sharding, _adapter_specs(adapters))
    )
    return placed

  def state_shardings(self, state: State) -> State:
    """Of the state, given its shapes."""
    shardings: State = jax.tree.map(self._sharding, _state_specs(state))
    return shardings

  def on_devices(
    self,
    step: Callable[..., Any],
    model: Transformer,
    adapters: AdapterSet | None,
    state: State,
  ) -> Callable[..., Any]:
    """A step in which each device does its part.

    Args:
      step: Of model, adapters, state, packed numbers and extras; gives the
        state and what was drawn.
      model: The model.
      adapters: Those beside it.
      state: Of the step.
    """
    if self.mesh is None:
      return step
    leaves, treedef = jax.tree.flatten(model)
    specs = [self.shards.spec(n) for n in range(len(leaves))]
    states = _state_specs(state)
    beside = None if adapters is None else _adapter_specs(adapters)
    return jax.shard_map(
      step,
      mesh=self.mesh,
      in_specs=(
        jax.tree.unflatten(treedef, specs),
        beside,
        states,
        _WHOLE,
        _WHOLE,
      ),
      out_specs=(states, _WHOLE),
    )


def _state_specs(state: State) -> State:
  specs: State = jax.tree.map(lambda _: _WHOLE, state)
  pages = jax.tree.map(lambda _: _HEADS, state.pages)
  return dataclasses.replace(specs, pages=pages)


def _adapter_specs(adapters: AdapterSet) -> AdapterSet:
  def split(name: str) -> tuple[PartitionSpec, PartitionSpec]:
    if name in _INWARD:
      return PartitionSpec(None, "tensor"), _WHOLE
    return _WHOLE, PartitionSpec(None, None, "tensor")

  stacks: Any = tuple(
    {name: split(name) for name in s} for s in adapters.stacks
  )
  owners: Any = _WHOLE
  return AdapterSet(stacks, owners)


def placements(
  cfg: ModelConfig,
  model: Transformer,
  layout: Layout | None,
  devices: Sequence[jax.Device] | None = None,
) -> list[Placement]:
  """Where each copy of a model goes.

  Args:
    cfg: Of the model.
    model: The model; without a layout it stays where it is.
    layout: `data` copies, each over `tensor` devices.
    devices: Of the layout; by default all.

  Raises:
    ValueError: The layout has other axes, more devices than there are, or
      cannot split the heads; names the nearest that can.
    NotImplementedError: The model is quantized, and would be split.
  """
  if layout is None:
    return [Placement((jax.tree.leaves(model)[0].devices().pop(),))]
  others = {
    name: size
    for name, size in layout.shape.items()
    if size > 1 and name not in ("data", "tensor")
  }
  if others:
    near = Layout(
      data=layout.num_devices // layout.tensor, tensor=layout.tensor
    )
    raise ValueError(
      f"an engine runs over the axes 'data' and 'tensor', not {others}; the "
      f"nearest layout is {near}"
    )
  check_heads(layout, cfg)
  devices = list(jax.devices() if devices is None else devices)
  if len(devices) < layout.num_devices:
    raise ValueError(
      f"{layout} takes {layout.num_devices} devices and there are "
      f"{len(devices)}; the nearest layout is {layout.nearest(len(devices))}"
    )
  size = layout.tensor
  groups = [
    tuple(devices[n * size : (n + 1) * size]) for n in range(layout.data)
  ]
  if size == 1:
    return [Placement(group) for group in groups]
  even = cfg.vocab_size % size == 0
  rules = Rules() if even else Rules({"vocab": None})
  one = Layout(tensor=size, rules=rules)
  shards = Shards.of(model, one)
  vocab = ("tensor",) if even else ()
  return [Placement(g, one.mesh(g), shards, vocab) for g in groups]
