"""What the operations of a pipeline table do to chunks.

`ChunkOps` implements `sharding.pipeline.executor.StageOps` for a run of layers:
slots hold what backward passes read, arenas the sequence states of the lanes
under way, and gradients are added up at once.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxchunk.chunking import split
from jaxchunk.chunking.chunk import Chunk, Lane, chunk_of
from jaxchunk.chunking.ops import Slots, Stage, States
from jaxchunk.chunking.staging import Staging
from jaxchunk.kernels.state import ChunkPlace, KVPrefix
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.pipeline.executor import Row
from jaxchunk.sharding.pipeline.slots import Sizes


class StageState(NamedTuple):
  """What a device keeps between operations.

  Attributes:
    loss: `sum(weights * nll)` of the chunks whose loss this device computed.
    grads: Accumulators in the order of `trainable`.
    slots: What backward passes read.
    owed: What gradients of matrices read besides, if those wait.
    states: Arenas of keys and values.
    cotangents: Arenas of their gradients.
    ids: Segment ids of the arena of keys and values.
  """

  loss: Float[Array, ""]
  grads: list[Array]
  slots: Slots
  owed: split.Owed
  states: States
  cotangents: States
  ids: Int[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class ChunkOps:
  """Operations on the chunks of a batch, on one device.

  Attributes:
    stage: What runs; its states are arenas.
    staging: Which layers each virtual stage has.
    model: The parameters, stage by stage.
    lane: All chunks of the batch, in the order of the table's items.
    everywhere: Whether embedding and head are over all stages.
    split: Whether gradients of matrices wait for `W`.
    drops: Whether some forward passes keep nothing, and need a slot for that.
    rng: Key for dropout.
    axis: The mesh axis of the stages.
  """

  stage: Stage
  staging: Staging
  model: Transformer
  lane: Lane
  everywhere: bool = False
  split: bool = False
  drops: bool = True
  rng: PRNGKeyArray | None = None
  axis: str = "stage"

  def init(
    self, sizes: Sizes, totals: tuple[Array, list[Array]], *like: Any
  ) -> StageState:
    """Empty slots and arenas.

    Args:
      sizes: How many.
      totals: Loss and gradients so far.
      *like: Arrays that vary over the stages.
    """
    stage, model, lane = self.stage, self.model, self.lane
    batch, size = lane.tokens.shape[0], stage.chunk_size
    rows = sizes.state * size
    states = stage.init_states(model, batch, rows)
    cotangents = []
    for position, spec in enumerate(stage.states):
      assert isinstance(spec, KVPrefix)
      layers = stage.layers_of(model, position)
      cotangents.append(
        spec.init_cotangent(layers, batch, sizes.cotangent * size)
      )
    ids = jnp.zeros((batch, rows), jnp.int32)
    ids, loss, grads = vary_like((ids, *totals), lane, *like)
    here = self._chunk(ids, 0, jnp.zeros((), jnp.int32))
    here = vary_like(here, lane, *like)
    slots = stage.init_slots(model, here, sizes.kept + self.drops)
    owed: split.Owed = ()
    if self.split:
      owed = split.init_owed(stage, model, here, slots, sizes.owed)
    slots, owed = vary_like((slots, owed), lane, *like)
    states, kv_grads = vary_like(
      (states, tuple(cotangents)), model, lane, *like
    )
    return StageState(loss, grads, slots, owed, states, kv_grads, ids)

  def open(self, state: StageState, row: Row) -> Float[Array, "B C D"]:
    """See `StageOps`."""
    tokens = self._cut(row.open_item).tokens
    return self.stage.shards.embed(self.model, self.stage.trainable, tokens)

  def forward(
    self, state: StageState, x: Float[Array, "B C D"], row: Row
  ) -> tuple[StageState, Float[Array, "B C D"]]:
    """See `StageOps`."""
    chunk = self._placed(state.ids, row)
    place = chunk.place
    ids = lax.dynamic_update_slice_in_dim(
      state.ids, place.segment_ids, place.start, 1
    )
    place = dataclasses.replace(place, lane_segment_ids=ids)
    chunk = dataclasses.replace(chunk, place=place)
    span = self.staging.span(row.stage)
    y, states, slots = self.stage.forward_layers(
      self.model, span, chunk, x, state.states, state.slots, row.kept
    )
    assert slots is not None
    return state._replace(states=states, slots=slots, ids=ids), y

  def close(
    self, state: StageState, y: Float[Array, "B C D"], row: Row
  ) -> tuple[StageState, Float[Array, "B C D"]]:
    """See `StageOps`."""
    chunk = self._cut(row.close_item)
    if not self.everywhere:
      part, dy, grads = self.stage.head_gradient(
        self.model, chunk, y, state.grads
      )
      loss = state.loss + part.astype(state.loss.dtype)
      return state._replace(loss=loss, grads=grads), dy
    last = self.staging.placement.device_of[-1]
    y, mine = self._from_device(y, last)
    part, dy, grads = self.stage.head_gradient(
      self.model, chunk, y, state.grads
    )
    # The same on all stages: it counts on one.
    grads = self.stage.trainable.where_final_norm(mine, grads, state.grads)
    part = jnp.where(mine, part, 0).astype(state.loss.dtype)
    return state._replace(loss=state.loss + part, grads=grads), dy

  def backward(
    self, state: StageState, dy: Float[Array, "B C D"], row: Row
  ) -> tuple[StageState, Float[Array, "B C D"]]:
    """See `StageOps`."""
    chunk = self._placed(state.ids, row)
    span = self.staging.span(row.stage)
    cotangents = self._cleared(state.cotangents, row)
    before = (
      *(self.model, span, chunk, dy, state.states, cotangents),
      *(state.slots, row.kept, state.grads),
    )
    owed = state.owed
    if self.split:
      dx, cotangents, grads, owed = split.backward_layers(
        self.stage, *before, owed, row.owed
      )
    else:
      dx, cotangents, grads = self.stage.backward_layers(*before)
    state = state._replace(cotangents=cotangents, grads=grads, owed=owed)
    return state, dx

  def open_back(
    self, state: StageState, dx: Float[Array, "B C D"], row: Row
  ) -> StageState:
    """See `StageOps`."""
    chunk = self._cut(row.back_item)
    if self.everywhere:
      dx, _ = self._from_device(dx, self.staging.placement.device_of[0])
    grads = self.stage.add_embedding(state.grads, self.model, chunk, dx)
    return state._replace(grads=grads)

  def weights(self, state: StageState, row: Row) -> StageState:
    """See `StageOps`."""
    grads = split.weight_layers(
      self.stage,
      self.model,
      self.staging.span(row.stage),
      self._placed(state.ids, row),
      state.slots,
      row.kept,
      state.grads,
      state.owed,
      row.owed,
    )
    return state._replace(grads=grads)

  def update(self, state: StageState, batch: Int[Array, ""]) -> StageState:
    """See `StageOps`; weights do not change here."""
    raise NotImplementedError(
      "ChunkOps runs one batch; see chunking/delayed.py"
    )

  def _cleared(self, cotangents: States, row: Row) -> States:
    """With zeros where a lane begins its backward pass."""
    size = self.stage.chunk_size

    def clear(number: Any, cotangents: States) -> States:
      start = (row.cotangent + number) * size

      def one(g: Array) -> Array:
        shape = (*g.shape[:3], size, g.shape[4])
        zeros = vary_like(jnp.zeros(shape, g.dtype), g)
        return lax.dynamic_update_slice_in_dim(g, zeros, start, 3)

      return jax.tree.map(one, cotangents)

    return lax.fori_loop(0, row.fresh, clear, cotangents)

  def _from_device(self, x: Array, device: int) -> tuple[Array, Array]:
    """What one device of the axis has, on all; and whether this is it."""
    mine = lax.axis_index(self.axis) == device
    return lax.psum(jnp.where(mine, x, 0), self.axis), mine

  def _cut(self, item: Any) -> Chunk:
    """A chunk of the batch that needs no place."""
    return chunk_of(self.model, self.lane, item, self.stage.chunk_size)

  def _placed(self, ids: Int[Array, "B S"], row: Row) -> Chunk:
    """The row's chunk, with its place in the arenas."""
    here = self._chunk(ids, row.item, row.part)
    size = self.stage.chunk_size
    place = dataclasses.replace(
      here.place,
      index=row.place,
      start=(row.state + row.place) * size,
      cotangent_start=(row.cotangent + row.place) * size,
    )
    return dataclasses.replace(here, place=place)

  def _chunk(self, ids: Int[Array, "B S"], item: Any, part: Any) -> Chunk:
    """A chunk whose segments are told apart from other stages' in the arena."""
    size = self.stage.chunk_size
    here = chunk_of(self.model, self.lane, item, size, self.rng)
    own = here.place.segment_ids
    own = jnp.where(own > 0, own * self.staging.placement.parts + part, 0)
    place = ChunkPlace(
      here.place.index, here.place.start, own, ids, here.place.start
    )
    return dataclasses.replace(here, place=place)
