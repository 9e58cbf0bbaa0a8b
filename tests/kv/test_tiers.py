"""Copies in the host's memory: room, order, damage, and what is below."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.kv.tiers import HostTier

pytestmark = pytest.mark.fast


def copies(value):
  return {"k": jnp.full((2, 8), value, jnp.float32), "s": None}


@pytest.fixture
def make():
  tiers = []

  def new(*args, **kwargs):
    tiers.append(HostTier(*args, **kwargs))
    return tiers[-1]

  yield new
  for tier in tiers:
    tier.close()


def test_what_comes_back_is_what_went_in(make):
  tier = make(1000)
  tier.put("a", copies(3))
  assert tier.has("a")
  back = tier.get("a")
  assert back["s"] is None
  np.testing.assert_array_equal(back["k"], np.full((2, 8), 3))
  assert tier.get("b") is None
  assert (tier.stats.found, tier.stats.missed) == (1, 1)


def test_the_least_recently_used_makes_room_and_memory_is_bounded(make):
  tier = make(3 * 64)
  for name in "abc":
    tier.put(name, copies(ord(name)))
    tier.get(name)
  tier.get("a")
  tier.put("d", copies(1))
  tier.get("d")
  assert [tier.has(name) for name in "abcd"] == [True, False, True, True]
  assert tier.size == 3 * 64 <= tier.capacity
  tier.put("large", {"k": jnp.zeros(1000)})
  assert tier.get("large") is None
  assert tier.size == 3 * 64


def test_damage_is_noticed(make):
  tier = make(1000)
  tier.put("a", copies(3))
  tier.get("a")["k"][0, 0] = 4
  assert tier.get("a") is None
  assert tier.stats.damaged == 1
  assert not tier.has("a")


def test_what_has_no_room_goes_below_and_is_found_there(make):
  lower = make(1000)
  tier = make(64, lower=lower)
  for name in "ab":
    tier.put(name, copies(ord(name)))
    tier.get(name)
  assert tier.has("a")
  assert tier.get("a")["k"][0, 0] == ord("a")
  tier.drop("a")
  assert not tier.has("a")


def test_a_tier_of_nothing_is_refused():
  with pytest.raises(ValueError, match="capacity=0 bytes"):
    HostTier(0)
