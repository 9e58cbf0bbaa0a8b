"""Sequences laid out as planned, and nothing lost."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchunk.chunking.lanes import (
  LaneArrays,
  capacity_chunks,
  pack_lanes,
  pad_lane,
)
from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.types import Example

ARRAYS = [f.name for f in dataclasses.fields(LaneArrays)][:-1]


def make(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Example(
      tokens=rng.integers(1, 99, n).astype(np.int32),
      targets=rng.integers(1, 99, n).astype(np.int32),
      weights=rng.uniform(1, 2, n).astype(np.float32),
      document_id=1000 + i,
      positions=(5 + 2 * np.arange(n)).astype(np.int32) if i % 3 == 0 else None,
    )
    for i, n in enumerate(lengths)
  ]


@pytest.mark.fast
@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 16))
@example([20, 9, 3], 8)  # Two long ones in one lane, then a short one.
def test_sequences_come_back(lengths, chunk_size):
  examples = make(lengths)
  plan = chunk_plan(lengths, chunk_size)
  lanes = pack_lanes(examples, plan)
  assert len(lanes) == len(plan.lanes)
  found = []
  for packed, lane in zip(lanes, plan.lanes, strict=True):
    assert packed.num_chunks == lane.num_chunks
    for name in ARRAYS:
      array = getattr(packed, name)
      assert array.shape == (lane.num_chunks * chunk_size,)
      assert array.dtype == (np.float32 if name == "weights" else np.int32)
      assert not array[packed.segment_ids == 0].any()
    used = packed.segment_ids[packed.segment_ids > 0]
    assert (np.diff(used) >= 0).all()
    assert np.unique(used).tolist() == list(range(1, len(lane.sequences) + 1))
    for segment in np.unique(used):
      here = packed.segment_ids == segment
      (document,) = set(packed.document_ids[here].tolist())
      example = examples[document - 1000]
      found.append(document - 1000)
      for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(
          getattr(packed, name)[here], getattr(example, name)
        )
      positions = example.positions
      if positions is None:
        positions = np.arange(len(example))
      np.testing.assert_array_equal(packed.positions[here], positions)
  assert sorted(found) == list(range(len(lengths)))


@pytest.mark.fast
def test_padding_to_capacity():
  (lane,) = pack_lanes(make([5]), chunk_plan([5], 2))
  padded = pad_lane(lane, 2 * capacity_chunks(lane.num_chunks))
  assert padded.num_chunks == lane.num_chunks == 3
  for name in ARRAYS:
    before, after = getattr(lane, name), getattr(padded, name)
    assert after.shape == (8,) and after.dtype == before.dtype
    np.testing.assert_array_equal(after[:6], before)
    assert not after[6:].any()
  assert pad_lane(lane, 6) is lane
  with pytest.raises(ValueError, match=r"capacity_tokens=4 .* 6 tokens"):
    pad_lane(lane, 4)


def test_capacity_is_the_next_power_of_two():
  got = [capacity_chunks(n) for n in (1, 2, 3, 4, 5, 8, 9, 1000)]
  assert got == [1, 2, 4, 4, 8, 8, 16, 1024]
  with pytest.raises(ValueError, match="at least 1, got 0"):
    capacity_chunks(0)


def test_a_plan_of_other_sequences_raises():
  with pytest.raises(ValueError, match=r"plan is for 2 sequences.* has 1"):
    pack_lanes(make([3]), chunk_plan([3, 4], 8))
  with pytest.raises(ValueError, match=r"examples\[1\] has 5 tokens.* 4"):
    pack_lanes(make([3, 5]), chunk_plan([3, 4], 8))
