"""Stages: how long they take, and what they keep.

`pipeline_seconds` goes by the published bubble, for the thousands of candidates
that are weighed; `simulated_seconds` runs the table in lockstep, as devices do,
for those that are left.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jaxchunk.chunking.cost import (
  attention_flops,
  head_flops_per_token,
  layer_flops_per_token,
)
from jaxchunk.chunking.traces import lanes_under_way
from jaxchunk.models.config import ModelConfig
from jaxchunk.planner.candidates import Candidate
from jaxchunk.sharding.pipeline.simulate import Costs, lockstep
from jaxchunk.sharding.pipeline.slots import sizes_of
from jaxchunk.sharding.pipeline.table import Lanes, Table
from jaxchunk.sharding.pipeline.tables import Schedule, build

# The bubble in times of a chunk's F + B + W on one of P devices, over P - 1,
# where all three take as long: arXiv 2104.04473, 2401.10241, 2405.15362.
_BUBBLES: dict[Schedule, float] = {
  "gpipe": 1,
  "1f1b": 1,
  "1f1b_aligned": 1,
  "interleaved": 1 / 2,
  "zb_h1": 1 / 3,
  "zb_v": 0,
  "v_half": 1 / 2,
  "v_min": 2 / 3,
}
# Chunks of the longest lane at most that are laid out to count slots.
_LONGEST = 16


def pipeline_seconds(
  chunks: Sequence[float], stages: int, schedule: Schedule
) -> float:
  """How long chunks take through a pipeline, by the published bubble.

  Args:
    chunks: Seconds of each, forward and backward, summed over the stages.
    stages: P, devices one after the other.
    schedule: By which they run.

  Returns:
    Seconds until the last is done. The bubble is that of the costliest chunk:
    while a pipeline fills and drains its stages wait for one chunk.
  """
  each = sum(chunks) / stages
  bubble = _BUBBLES[schedule] * (stages - 1) * max(chunks, default=0) / stages
  return each + bubble


def simulated_seconds(
  cfg: ModelConfig, candidate: Candidate, lanes: Sequence[int], flops: float
) -> float:
  """How long lanes take through a pipeline, tick by tick.

  Args:
    cfg: The model.
    candidate: Its schedule, chunk size and layout.
    lanes: Chunks of each lane of a group, in the order in which they run.
    flops: FLOPs a second of a stage's devices.

  Returns:
    Seconds in lockstep. Attention counts what a chunk sees, in products of two
    forward and five backward; the head is on the last stage or on all.
  """
  assert candidate.schedule is not None
  size, stages = candidate.chunk_size, candidate.layout.stage
  token = layer_flops_per_token(cfg) * size / stages
  own = attention_flops(cfg, 0, size) / stages
  more = attention_flops(cfg, size, 2 * size) / stages - own
  costs = Costs(
    f=token + own,
    b=token + 2.5 * own,
    w=token,
    f_prefix=more,
    b_prefix=2.5 * more,
    head=3 * head_flops_per_token(cfg) * size,
    everywhere="stage" in candidate.layout.rules["vocab"],
  )
  table = _table(
    candidate.schedule, stages, tuple(lanes), candidate.live_chunks
  )
  return lockstep(table, costs).makespan / flops


@functools.lru_cache(maxsize=256)
def _table(
  schedule: Schedule, stages: int, lanes: tuple[int, ...], live: int
) -> Table:
  return build(schedule, stages, Lanes(lanes, live))


class Slots(NamedTuple):
  """Chunks that a device has room for, by what is kept of them.

  Attributes:
    inbox: Inputs and cotangents from other stages.
    kept: What a backward pass reads.
    owed: What gradients of weights read.
    keys: Keys and values.
    gradients: Of keys and values.
    parts: Virtual stages of a device; a slot is of one.
  """

  inbox: float
  kept: float
  owed: float
  keys: float
  gradients: float
  parts: int


@functools.cache
def slots_of(
  schedule: Schedule, stages: int, chunks: int, total: int, live: int
) -> Slots:
  """What a device keeps of the longest lanes with shorter ones behind them.

  Counted in the schedule's table; of a lane of more than 16 chunks in that of
  16, and the room for its keys in proportion.

  Args:
    schedule: By which they run.
    stages: P.
    chunks: Of the longest lane.
    total: Of all of a group's lanes in a batch.
    live: K.
  """
  laid = min(chunks, _LONGEST)
  sizes = lanes_under_way(laid, total * laid // chunks, stages)
  lanes = Lanes(sizes, live)
  table = _table(schedule, stages, lanes.sizes, live)
  slots, longer = sizes_of(table), chunks / laid
  # Inputs of dropped chunks stay; what nobody reads has a slot, too.
  drops = not all(lanes.kept)
  return Slots(
    inbox=slots.inbox * (longer if drops else 1) + 1,
    kept=slots.kept + drops,
    owed=slots.owed,
    keys=slots.state * longer,
    gradients=slots.cotangent * longer,
    parts=table.placement.parts,
  )
