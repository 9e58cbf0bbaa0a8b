"""Conversations as long as chats are, and how they are brought together.

Lengths count targets. Neither jax nor torch is imported here: contestants load
their own.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np


def draw_lengths(
  rng: np.random.Generator,
  *,
  steps: int,
  conversations: int,
  bound: int,
  longest: int,
  share: float = 0.01,
  sigma: float = 1.0,
) -> list[list[int]]:
  """Lengths of each step's conversations: a log-normal body, and a tail.

  The body is log-normal with the given sigma, and so that `1 - share` of it is
  below `bound`; what would be above is the tail: as many conversations, at
  even steps of the logarithm from `bound` (not in it) to `longest` (in it).
  They are dealt to the steps in turn, from the last on, so that a first step
  that only warms up has none more than others.

  Args:
    rng: Draws the body, deals the tail and shuffles each step.
    steps: How many.
    conversations: Of each step.
    bound: Tokens that the body stays below.
    longest: Tokens of the longest.
    share: Of the tail; at least one conversation is in it.
    sigma: Standard deviation of the body's logarithm.

  Raises:
    ValueError: `longest` is not above `bound`.
  """
  if not 2 <= bound < longest:
    raise ValueError(f"bound={bound} must be from 2 to below {longest=}")
  count = max(1, round(share * steps * conversations))
  ratio = longest / bound
  tail = [round(bound * ratio ** (n / count)) for n in range(1, count + 1)]
  rng.shuffle(tail)
  dealt = [tail[n::steps] for n in range(steps)][::-1]
  scale = math.log(bound) - sigma * statistics.NormalDist().inv_cdf(1 - share)
  drawn = []
  for mine in dealt:
    body: list[int] = []
    while len(body) < conversations - len(mine):
      length = round(math.exp(rng.normal(scale, sigma)))
      if 1 <= length < bound:
        body.append(length)
    lengths = body + mine
    rng.shuffle(lengths)
    drawn.append(lengths)
  return drawn


def cut_documents(
  rng: np.random.Generator, text: np.ndarray, steps: list[list[int]]
) -> list[list[np.ndarray]]:
  """Pieces of a text from random places, with a token more than targets."""
  return [
    [
      np.take(text, np.arange(n + 1) + rng.integers(len(text)), mode="wrap")
      for n in lengths
    ]
    for lengths in steps
  ]


def even_rows(steps: list[list[list[int]]]) -> list[list[list[list[int]]]]:
  """Cuts packed rows between documents, so that all steps have as many.

  Args:
    steps: Of each step its rows, each the lengths of its documents.

  Returns:
    Of each step and row the parts that it is cut into, mostly one. Those rows
    are cut that have the most documents.

  Raises:
    ValueError: A step has fewer documents than another has rows.
  """
  most = max(len(rows) for rows in steps)
  result = []
  for rows in steps:
    parts = [[row] for row in rows]
    for _ in range(most - len(rows)):
      where = [
        (len(p), i, j) for i, ps in enumerate(parts) for j, p in enumerate(ps)
      ]
      size, i, j = max(where)
      if size < 2:
        raise ValueError(
          f"a step of {sum(map(len, rows))} documents cannot be {most} rows"
        )
      part = parts[i][j]
      parts[i][j : j + 1] = [part[: size // 2], part[size // 2 :]]
    result.append(parts)
  return result


def padded_tokens(lengths: Sequence[int], batch: int) -> int:
  """Tokens of rows that are padded to the longest of their batch."""
  starts = range(0, len(lengths), batch)
  return sum(
    len(lengths[n : n + batch]) * max(lengths[n : n + batch]) for n in starts
  )
