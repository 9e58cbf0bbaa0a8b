"""Turns sequences of any length into chunks of one fixed size.

ChunkFlow (arXiv 2503.02356): a sequence longer than a chunk is cut into
dependent chunks, the others are packed together. Unlike there, sequences of
any length also begin in the ragged end of a long one, in the middle of a
chunk, which is exact because attention honours segments.
"""

import bisect
import dataclasses
import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

# A chunk costs about 4 forwards, of which the last of a lane saves one: it is
# not run again (K = 1). So a chunk less is worth 4 and each lane less costs 1.
_MOST_MERGED = 4
# Rooms looked at for a lane that is not too long, so that time stays bounded.
_MOST_TRIED = 64


@dataclasses.dataclass(frozen=True)
class Piece:
  """Tokens [start, stop) of a sequence, at `offset` within a chunk."""

  sequence: int
  start: int
  stop: int
  offset: int


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Up to `chunk_size` tokens that run through the model together.

  Attributes:
    lane: Which lane it belongs to.
    index: Its number in the lane, from 0.
    pieces: What it holds, by offset, without gaps; the rest is padding.
  """

  lane: int
  index: int
  pieces: tuple[Piece, ...]

  @property
  def tokens(self) -> int:
    """Tokens that are not padding."""
    return sum(p.stop - p.start for p in self.pieces)


@dataclasses.dataclass(frozen=True)
class Lane:
  """Consecutive chunks that share one KV cache.

  Attributes:
    chunks: In order; all but the last are full.
    sequences: `(sequence, offset)` of each sequence, which lies without gaps
      from that token of the lane on, whichever chunks these are; in order, so
      that the n-th is segment n + 1.
  """

  chunks: tuple[Chunk, ...]
  sequences: tuple[tuple[int, int], ...]

  @property
  def num_chunks(self) -> int:
    """Its length in chunks."""
    return len(self.chunks)


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
  """Where every token goes; made by `chunk_plan`, and equal for equal inputs.

  The layout is held in arrays; `lanes` and `chunks` are built when first used.

  Attributes:
    chunk_size: C.
    lengths: Of the sequences, as given.
    lane_chunks: Chunks of each lane, longest lane first, `[lanes]`.
    lane_starts: Where the sequences of each lane begin in `order`,
      `[lanes + 1]`.
    order: The sequences, lane by lane, `[sequences]`.
    offsets: Token of the lane at which each of `order` begins, `[sequences]`.
  """

  chunk_size: int
  lengths: tuple[int, ...]
  lane_chunks: Int64[np.ndarray, " lanes"] = dataclasses.field(
    compare=False, repr=False
  )
  lane_starts: Int64[np.ndarray, " lanes_and_1"] = dataclasses.field(
    compare=False, repr=False
  )
  order: Int64[np.ndarray, " sequences"] = dataclasses.field(
    compare=False, repr=False
  )
  offsets: Int64[np.ndarray, " sequences"] = dataclasses.field(
    compare=False, repr=False
  )

  @property
  def num_chunks(self) -> int:
    """Chunks in all lanes."""
    return int(self.lane_chunks.sum())

  @functools.cached_property
  def num_tokens(self) -> int:
    """Tokens in all sequences."""
    return sum(self.lengths)

  @property
  def padding_fraction(self) -> float:
    """Share of the chunks' tokens that is padding; 0 without chunks."""
    if not self.num_chunks:
      return 0.0
    return 1 - self.num_tokens / (self.num_chunks * self.chunk_size)

  @functools.cached_property
  def lanes(self) -> tuple[Lane, ...]:
    """The lanes, longest first."""
    order, offsets = self.order.tolist(), self.offsets.tolist()
    spans = itertools.pairwise(self.lane_starts.tolist())
    lanes = []
    for index, (start, stop) in enumerate(spans):
      sequences = tuple(
        zip(order[start:stop], offsets[start:stop], strict=True)
      )
      lanes.append(Lane(tuple(self._chunks_of(index, sequences)), sequences))
    return tuple(lanes)

  @functools.cached_property
  def chunks(self) -> tuple[Chunk, ...]:
    """The chunks of all lanes, lane by lane."""
    return tuple(itertools.chain.from_iterable(x.chunks for x in self.lanes))

  def summary(self) -> str:
    """One line for a log."""
    dependent = int((self.lane_chunks > 1).sum())
    longest = int(self.lane_chunks.max(initial=0))
    return (
      f"{len(self.lengths):,} sequences with {self.num_tokens:,} tokens in "
      f"{self.num_chunks:,} chunks of {self.chunk_size:,}: {dependent:,} lanes "
      f"of 2 to {longest:,} chunks, {len(self.lane_chunks) - dependent:,} of "
      f"one; {self.padding_fraction:.1%} padding"
    )

  def _chunks_of(
    self, lane: int, sequences: tuple[tuple[int, int], ...]
  ) -> Iterator[Chunk]:
    """The chunks of a lane: every sequence cut where a chunk ends."""
    size = self.chunk_size
    pieces: list[list[Piece]] = [[] for _ in range(self.lane_chunks[lane])]
    for sequence, offset in sequences:
      end = offset + self.lengths[sequence]
      for index in range(offset // size, -(-end // size)):
        start, stop = max(offset, index * size), min(end, (index + 1) * size)
        pieces[index].append(
          Piece(sequence, start - offset, stop - offset, start - index * size)
        )
    for index, held in enumerate(pieces):
      yield Chunk(lane, index, tuple(held))


def chunk_plan(
  lengths: Sequence[int] | Int64[np.ndarray, " sequences"], chunk_size: int
) -> ChunkPlan:
  """Cuts and packs sequences into chunks of `chunk_size` tokens.

  A sequence of n tokens fills ceil(n / C) - 1 chunks and leaves a rest of 1 to
  C tokens. Two sequences, short or long, save a chunk in one lane if their
  rests fit one chunk together; the other chunks of a lane are full whatever
  shares it. So rests are packed (best-fit decreasing): each goes to the lane
  with the least room that suffices, of those to the shortest, and to a lane of
  its own if there is none. Then up to 4 lanes whose rooms add up to a chunk
  are merged, if one of them has dependent chunks; here a short sequence too
  may cross from one chunk to the next.

  No lane gets longer than the power of two that the longest sequence needs
  anyway. Without sequences of n > C every lane is one chunk. A pure function
  of its arguments: every host makes the same plan.

  Args:
    lengths: Tokens of each sequence, at least 1.
    chunk_size: C, tokens of a chunk.

  Returns:
    The plan; without lanes if there are no sequences.

  Raises:
    ValueError: A length or the chunk size is not a positive integer.
  """
  if isinstance(chunk_size, bool) or not isinstance(
    chunk_size, int | np.integer
  ):
    raise ValueError(f"chunk_size must be an integer, got {chunk_size!r}")
  if chunk_size < 1:
    raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
  size, sizes = int(chunk_size), _checked(lengths)
  lane_of = _lanes_of(sizes, size)
  num_lanes = int(lane_of.max(initial=-1)) + 1
  lane_tokens = np.zeros(num_lanes, np.int64)
  np.add.at(lane_tokens, lane_of, sizes)
  lane_chunks = -(-lane_tokens // size)
  longest_first = np.argsort(-lane_chunks, kind="stable")
  rank = np.argsort(longest_first)[lane_of]
  # Stable; the longest of a lane first, so that short ones end up together.
  order = np.lexsort((-sizes, rank))
  lane_starts = np.searchsorted(rank[order], np.arange(num_lanes + 1))
  ends = np.concatenate([[0], np.cumsum(sizes[order])])
  starts_of = np.repeat(ends[lane_starts[:-1]], np.diff(lane_starts))
  return ChunkPlan(
    chunk_size=size,
    lengths=tuple(sizes.tolist()),
    lane_chunks=_frozen(lane_chunks[longest_first]),
    lane_starts=_frozen(lane_starts),
    order=_frozen(order),
    offsets=_frozen(ends[:-1] - starts_of),
  )


def _checked(
  lengths: Sequence[int] | Int64[np.ndarray, " sequences"],
) -> Int64[np.ndarray, " sequences"]:
  given = np.asarray(lengths)
  if given.ndim != 1:
    raise ValueError(f"lengths must be one-dimensional, got {given.shape}")
  if not given.size:
    return np.zeros(0, np.int64)
  if not np.issubdtype(given.dtype, np.integer):
    raise ValueError(f"lengths must be integers, got {given.dtype}")
  wrong = np.flatnonzero(given < 1)
  if wrong.size:
    index = int(wrong[0])
    raise ValueError(
      f"lengths[{index}] is {given[index]}, not at least 1 ({wrong.size} "
      "such): leave empty sequences out"
    )
  return given.astype(np.int64)


def _lanes_of(
  sizes: Int64[np.ndarray, " sequences"], chunk_size: int
) -> Int64[np.ndarray, " sequences"]:
  """The lane of every sequence."""
  full, rests = np.divmod(sizes - 1, chunk_size)
  rests += 1
  # The capacity that the longest compiles for, see `lanes.capacity_chunks`.
  limit = 1 << int(full.max(initial=0)).bit_length()
  decreasing = np.lexsort((-full, -rests))
  placed, rooms, lane_full = _best_fit(
    rests[decreasing].tolist(),
    full[decreasing].tolist(),
    size=chunk_size,
    limit=limit,
  )
  merged = np.arange(len(rooms))
  for group in _mergers(rooms, lane_full, size=chunk_size, limit=limit):
    merged[group] = group[0]
  lane_of = np.zeros(len(sizes), np.int64)
  lane_of[decreasing] = merged[np.asarray(placed, np.int64)]
  return np.unique(lane_of, return_inverse=True)[1]


def _best_fit(
  rests: list[int], full: list[int], *, size: int, limit: int
) -> tuple[list[int], list[int], list[int]]:
  """Puts every sequence, in the order given, where it fits best.

  Args:
    rests: Tokens of each sequence in its last chunk.
    full: Chunks of each before that.
    size: Tokens of a chunk.
    limit: Chunks of a lane at most.

  Returns:
    The lane of each sequence; for every lane the tokens left in its last
    chunk; and the chunks before that.
  """
  # By room, a heap of (full chunks, lane).
  lanes_with: dict[int, list[tuple[int, int]]] = {}
  open_rooms: list[int] = []
  lane_of: list[int] = []
  rooms: list[int] = []
  lane_full: list[int] = []
  for rest, before in zip(rests, full, strict=True):
    first = bisect.bisect_left(open_rooms, rest)
    for at in range(first, min(first + _MOST_TRIED, len(open_rooms))):
      room = open_rooms[at]
      if lanes_with[room][0][0] + before < limit:
        lane = heapq.heappop(lanes_with[room])[1]
        if not lanes_with[room]:
          del open_rooms[at], lanes_with[room]
        break
    else:
      lane, room = len(rooms), size
      rooms.append(size)
      lane_full.append(0)
    lane_of.append(lane)
    room -= rest
    rooms[lane] = room
    lane_full[lane] += before
    if room:
      if room not in lanes_with:
        bisect.insort(open_rooms, room)
        lanes_with[room] = []
      heapq.heappush(lanes_with[room], (lane_full[lane], lane))
  return lane_of, rooms, lane_full


def _mergers(
  rooms: list[int], full: list[int], *, size: int, limit: int
) -> Iterator[list[int]]:
  """Groups of lanes that need one chunk less if they follow each other.

  The roomiest go first; one of each group has dependent chunks.

  Args:
    rooms: Tokens left in the last chunk of each lane.
    full: Chunks of each before that.
    size: Tokens of a chunk.
    limit: Chunks of a lane at most.
  """
  # One that is as long as it may be already cannot be merged.
  roomy = [n for n in range(len(rooms)) if rooms[n] and full[n] + 1 < limit]
  group: list[int] = []
  for lane in sorted(roomy, key=lambda n: (-rooms[n], full[n])):
    group.append(lane)
    if sum(full[n] + 1 for n in group) - 1 > limit:
      group.remove(max(group, key=lambda n: full[n]))
    elif sum(rooms[n] for n in group) >= size:
      if any(full[n] for n in group):
        yield group
        group = []
      elif len(group) == _MOST_MERGED:
        del group[0]
    elif len(group) == _MOST_MERGED:
      return  # None of the others has more room.


def _frozen(array: np.ndarray) -> Int64[np.ndarray, " n"]:
  array = array.astype(np.int64)
  array.flags.writeable = False
  return array
