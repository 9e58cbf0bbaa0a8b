"""Properties of the plan, and lanes packed after it."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.plan import Piece, chunk_plan

LENGTHS = st.lists(st.integers(1, 70), max_size=40)
CHUNK_SIZES = st.integers(1, 24)
# Nothing depends on the clock of a shared machine.
relaxed = settings(deadline=None)


def chunks_of(tokens, chunk_size):
  return -(-tokens // chunk_size)


def longest_lane(lengths, chunk_size):
  """The chunks that the longest sequence is compiled for."""
  return capacity_chunks(max(chunks_of(n, chunk_size) for n in lengths))


def best_fit_without_mergers(lengths, chunk_size):
  """Chunks needed if sequences only share the last chunk of a lane.

  The same heuristic, looked at from the lanes and without its shortcuts: every
  sequence joins the lane that is left with the shortest tail, if that saves a
  chunk and the lane does not get too long.
  """
  rest = {n: (n - 1) % chunk_size + 1 for n in lengths}
  lanes = []
  for n in sorted(lengths, key=lambda n: (-rest[n], -n)):
    fits = [
      lane
      for lane in lanes
      if chunks_of(lane + n, chunk_size)
      < chunks_of(lane, chunk_size) + chunks_of(n, chunk_size)
      and chunks_of(lane + n, chunk_size) <= longest_lane(lengths, chunk_size)
    ]
    best = min(fits, key=lambda x: (-(x + n) % chunk_size, x), default=0)
    if best:
      lanes.remove(best)
    lanes.append(best + n)
  return sum(chunks_of(lane, chunk_size) for lane in lanes)


@pytest.mark.fast
@relaxed
@given(LENGTHS, CHUNK_SIZES)
def test_every_token_is_placed_once_within_capacity(lengths, chunk_size):
  plan = chunk_plan(lengths, chunk_size)
  seen = [np.zeros(n, int) for n in lengths]
  for chunk in plan.chunks:
    end = 0
    for piece in chunk.pieces:
      assert piece.offset == end, "pieces overlap or leave a gap"
      assert piece.stop > piece.start
      seen[piece.sequence][piece.start : piece.stop] += 1
      end += piece.stop - piece.start
    assert chunk.tokens == end <= chunk_size
  assert all((count == 1).all() for count in seen)
  assert len(plan.chunks) == plan.num_chunks
  assert plan.num_tokens == sum(lengths)
  total = plan.num_chunks * chunk_size
  assert plan.padding_fraction * total == pytest.approx(total - sum(lengths))


@pytest.mark.fast
@relaxed
@given(LENGTHS, CHUNK_SIZES)
def test_sequences_follow_each_other_in_their_lanes(lengths, chunk_size):
  plan = chunk_plan(lengths, chunk_size)
  placed = []
  for number, lane in enumerate(plan.lanes):
    assert [c.index for c in lane.chunks] == list(range(lane.num_chunks))
    assert {c.lane for c in lane.chunks} == {number}
    assert all(c.tokens == chunk_size for c in lane.chunks[:-1])
    pieces = [(c.index, p) for c in lane.chunks for p in c.pieces]
    end = 0
    for sequence, offset in lane.sequences:
      assert offset == end, "sequences overlap or leave a gap"
      end += lengths[sequence]
      cuts = [m for m in range(offset, end) if m % chunk_size == 0 < m - offset]
      ends = itertools.pairwise([offset, *cuts, end])
      expected = [
        (
          start // chunk_size,
          Piece(sequence, start - offset, stop - offset, start % chunk_size),
        )
        for start, stop in ends
      ]
      assert pieces[: len(expected)] == expected
      del pieces[: len(expected)]
      placed.append(sequence)
    assert not pieces
    assert lane.num_chunks == chunks_of(end, chunk_size)
  assert sorted(placed) == list(range(len(lengths)))
  sizes = [lane.num_chunks for lane in plan.lanes]
  assert sizes == sorted(sizes, reverse=True) == plan.lane_chunks.tolist()


@pytest.mark.fast
@relaxed
@given(LENGTHS, CHUNK_SIZES)
def test_a_lane_is_long_only_where_that_saves_chunks(lengths, chunk_size):
  for lane in chunk_plan(lengths, chunk_size).lanes:
    assert lane.num_chunks <= longest_lane(lengths, chunk_size)
    sizes = [lengths[n] for n, _ in lane.sequences]
    if lane.num_chunks > 1:
      assert max(sizes) > chunk_size, "short sequences alone are one chunk"
    saved = sum(chunks_of(n, chunk_size) for n in sizes) - lane.num_chunks
    joins = len(sizes) - 1
    # Each saves a chunk, but the three that merge four lanes save one together.
    assert max(min(joins, 1), joins - 2) <= saved <= joins


@relaxed
@given(LENGTHS, CHUNK_SIZES)
def test_few_chunks(lengths, chunk_size):
  chunks = chunk_plan(lengths, chunk_size).num_chunks
  assert chunks >= chunks_of(sum(lengths), chunk_size)
  assert chunks <= best_fit_without_mergers(lengths, chunk_size)


def test_little_padding_on_a_long_tail():
  rng = np.random.default_rng(0)
  chunks = least = 0
  for _ in range(200):
    # 2,000 in the median, 31,000 in the 99th percentile.
    lengths = np.exp(rng.normal(np.log(2000), 1.178, 100)).astype(int) + 1
    batch = lengths[: np.searchsorted(np.cumsum(lengths), 131_072)]
    chunks += chunk_plan(batch, 2048).num_chunks
    least += batch.sum() / 2048
  assert least / chunks >= 0.98, least / chunks


def test_nearly_no_padding_where_there_is_choice():
  lengths = np.random.default_rng(0).integers(1, 1500, 2000)
  assert chunk_plan(lengths, 2048).padding_fraction < 0.005


@relaxed
@given(LENGTHS, CHUNK_SIZES)
def test_equal_lengths_give_an_equal_plan(lengths, chunk_size):
  plan = chunk_plan(lengths, chunk_size)
  again = chunk_plan(np.asarray(lengths, np.int32), np.int64(chunk_size))
  assert plan == again and hash(plan) == hash(again)
  assert plan.lanes == again.lanes


@pytest.mark.fast
def test_example():
  plan = chunk_plan([3, 10, 1, 4, 2], 4)
  long, exact, rest = plan.lanes
  assert long.sequences == ((1, 0), (4, 10))
  assert [c.pieces for c in long.chunks] == [
    (Piece(1, 0, 4, 0),),
    (Piece(1, 4, 8, 0),),
    (Piece(1, 8, 10, 0), Piece(4, 0, 2, 2)),
  ]
  assert exact.sequences == ((3, 0),)
  assert rest.sequences == ((0, 0), (2, 3))
  assert plan.padding_fraction == 0
  assert plan.summary() == (
    "5 sequences with 20 tokens in 5 chunks of 4: 1 lanes of 2 to 3 chunks, "
    "2 of one; 0.0% padding"
  )


@pytest.mark.fast
def test_long_sequences_share_a_lane():
  # The third would fit too, but 5 chunks are more than 9 tokens compile for.
  plan = chunk_plan([9, 5, 6], 4)
  assert [lane.sequences for lane in plan.lanes] == [
    ((0, 0), (2, 9)),
    ((1, 0),),
  ]
  assert [c.pieces for c in plan.lanes[0].chunks] == [
    (Piece(0, 0, 4, 0),),
    (Piece(0, 4, 8, 0),),
    (Piece(0, 8, 9, 0), Piece(2, 0, 3, 1)),
    (Piece(2, 3, 6, 0),),
  ]


@pytest.mark.fast
def test_lanes_merge_where_no_two_rests_fit_one_chunk():
  # Rests of 6 leave 4 each: three of them need two chunks.
  plan = chunk_plan([26, 6, 6], 10)
  (lane,) = plan.lanes
  assert lane.sequences == ((0, 0), (1, 26), (2, 32))
  assert lane.chunks[2].pieces == (Piece(0, 20, 26, 0), Piece(1, 0, 4, 6))
  assert lane.chunks[3].pieces == (Piece(1, 4, 6, 0), Piece(2, 0, 6, 2))
  # Not if no chunk of theirs depends on another, nor if the lane got too long.
  assert chunk_plan([6, 6, 6], 10).num_chunks == 3
  assert chunk_plan([36, 6, 6], 10).num_chunks == 6


def test_nothing_to_plan():
  plan = chunk_plan([], 8)
  assert plan.lanes == plan.chunks == ()
  assert plan.num_chunks == plan.num_tokens == plan.padding_fraction == 0
  assert plan.summary().startswith("0 sequences")


@pytest.mark.parametrize(
  ("lengths", "chunk_size", "message"),
  [
    ([3, 0, -1], 4, r"lengths\[1\] is 0, not at least 1 \(2 such\): leave"),
    ([3, -7], 4, r"lengths\[1\] is -7"),
    ([1.0, 2.0], 4, "lengths must be integers, got float64"),
    ([True], 4, "lengths must be integers, got bool"),
    ([[1, 2]], 4, r"lengths must be one-dimensional, got \(1, 2\)"),
    ([1], 0, "chunk_size must be at least 1, got 0"),
    ([1], 2.0, "chunk_size must be an integer, got 2.0"),
    ([1], True, "chunk_size must be an integer, got True"),
  ],
)
def test_wrong_arguments_raise(lengths, chunk_size, message):
  with pytest.raises(ValueError, match=message):
    chunk_plan(lengths, chunk_size)


def test_a_plan_cannot_be_written_to():
  with pytest.raises(ValueError, match="read-only"):
    chunk_plan([3], 4).order[0] = 1


@pytest.mark.parametrize("chunk_size", [2048, 65536])
def test_time_to_plan_a_large_corpus(chunk_size, capsys):
  rng = np.random.default_rng(0)
  lengths = np.exp(rng.normal(np.log(2000), 1.2, 100_000)).astype(int) + 1
  started = time.perf_counter()
  plan = chunk_plan(lengths, chunk_size)
  planned = time.perf_counter()
  assert len(plan.chunks) == plan.num_chunks
  built = time.perf_counter()
  with capsys.disabled():
    print(
      f"\n{plan.summary()}; planned in {planned - started:.3f} s, "
      f"objects built in {built - planned:.3f} s"
    )


def test_planning_loads_no_jax():
  code = (
    "import sys, jaxchunk.chunking.lanes, jaxchunk.chunking.plan\n"
    "assert not {'jax', 'flax'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
