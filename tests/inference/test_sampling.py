"""Greedy, top-k and top-p: which tokens are possible, and how likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.inference.sampling import (
  Sampler,
  filter_logits,
  keep_top_k,
  keep_top_p,
  sample,
)

PROBS = np.array([0.05, 0.4, 0.1, 0.2, 0.25], np.float32)
LOGITS = jnp.log(jnp.asarray(PROBS))[None]


def kept(logits):
  return [np.flatnonzero(np.isfinite(row)).tolist() for row in logits]


@pytest.mark.fast
def test_top_k_keeps_the_k_largest_of_every_row():
  logits = jnp.concatenate([LOGITS, -LOGITS])
  out = keep_top_k(logits, 2)
  assert kept(out) == [[1, 4], [0, 2]]
  np.testing.assert_array_equal(out[0, [1, 4]], LOGITS[0, [1, 4]])
  for k in (5, 99):
    np.testing.assert_array_equal(keep_top_k(LOGITS, k), LOGITS)


@pytest.mark.fast
@pytest.mark.parametrize(
  ("p", "ids"),
  [
    (1e-6, [1]),
    (0.39, [1]),
    (0.41, [1, 4]),
    (0.64, [1, 4]),
    (0.66, [1, 3, 4]),
    (0.9, [1, 2, 3, 4]),
    (0.96, [0, 1, 2, 3, 4]),
    (1.0, [0, 1, 2, 3, 4]),
  ],
)
def test_top_p_keeps_the_smallest_set_that_has_p(p, ids):
  out = keep_top_p(LOGITS, p)
  assert kept(out) == [ids]
  np.testing.assert_array_equal(out[0, ids], LOGITS[0, ids])


def test_equal_logits_are_cut_by_id():
  flat = jnp.zeros((1, 8))
  assert kept(keep_top_k(flat, 3)) == [[0, 1, 2]]
  assert kept(keep_top_p(flat, 0.3)) == [[0, 1, 2]]


def test_top_p_of_one_keeps_a_tail_that_rounding_would_lose():
  logits = jnp.linspace(0, -30, 1000, dtype=jnp.float32)[None]
  assert len(kept(keep_top_p(logits, 1.0))[0]) == 1000


def test_temperature_comes_first_then_top_k_then_top_p():
  sampler = Sampler(temperature=0.5, top_k=3, top_p=0.8)
  probs = np.where(PROBS >= 0.2, PROBS**2, 0)
  probs /= probs.sum()
  # 0.16, 0.0625 and 0.04 of 0.2625: the first two have 0.85.
  expected = np.where(PROBS > 0.2, probs, 0)
  out = jax.nn.softmax(filter_logits(LOGITS, sampler))[0]
  np.testing.assert_allclose(out, expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize(
  "sampler",
  [Sampler(), Sampler(temperature=0.7, top_k=4), Sampler(top_p=0.8)],
)
def test_draws_have_the_distribution_of_the_filtered_logits(sampler):
  count = 20_000
  rows = jnp.broadcast_to(LOGITS, (count, 5))
  drawn = sample(rows, jax.random.key(0), sampler=sampler)
  found = np.bincount(np.asarray(drawn), minlength=5) / count
  expected = np.asarray(jax.nn.softmax(filter_logits(LOGITS, sampler)))[0]
  deviation = np.sqrt(expected * (1 - expected) / count)
  assert np.all(np.abs(found - expected) <= 4 * deviation)


@pytest.mark.fast
@pytest.mark.parametrize("temperature", [0, 1e-45])
def test_no_temperature_is_argmax(temperature):
  logits = jax.random.normal(jax.random.key(0), (32, 100))
  sampler = Sampler(temperature=temperature, top_k=50, top_p=0.9)
  out = sample(logits, jax.random.key(1), sampler=sampler)
  assert out.dtype == jnp.int32
  np.testing.assert_array_equal(out, jnp.argmax(logits, -1))


def test_a_key_reproduces():
  rows = jnp.broadcast_to(LOGITS, (64, 5))
  one, same, other = (
    np.asarray(sample(rows, jax.random.key(n), sampler=Sampler()))
    for n in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, same)
  assert np.any(one != other)


@pytest.mark.fast
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", 0),
    ("top_k", -3),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_p", float("nan")),
  ],
)
def test_an_impossible_number_is_named(field, value):
  with pytest.raises(ValueError, match=f"{field}={value}"):
    Sampler(**{field: value})
