"""What a layout has each device keep, gather and send of a model."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxchunk.chunking.chunk import Lane, chunk_of
from jaxchunk.chunking.executor import make_options
from jaxchunk.chunking.gradient import abstract_lane
from jaxchunk.chunking.ops import Keep
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.trainable import Trainable
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.planner.candidates import Candidate, Request, config_of
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import axis_names
from jaxchunk.training import fits, initial


class Pair(NamedTuple):
  """Bytes of some parameters, and of their gradients in fp32."""

  weights: float
  gradients: float

  @property
  def both(self) -> float:
    """Their sum."""
    return self.weights + self.gradients

  def scaled(self, factor: float) -> "Pair":
    """Both times a factor."""
    return Pair(self.weights * factor, self.gradients * factor)


class Kept(NamedTuple):
  """Bytes of a device, as a layout splits a model.

  Attributes:
    stored: Parameters, trained and frozen, and gradients in their parts.
    used: As programs have them at the most: whole but for "tensor".
    updated: Gradients as the update takes them: once in all copies.
    updated_head: Of these the head's.
    updated_embedding: The embedding's, if it is another array.
    optimizer: Its state on the device.
    optimizer_host: Its state in host memory.
    layer: The largest layer as it is used.
    head: The head, likewise.
    gathered_layer: Of that, what is gathered first.
    gathered_head: Of the head, likewise; nothing if it is whole.
    sent_layers: What a device sends to gather all layers once, and to scatter
      their gradients.
    sent_head: Likewise.
    shared: Devices that gather together.
    copies: Whether several devices have the same parameters, of which each
      updates a part.
  """

  stored: Pair
  used: Pair
  updated: float
  updated_head: float
  updated_embedding: float
  optimizer: float
  optimizer_host: float
  layer: Pair
  head: Pair
  gathered_layer: Pair
  gathered_head: Pair
  sent_layers: Pair
  sent_head: Pair
  shared: int
  copies: bool


_NOTHING = Pair(0, 0)


class _Leaves(NamedTuple):
  """Some parameters on a device, and of layers the largest of them."""

  stored: Pair
  used: Pair
  updated: float
  largest: Pair

  @classmethod
  def of(
    cls, model: Transformer, trainable: Trainable, layout: Layout
  ) -> "tuple[_Leaves, _Leaves, _Leaves]":
    """The layers, the head, and the rest."""
    stored = Shards.of(model, layout)
    whole = stored.gathered()
    found: dict[Any, list[tuple[Pair, Pair, float]]] = {}
    for n, leaf in enumerate(jax.tree.leaves(model)):
      wide = jnp.promote_types(leaf.dtype, jnp.float32).itemsize
      wide *= trainable.chosen[n]
      sizes = [
        _on_device(layout, spec, leaf.size)
        for spec in (
          stored.spec(n),
          whole.spec(n),
          layout.spread(stored.spec(n), leaf.shape),
        )
      ]
      item = _item(leaf.dtype)
      own, used = (Pair(size * item, size * wide) for size in sizes[:2])
      path = trainable.paths[n]
      name: Any = "rest"
      if path[0] == "blocks":
        name = path[1]
      elif n == trainable.unembed_leaf:
        name = "head"
      found.setdefault(name, []).append((own, used, sizes[2] * wide))
    positions = [name for name in found if isinstance(name, int)]
    layers = [one for position in positions for one in found[position]]
    each = [
      # A stage has its own layers alone.
      _sum(one[1] for one in found[position]).scaled(
        layout.stage / model.cfg.layers_of(position)
      )
      for position in positions
    ]
    return (
      cls._added(layers, max(each, key=lambda pair: pair.both)),
      cls._added(found.get("head", [])),
      cls._added(found.get("rest", [])),
    )

  @classmethod
  def _added(
    cls, found: Sequence[tuple[Pair, Pair, float]], largest: Pair = _NOTHING
  ) -> "_Leaves":
    return cls(
      _sum(one[0] for one in found),
      _sum(one[1] for one in found),
      sum(one[2] for one in found),
      largest,
    )


def _sum(pairs: Iterable[Pair]) -> Pair:
  weights, gradients = 0.0, 0.0
  for pair in pairs:
    weights, gradients = weights + pair.weights, gradients + pair.gradients
  return Pair(weights, gradients)


def _on_device(layout: Layout, spec: PartitionSpec, size: int) -> float:
  names = [name for split in spec for name in axis_names(split)]
  return size / math.prod(layout.shape[name] for name in names)


def _item(dtype: Any) -> float:
  """Bytes of a number; two of four bits share one."""
  return 0.5 if dtype == jnp.uint4 else dtype.itemsize


class Model:
  """The parameters of a request, as shapes; looked at once."""

  def __init__(self, request: Request):
    self.request = request
    graphdef, *states = initial.abstract_model(request.model)
    self.model: Transformer = nnx.merge(graphdef, *states)
    kind = initial.trainable(request.model)
    self.trainable = Trainable.of(self.model, kind)

  def kept(self, layout: Layout) -> Kept:
    """Of a layout; each of its stages has as many layers as the others."""
    layers, head, rest = _Leaves.of(self.model, self.trainable, layout)
    one = Candidate(layout=layout, strategy="chunk_outer", chunk_size=1024)
    optimizer, host = fits.optimizer_bytes(config_of(self.request, one))
    split = layout.gather == "layer" and layout.splits("embed")
    shared = layout.fsdp
    if "context" in layout.rules["embed"]:
      shared *= layout.context
    share = (shared - 1) / shared
    return Kept(
      stored=_sum([layers.stored, head.stored, rest.stored]),
      updated=layers.updated + head.updated + rest.updated,
      updated_head=head.updated,
      updated_embedding=rest.updated,
      optimizer=optimizer,
      optimizer_host=host,
      used=_sum([layers.used, head.used, rest.used]),
      layer=layers.largest,
      head=head.used,
      gathered_layer=layers.largest.scaled(split),
      gathered_head=head.used.scaled(split),
      sent_layers=layers.used.scaled(share),
      sent_head=head.used.scaled(share),
      shared=shared,
      copies=layout.num_devices > shared * layout.tensor * layout.stage,
    )


def slot_bytes_per_token(cfg: ModelConfig, keep: Keep) -> float:
  """What a live chunk keeps of a token in all layers, by its slot's shapes."""
  size = 128
  model: Transformer = nnx.merge(*initial.abstract_model(cfg))
  kind = initial.trainable(cfg)
  options = make_options(model, chunk_size=size, keep=keep, trainable=kind)
  stage = options.stage(cfg.frozen())
  lane, _ = abstract_lane(model, size, size)

  def slot(model: Transformer, lane: Lane) -> Any:
    return stage.init_slots(model, chunk_of(model, lane, 0, size), 1)

  arrays = jax.tree.leaves(jax.eval_shape(slot, model, lane))
  return sum(a.size * a.dtype.itemsize for a in arrays) / size
