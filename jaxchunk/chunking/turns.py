"""Which group of devices runs which lane, and when.

A turn gives each group of a layout one lane, or none. Groups do not wait for
each other, unless they gather parameters together: such a team takes its lanes
side by side, and runs as many chunks as the longest of them has.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxchunk.chunking.balance import (
  longest_processing_time,
  placement_problem,
)
from jaxchunk.chunking.balance_cost import CostModel
from jaxchunk.chunking.balance_hybrid import hybrid_placement
from jaxchunk.chunking.balance_program import flexible_placement
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.lanes import LaneArrays, capacity_chunks, pad_lane
from jaxchunk.chunking.plan import ChunkPlan
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.schemes import Ring, device_order

GROUPS = ("data", "fsdp", "expert")
"""The mesh axes along which devices have lanes of their own."""

SEQUENCE = "context"
"""The mesh axis whose devices share a lane."""

_STRIPED = Ring(order="striped")


@dataclasses.dataclass(frozen=True)
class Turn:
  """What the groups run next.

  Attributes:
    context: Devices of a group, which share its lane.
    lanes: The lane of each group; `None` is a chunk of padding.
    counts: How many chunks each group runs.
  """

  context: int
  lanes: tuple[int | None, ...]
  counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid:
  """Each lane on as few devices as hold it: data and context are one axis.

  Groups of all sizes that the cost model knows run in one step, of a layout
  whose devices all have whole parameters. Source: ByteScale's Hybrid Data
  Parallelism (arXiv 2502.21231), FlexSP (arXiv 2412.01523).

  Attributes:
    tokens_per_device: Of a lane's capacity that a device has room for.
    cost: What a lane takes on a group, `fit_cost(timings_over(...))`.
    program: Whether an integer program looks for something better; its answer
      depends on the clock, so only where one process plans for all.
  """

  tokens_per_device: int
  cost: CostModel
  program: bool = False


def make_turns(
  layout: Layout,
  lockstep: Iterable[str],
  costs: Sequence[int],
  chunks: Sequence[int],
) -> list[Turn]:
  """Deals lanes out to the groups of a layout, the costliest first.

  Args:
    layout: The groups.
    lockstep: Mesh axes along which groups are a team.
    costs: Of each lane.
    chunks: How many each lane has.

  Returns:
    The turns, each lane in one of them.
  """
  teams = _teams(layout, frozenset(lockstep))
  size = len(teams[0])
  order = sorted(range(len(costs)), key=lambda n: -costs[n])
  rows = [order[n : n + size] for n in range(0, len(order), size)]
  dealt = longest_processing_time(
    [max(costs[n] for n in row) for row in rows], len(teams)
  )
  turns = []
  for number in range(max(map(len, dealt))):
    lanes: list[int | None] = [None] * sum(map(len, teams))
    counts = [1] * len(lanes)
    for team, mine in zip(teams, dealt, strict=True):
      if number < len(mine):
        row = rows[mine[number]]
        for group, lane in zip(team, row, strict=False):
          lanes[group] = lane
        for group in team:
          counts[group] = max(chunks[n] for n in row)
    turns.append(Turn(layout.context, tuple(lanes), tuple(counts)))
  return turns


def hybrid_turns(
  layout: Layout, plan: ChunkPlan, hybrid: Hybrid, cfg: ModelConfig
) -> list[Turn]:
  """Turns whose groups are as large as their lanes need.

  Args:
    layout: The devices of "data" and "context".
    plan: The lanes.
    hybrid: What they take.
    cfg: The model, for its windows.

  Raises:
    ValueError: A lane fits on no group; names what would hold it.
  """
  problem = placement_problem(
    plan,
    hybrid.cost,
    devices=layout.data * layout.context,
    tokens_per_device=hybrid.tokens_per_device,
    windows=cfg.window_pattern,
  )
  find = flexible_placement if hybrid.program else hybrid_placement
  turns = []
  for turn in find(problem).turns:
    chunks = [1 if n is None else plan.lanes[n].num_chunks for n in turn.lanes]
    turns.append(Turn(turn.degree, turn.lanes, tuple(chunks)))
  return turns


def _teams(layout: Layout, lockstep: frozenset[str]) -> list[list[int]]:
  """The groups of each team, numbered in the order of the mesh."""
  sizes = [getattr(layout, axis) for axis in GROUPS]
  together = [n for n, axis in enumerate(GROUPS) if axis in lockstep]
  apart = [n for n in range(len(GROUPS)) if n not in together]
  grid = np.arange(math.prod(sizes)).reshape(sizes)
  rows = grid.transpose(apart + together)
  return rows.reshape(-1, math.prod(sizes[n] for n in together)).tolist()


def place(
  model: Transformer,
  turn: Turn,
  lanes: Sequence[LaneArrays],
  chunk_size: int,
  mesh: Mesh,
  chunks: int = 1,
) -> tuple[Lane, Array]:
  """A turn's lanes on the devices, in the room of the longest.

  Args:
    model: The model.
    turn: The turn.
    lanes: All of the batch.
    chunk_size: C.
    mesh: Where to.
    chunks: The least room.

  Returns:
    The lanes, a row for each group, and how many chunks each group runs.
  """
  length = capacity_chunks(max(*turn.counts, chunks)) * chunk_size
  order = device_order(length, mesh.shape[SEQUENCE], _STRIPED)
  wide = np.dtype(jnp.promote_types(model.cfg.dtype, jnp.float32))
  spec, by_group = lane_specs()

  def field(name: str) -> Array:
    dtype = wide if name == "weights" else np.dtype(np.int32)
    whole = np.zeros((len(turn.lanes), length), dtype)
    for row, lane in zip(whole, turn.lanes, strict=True):
      if lane is not None:
        row[:] = getattr(pad_lane(lanes[lane], length), name)
    return put(whole[:, order], NamedSharding(mesh, spec))

  names = [field.name for field in dataclasses.fields(Lane)]
  counts = np.asarray(turn.counts, np.int32)
  placed = Lane(**{name: field(name) for name in names})
  return placed, put(counts, NamedSharding(mesh, by_group))


def lane_specs() -> tuple[PartitionSpec, PartitionSpec]:
  """How lanes and the numbers of their chunks are split."""
  return PartitionSpec(GROUPS, SEQUENCE), PartitionSpec(GROUPS)


def put(whole: np.ndarray[Any, Any], sharding: NamedSharding) -> Array:
  """An array that every process has, each putting what its devices need."""
  # On purpose; jax takes the callback's result for an accident.
  with jax.transfer_guard_host_to_device("allow"):
    return jax.make_array_from_callback(
      whole.shape, sharding, whole.__getitem__
    )
