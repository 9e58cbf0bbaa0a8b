"""Stages: what waits and what is kept, until a pipeline is simulated.

`pipeline_seconds` is the one place that says how long stages take.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jaxchunk.sharding.pipeline.slots import sizes_of
from jaxchunk.sharding.pipeline.table import Lanes
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
# What is laid out to count slots: chunks of the longest lane at most, and lanes
# of one chunk behind it for each stage.
_LONGEST = 16
_BEHIND = 2


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
def slots_of(schedule: Schedule, stages: int, chunks: int, live: int) -> Slots:
  """What a device keeps of the longest lane with shorter ones behind it.

  Counted in the schedule's table; of a lane of more than 16 chunks in that of
  16, and the room for its keys in proportion.

  Args:
    schedule: By which they run.
    stages: P.
    chunks: Of the longest lane.
    live: K.
  """
  laid = min(chunks, _LONGEST)
  lanes = Lanes((laid, *[1] * (_BEHIND * stages)), live)
  table = build(schedule, stages, lanes)
  sizes, longer = sizes_of(table), chunks / laid
  return Slots(
    inbox=sizes.inbox,
    kept=sizes.kept,
    owed=sizes.owed,
    keys=sizes.state * longer,
    gradients=sizes.cotangent * longer,
    parts=table.placement.parts,
  )
