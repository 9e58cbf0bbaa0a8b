"""Parameters of which each device holds a part, inside a `jax.shard_map`.

An axis of a parameter is split in one of two ways. Along "tensor" the parts
are used as they are: heads, the MLP's width, the vocabulary; along "stage" too:
layers, the vocabulary. Along the others
(FSDP) a parameter is gathered where it is used, a layer at a time, and its
gradient is added up and scattered where it was computed; of embeddings the
tokens travel instead.

Source: ZeRO (arXiv 1910.02054), stage 3; Megatron-LM (arXiv 1909.08053).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxchunk.chunking.trainable import Trainable
from jaxchunk.kernels.cross_entropy.xla import own_labels
from jaxchunk.models.axes import PARAMETER_AXES, parameter_axes
from jaxchunk.models.transformer import Block, Transformer, layer_of
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import axis_names, split_by

_USED_IN_PARTS = ("stage", "tensor", "expert")


@dataclasses.dataclass(frozen=True)
class Shards:
  """How the parameters of a model are split; by default they are whole.

  Attributes:
    specs: Of every leaf of the model, in order, without axes of one device.
  """

  specs: tuple[PartitionSpec, ...] = ()

  @classmethod
  def of(cls, model: Transformer, layout: Layout) -> "Shards":
    """How a layout splits a model where its parameters are kept.

    Raises:
      ValueError: A parameter cannot be split evenly; names it.
      NotImplementedError: The model is quantized, and would be split.
    """
    if not layout.splits(*PARAMETER_AXES):
      return cls()
    paths = nnx.to_flat_state(nnx.state(model)).paths
    leaves = jax.tree.leaves(model)
    known = zip(paths, parameter_axes(model), leaves, strict=True)
    return cls(
      tuple(
        layout.spec(axes, leaf.shape, "/".join(map(str, path)))
        for path, axes, leaf in known
      )
    )

  def gathered(self) -> "Shards":
    """As they are where all that can be gathered is."""
    if not self.gathers:
      return self
    return Shards(tuple(map(_without_gathered, self.specs)))

  def spec(self, leaf: int) -> PartitionSpec:
    """Of a leaf of the model."""
    return self.specs[leaf] if self.specs else PartitionSpec()

  def gathered_bytes(
    self, model: Transformer, trainable: Trainable, layout: Layout
  ) -> dict[str, int]:
    """Bytes of a device that gathering takes beside the parts that are kept.

    Gathered parameters and, of those that are trained, fp32 gradients.

    Args:
      model: The model, real or abstract.
      trainable: What has gradients.
      layout: Of the devices.

    Returns:
      By what `Layout.gather` may be: "layer" the largest layer or the head,
      "step" all parameters.
    """
    whole = self.gathered()
    groups: dict[Any, int] = {}
    for n, (path, leaf) in enumerate(
      zip(trainable.paths, jax.tree.leaves(model), strict=True)
    ):
      if whole.spec(n) == self.spec(n):
        continue
      names = [name for split in whole.spec(n) for name in axis_names(split)]
      parts = math.prod(layout.shape[name] for name in names)
      wide = jnp.promote_types(leaf.dtype, jnp.float32).itemsize
      item = leaf.dtype.itemsize + (wide if trainable.chosen[n] else 0)
      stack = path[:2] if path[0] == "blocks" else path
      groups[stack] = groups.get(stack, 0) + leaf.size * item // parts
    layers = [
      size // (model.cfg.layers_of(stack[1]) if stack[0] == "blocks" else 1)
      for stack, size in groups.items()
      # Of the embedding tokens travel, unless it is the head too.
      if stack != ("embed",) or trainable.unembed_leaf == trainable.embed_leaf
    ]
    return {
      "layer": max(layers, default=0),
      "step": sum(groups.values()),
    }

  def put(self, model: Transformer, mesh: Mesh) -> Transformer:
    """The model on the devices of a mesh, each with its parts."""
    leaves, treedef = jax.tree.flatten(model)
    places = [NamedSharding(mesh, self.spec(n)) for n in range(len(leaves))]
    return jax.tree.unflatten(treedef, jax.device_put(leaves, places))

  @property
  def lockstep(self) -> frozenset[str]:
    """The mesh axes along which devices gather, or reach experts, together."""
    names = {
      name
      for spec in self.specs
      for split in spec
      for name in axis_names(split)
    }
    return frozenset(names - {"stage", "tensor"})

  @property
  def gathers(self) -> bool:
    """Whether any parameter is gathered where it is used."""
    return any(_gathered(split) for spec in self.specs for split in spec)

  def layer(self, model: Transformer, position: int, index: Any) -> Block:
    """A layer of the stack at one position of the window pattern, whole."""
    block = layer_of(model.blocks[position], index)
    if not self.gathers:
      return block
    named, treedef = jax.tree_util.tree_flatten_with_path(block)
    leaves = [leaf for _, leaf in named]
    start = sum(len(jax.tree.leaves(b)) for b in model.blocks[:position])
    specs = self.specs[start : start + len(leaves)]
    lora = model.cfg.lora
    # As products cast them; DoRA's norms and routers are of what is kept.
    narrow = None if lora is not None and lora.dora else model.cfg.dtype
    whole = [
      gather(a if _is_router(path) else _cast(a, narrow), _inner(spec))
      for (path, a), spec in zip(named, specs, strict=True)
    ]
    return jax.tree.unflatten(treedef, whole)

  def scatter_layer(
    self,
    trainable: Trainable,
    position: int,
    gradients: Sequence[Array | None],
  ) -> list[Array | None]:
    """This device's parts of a layer's gradients, added up over devices."""
    if not self.gathers:
      return list(gradients)
    specs = trainable.under(self.specs, "blocks", position)
    pairs = zip(gradients, specs, strict=True)
    return [
      None if g is None else scatter(g, _inner(spec)) for g, spec in pairs
    ]

  def with_head(self, model: Transformer, trainable: Trainable) -> Transformer:
    """The model with the head's matrix as its rows are used."""
    if not self.gathers:
      return model
    leaves, treedef = jax.tree.flatten(model)
    place = trainable.unembed_leaf
    head = leaves[place].astype(model.cfg.dtype)
    leaves[place] = gather(head, self.specs[place])
    return jax.tree.unflatten(treedef, leaves)

  def scatter_head(self, trainable: Trainable, gradient: Array) -> Array:
    """This device's part of the head's gradient, added up over devices."""
    return scatter(gradient, self.specs[trainable.unembed_leaf])

  def embed(
    self, model: Transformer, trainable: Trainable, tokens: Int[Array, "B C"]
  ) -> Float[Array, "B C D"]:
    """`Transformer.embed_tokens` of this device's tokens.

    The tokens of all go to all, and each device sends back its part of the
    width: as many bytes as there are in the result.
    """
    vocab, width = self._embedding(trainable)
    if not vocab and not width:
      return model.embed_tokens(tokens)
    if width:
      tokens = lax.all_gather(tokens, width)
    rows = take_rows(model.embed[...], tokens, vocab).astype(model.cfg.dtype)
    if width:
      rows = lax.all_to_all(rows, width, 0, 2)
      rows = rows.reshape(*rows.shape[:2], -1)
    return model.scale_embeddings(rows)

  def embedding_rows(
    self,
    model: Transformer,
    trainable: Trainable,
    tokens: Int[Array, "B C"],
    dx: Float[Array, "B C D"],
  ) -> tuple[Int[Array, "*B C"], Float[Array, "*B C D"]]:
    """Rows of this device's part of the embedding, and what to add to them.

    Args:
      model: The parameters.
      trainable: What has gradients.
      tokens: Of this device.
      dx: Cotangent of what `embed` gave for them.
    """
    vocab, width = self._embedding(trainable)
    if width:
      tokens = lax.all_gather(tokens, width)
      parts = dx.reshape(*dx.shape[:2], tokens.shape[0], -1)
      dx = lax.all_to_all(parts, width, 2, 0)
    if vocab:
      tokens, here = own_labels(tokens, model.embed[...].shape[0], vocab)
      dx = jnp.where(here[..., None], dx, 0)
    return tokens, dx

  def _embedding(
    self, trainable: Trainable
  ) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split the vocabulary, and those of the width."""
    if not self.specs:
      return (), ()
    vocab, width = self.specs[trainable.embed_leaf]
    return axis_names(vocab), axis_names(width)


def _is_router(path: tuple[Any, ...]) -> bool:
  return "router" in jax.tree_util.keystr(path)


def _cast(a: Array, dtype: Any) -> Array:
  """A matrix narrower, if it is to be; vectors and narrower ones stay."""
  if (
    dtype is None or a.ndim < 2 or a.dtype.itemsize < jnp.dtype(dtype).itemsize
  ):
    return a
  return a.astype(dtype)


def gather(a: Array, spec: PartitionSpec) -> Array:
  """The array without its splits, but those that are used in parts."""
  for dim, split in enumerate(spec):
    if axes := _gathered(split):
      a = lax.all_gather(a, axes, axis=dim, tiled=True)
  return a


def scatter(a: Array, spec: PartitionSpec) -> Array:
  """The sum over devices of what `gather` gave, each its own part of it."""
  for dim, split in enumerate(spec):
    if axes := _gathered(split):
      a = lax.psum_scatter(a, axes, scatter_dimension=dim, tiled=True)
  return a


def take_rows(
  table: Float[Array, "V D"], tokens: Int[Array, "*B C"], vocab: tuple[str, ...]
) -> Float[Array, "*B C D"]:
  """`table[tokens]`, where the rows may be on other devices.

  Args:
    table: This device's rows.
    tokens: Of the whole vocabulary.
    vocab: The mesh axes that split the rows, if any do.
  """
  if not vocab:
    return table[tokens]
  own, here = own_labels(tokens, table.shape[0], vocab)
  rows = jnp.where(here[..., None], table[own], 0)
  return lax.psum(rows, vocab)


def _gathered(split: Any) -> tuple[str, ...]:
  return tuple(n for n in axis_names(split) if n not in _USED_IN_PARTS)


def _without_gathered(spec: PartitionSpec) -> PartitionSpec:
  kept = [
    tuple(n for n in axis_names(split) if n in _USED_IN_PARTS) for split in spec
  ]
  return PartitionSpec(*map(split_by, kept))


def _inner(spec: PartitionSpec) -> PartitionSpec:
  """Of one layer of a stack."""
  return PartitionSpec(*spec[1:])
