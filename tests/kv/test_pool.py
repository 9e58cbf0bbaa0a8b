"""Pages: who holds them, and which are known."""

import numpy as np
import pytest

from jaxchunk.kv.pool import PagePool, chain, root

pytestmark = pytest.mark.fast


def names_of(tokens, size=4, parent=b"r"):
  names = []
  for at in range(0, len(tokens) - size + 1, size):
    parent = chain(parent, tokens[at : at + size])
    names.append(parent)
  return names


def test_equal_beginnings_share_pages():
  pool = PagePool(8, 4)
  names = names_of(range(12))
  pages = pool.allocate(3)
  for page, name in zip(pages, names, strict=True):
    pool.name(page, name)
  again = pool.look_up(names_of([*range(8), 99, 98, 97, 96]))
  assert again == pages[:2]
  pool.check([pages, again])
  pool.release(pages)
  assert pool.held == 2
  pool.release(again)
  assert pool.held == 0 and pool.free == 8
  assert pool.look_up(names) == pages


def test_the_last_pages_of_what_is_longest_idle_go_first():
  pool = PagePool(4, 4)
  first, second = names_of(range(8)), names_of(range(100, 108))
  for names in (first, second):
    pages = pool.allocate(2)
    for page, name in zip(pages, names, strict=True):
      pool.name(page, name)
    pool.release(pages)
  taken = pool.allocate(1)
  pool.check([taken])
  assert pool.stats.evicted == 1
  assert len(pool.look_up(second)) == 2
  # Of the first its beginning is left.
  assert len(pool.look_up(first)) == 1


def test_what_contents_depend_on_is_in_the_name():
  tokens = range(4)
  names = {
    chain(root(adapter, policy), tokens)
    for adapter in (None, "", "a")
    for policy in ("all", "some")
  }
  assert len(names) == 6


def test_random_use_loses_nothing():
  rng = np.random.default_rng(0)
  pool, held = PagePool(16, 2), []
  for _ in range(2000):
    if held and rng.random() < 0.5:
      pool.release(held.pop(rng.integers(len(held))))
    else:
      names = names_of(rng.integers(0, 2, rng.integers(2, 12)).tolist(), 2)
      pages = pool.look_up(names)
      more = pool.allocate(len(names) - len(pages))
      if more is None:
        pool.release(pages)
        continue
      for page, name in zip(more, names[len(pages) :], strict=True):
        pool.name(page, name)
      held.append(pages + more)
    pool.check(held)
  assert pool.stats.evicted > 100


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="num_pages=0"):
    PagePool(0, 4)
  pool = PagePool(2, 4)
  assert pool.allocate(3) is None
  pages = pool.allocate(1)
  pool.release(pages)
  with pytest.raises(ValueError, match="held by nobody"):
    pool.release(pages)
  with pytest.raises(ValueError, match="counts 0 holders and has 1"):
    pool.check([pages])
