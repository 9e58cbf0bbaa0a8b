"""Proof that the rows of a paged cache do not see each other, bit by bit.

As in `isolation`: a cache of several sequences is read twice, and in between
the queries of one sequence and all that its pages hold are replaced. The
outputs of the others must come out with the same bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxchunk.evaluation.isolation import Leak, different
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView

# From q `[B,K,G,T,H]`, pages, a view and positions `[B,T]`, to o and lse: an
# implementation's forward function in the layout of the library.
PagedOperation = Callable[..., tuple[Array, Array]]


def random_view(
  rng: np.random.Generator, rows: int, heads: int, entries: int, page: int
) -> PageView:
  """Rows of random lengths, each with pages of its own in random order."""
  lengths = rng.integers(0, entries * page + 1, (rows, heads))
  pages = [rng.permutation(rows * entries) for _ in range(heads)]
  table = np.stack(pages, 0).reshape(heads, rows, entries).swapaxes(0, 1)
  return PageView(
    jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)
  )


def paged_leaks(
  run: PagedOperation,
  *,
  packings: int,
  seed: int = 0,
  rows: int = 4,
  heads: tuple[int, int] = (2, 1),
  width: int = 64,
  queries: int = 2,
  entries: int = 3,
  page: int = 32,
  dtype: str = "float32",
  scale: float = 1e3,
) -> list[Leak]:
  """Changes one sequence of a cache in what paged attention reads.

  Args:
    run: The operation.
    packings: How many caches.
    seed: Of lengths, tables and numbers.
    rows: Sequences of a cache, B.
    heads: N and K.
    width: H.
    queries: The last positions of each sequence, T.
    entries: Pages that a sequence may have, M.
    page: Keys of a page, Z.
    dtype: Of queries and pages.
    scale: Standard deviation of what replaces the sequence.

  Returns:
    The leaks; a `Leak` names sequences in place of documents.
  """
  N, K = heads
  run = jax.jit(run, static_argnames="scale")
  pages = (1, K, rows * entries, page, width)
  shapes = ((rows, K, N // K, queries, width), pages, pages)
  leaks = []
  for packing in range(packings):
    rng = np.random.default_rng((seed, packing))
    view = random_view(rng, rows, K, entries, page)
    changed = int(rng.integers(rows))
    end = np.asarray(view.lengths).max(1)[:, None]
    positions = jnp.asarray(end - queries + np.arange(queries), jnp.int32)
    owned = np.zeros(pages[1:3], bool)
    for head in range(K):
      owned[head, np.asarray(view.table)[changed, head]] = True
    owns = [(np.arange(rows) == changed)[:, None, None, None, None]]
    owns += [owned[None, :, :, None, None]] * 2
    old = [rng.standard_normal(shape) for shape in shapes]
    new = [
      np.where(own, scale * rng.standard_normal(a.shape), a)
      for own, a in zip(owns, old, strict=True)
    ]
    results = []
    for arrays in (old, new):
      q, k, v = (jnp.asarray(a, dtype) for a in arrays)
      results.append(run(q, KVPages(k, v), view, positions, scale=width**-0.5))
    for what, a, b in zip(("o", "lse"), *results, strict=True):
      moved = different(a, b).reshape(rows, -1).any(1)
      leaks += [
        Leak(packing, what, (changed, 0), (int(row), 0))
        for row in np.flatnonzero(moved)
        if row != changed
      ]
  return leaks
