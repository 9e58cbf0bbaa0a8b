"""Lays sequences out as a plan says, in the arrays that programs take."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32

from jaxchunk.chunking.plan import ChunkPlan, Lane
from jaxchunk.types import Example


@dataclasses.dataclass(frozen=True)
class LaneArrays:
  """One lane on the host; padding is 0 in every array.

  Attributes:
    tokens: Inputs, `[T]`; T is a multiple of the chunk size.
    targets: The token to predict at each position, `[T]`.
    weights: Loss weights, `[T]`.
    segment_ids: 1, 2, ... in the order of the lane's sequences, `[T]`.
    positions: Rotary positions, `[T]`.
    document_ids: Names of the sequences, `[T]`.
    num_chunks: Chunks that hold tokens; capacity beyond them is all padding.
  """

  tokens: Int32[np.ndarray, " T"]
  targets: Int32[np.ndarray, " T"]
  weights: Float[np.ndarray, " T"]
  segment_ids: Int32[np.ndarray, " T"]
  positions: Int32[np.ndarray, " T"]
  document_ids: Int32[np.ndarray, " T"]
  num_chunks: int


def pack_lanes(
  examples: Sequence[Example], plan: ChunkPlan
) -> list[LaneArrays]:
  """Copies sequences to where a plan puts them.

  Args:
    examples: The sequences that were planned, in the same order.
    plan: `chunk_plan` of their lengths.

  Returns:
    The arrays of each of `plan.lanes`, `num_chunks * chunk_size` long.

  Raises:
    ValueError: The plan was made for other lengths.
  """
  if len(examples) != len(plan.lengths):
    raise ValueError(
      f"the plan is for {len(plan.lengths)} sequences, examples has "
      f"{len(examples)}"
    )
  for index, (example, length) in enumerate(
    zip(examples, plan.lengths, strict=True)
  ):
    if len(example) != length:
      raise ValueError(
        f"examples[{index}] has {len(example)} tokens, the plan {length}"
      )
  return [_pack_lane(examples, lane, plan.chunk_size) for lane in plan.lanes]


def pad_lane(lane: LaneArrays, capacity_tokens: int) -> LaneArrays:
  """Appends padding up to `capacity_tokens`; `num_chunks` stays.

  Raises:
    ValueError: The lane is longer than that.
  """
  missing = capacity_tokens - len(lane.tokens)
  if missing < 0:
    raise ValueError(
      f"capacity_tokens={capacity_tokens} is less than the lane's "
      f"{len(lane.tokens)} tokens"
    )
  if not missing:
    return lane

  def pad(array: np.ndarray) -> np.ndarray:
    return np.pad(array, (0, missing))

  return LaneArrays(
    tokens=pad(lane.tokens),
    targets=pad(lane.targets),
    weights=pad(lane.weights),
    segment_ids=pad(lane.segment_ids),
    positions=pad(lane.positions),
    document_ids=pad(lane.document_ids),
    num_chunks=lane.num_chunks,
  )


def capacity_chunks(num_chunks: int) -> int:
  """The least power of two >= `num_chunks`: what a program is compiled for.

  Raises:
    ValueError: `num_chunks` is less than 1.
  """
  if num_chunks < 1:
    raise ValueError(f"num_chunks must be at least 1, got {num_chunks}")
  return 1 << (int(num_chunks) - 1).bit_length()


def _pack_lane(
  examples: Sequence[Example], lane: Lane, chunk_size: int
) -> LaneArrays:
  shape = lane.num_chunks * chunk_size
  weights = np.result_type(*(examples[n].weights for n, _ in lane.sequences))
  arrays = LaneArrays(
    tokens=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    weights=np.zeros(shape, weights),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    document_ids=np.zeros(shape, np.int32),
    num_chunks=lane.num_chunks,
  )
  for segment, (sequence, offset) in enumerate(lane.sequences, 1):
    example = examples[sequence]
    where = slice(offset, offset + len(example))
    arrays.tokens[where] = example.tokens
    arrays.targets[where] = example.targets
    arrays.weights[where] = example.weights
    arrays.segment_ids[where] = segment
    arrays.positions[where] = (
      np.arange(len(example))
      if example.positions is None
      else example.positions
    )
    arrays.document_ids[where] = example.document_id
  return arrays
