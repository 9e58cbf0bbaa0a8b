"""Draws of many rules at once, against the plain ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.inference.draw import PROMPT, Rules, draw, pick
from jaxchunk.inference.sampling import Sampler, filter_logits

V = 300


def rules_of(rows, **fields):
  plain = dict(
    seed=np.zeros(rows, np.uint32),
    position=np.zeros(rows, np.int32),
    temperature=np.zeros(rows, np.float32),
    top_k=np.zeros(rows, np.int32),
    top_p=np.ones(rows, np.float32),
    min_p=np.zeros(rows, np.float32),
    repetition=np.ones(rows, np.float32),
    presence=np.zeros(rows, np.float32),
    frequency=np.zeros(rows, np.float32),
    logprobs=np.zeros(rows, bool),
    bias_ids=np.full((rows, 4), V, np.int32),
    bias=np.zeros((rows, 4), np.float32),
    allowed=np.full((rows, -(-V // 32)), 0xFFFFFFFF, np.uint32),
  )
  for name, value in fields.items():
    plain[name] = np.broadcast_to(
      np.asarray(value, plain[name].dtype), plain[name].shape
    )
  return jax.tree.map(jnp.asarray, Rules(**plain))


def run(logits, rules, counts=None, slots=None, turned=False):
  rows = len(rules.seed)
  if counts is None:
    counts = jnp.zeros((rows, V), jnp.int16)
  slots = jnp.arange(rows) if slots is None else slots
  return _draw(logits, rules, counts, slots, turned=turned)


_draw = jax.jit(draw, static_argnames="turned")


@pytest.fixture(scope="module")
def logits():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal((1, V)) * 2, jnp.float32)


@pytest.mark.parametrize(
  "sampler",
  [
    Sampler(temperature=0.7),
    Sampler(temperature=1.3, top_k=7),
    Sampler(top_p=0.6),
    Sampler(temperature=0.8, top_k=20, top_p=0.9),
  ],
)
def test_frequencies_are_the_distributions(logits, sampler):
  """By a chi-squared test of 40,000 draws."""
  rows = 40_000
  rules = rules_of(
    rows,
    seed=np.arange(rows),
    temperature=sampler.temperature,
    top_k=sampler.top_k or 0,
    top_p=sampler.top_p or 1,
  )
  tokens = run(jnp.broadcast_to(logits, (rows, V)), rules).tokens
  found = np.bincount(np.asarray(tokens), minlength=V)
  probs = np.asarray(jax.nn.softmax(filter_logits(logits, sampler)))[0]
  assert not found[probs == 0].any()
  often = probs * rows >= 5
  expected = np.append(probs[often], probs[~often].sum()) * rows
  seen = np.append(found[often], found[~often].sum())
  keep = expected > 0
  chi = np.sum((seen - expected)[keep] ** 2 / expected[keep])
  degrees = keep.sum() - 1
  assert abs(chi - degrees) < 5 * np.sqrt(2 * degrees)


def test_min_p_keeps_what_is_likely_enough(logits):
  rules = rules_of(500, seed=np.arange(500), temperature=1.0, min_p=0.3)
  tokens = np.asarray(run(jnp.broadcast_to(logits, (500, V)), rules).tokens)
  probs = np.asarray(jax.nn.softmax(logits))[0]
  assert set(tokens) == set(np.flatnonzero(probs >= 0.3 * probs.max()))


def test_each_row_has_its_own_rules_and_turning_changes_nothing(logits):
  rng = np.random.default_rng(1)
  four = jnp.asarray(rng.standard_normal((4, V)), jnp.float32)
  rules = rules_of(
    4,
    temperature=[0, 1, 0, 1],
    seed=[1, 2, 3, 4],
    top_k=[0, 1, 0, 0],
    logprobs=[True, False, False, False],
  )
  drawn = run(four, rules)
  best = np.argmax(np.asarray(four), 1)
  assert drawn.tokens[:3].tolist() == best[:3].tolist()
  for turned in (False, True):
    other = run(four.T if turned else four, rules, turned=turned)
    jax.tree.map(np.testing.assert_array_equal, drawn, other)
  greedy = dataclasses.replace(
    rules, temperature=jnp.zeros(4), logprobs=jnp.zeros(4, bool)
  )
  assert run(four.T, greedy, turned=True).tokens.tolist() == best.tolist()


def test_penalties_are_those_of_their_definitions():
  row = np.zeros((1, V), np.float32)
  row[0, :4] = [5, -1, 4.9, 4.8]
  counts = np.zeros((3, V), np.int16)
  counts[2, 0] = PROMPT
  counts[2, 2] = 2
  slots = jnp.asarray([2])
  # 5 / 1.1 is below 4.8, and 4.9 / 1.1 too.
  rules = rules_of(1, repetition=1.1)
  assert run(row, rules, counts, slots).tokens.tolist() == [3]
  # What is only in the prompt has not come since.
  rules = rules_of(1, presence=0.3)
  assert run(row, rules, counts, slots).tokens.tolist() == [0]
  row[0, 0] = 4.6
  assert run(row, rules, counts, slots).tokens.tolist() == [3]
  rules = rules_of(1, frequency=0.04)
  assert run(row, rules, counts, slots).tokens.tolist() == [2]
  rules = rules_of(1, frequency=0.06)
  assert run(row, rules, counts, slots).tokens.tolist() == [3]


def test_biases_and_masks(logits):
  rules = rules_of(1, bias_ids=[[17, V, V, V]], bias=[[100, 0, 0, 0]])
  assert run(logits, rules).tokens.tolist() == [17]
  allowed = np.zeros((1, -(-V // 32)), np.uint32)
  allowed[0, 2] = 1 << 5
  rules = dataclasses.replace(rules, allowed=jnp.asarray(allowed))
  assert run(logits, rules).tokens.tolist() == [69]


def test_a_number_next_to_one_picks_a_token_that_can_come():
  rng = np.random.default_rng(2)
  weights = rng.random((64, V)).astype(np.float32)
  weights[:, 200:] = 0
  weights[rng.random((64, V)) < 0.5] = 0
  for number in (0.0, 1 - 2**-24):
    picked = np.asarray(pick(jnp.asarray(weights), jnp.full(64, number)))
    assert (weights[np.arange(64), picked] > 0).all()
  assert (picked < 200).all()


def test_equal_logits_give_the_first():
  row = jnp.zeros((1, V)).at[0, 5].set(1).at[0, 9].set(1)
  assert run(row, rules_of(1)).tokens.tolist() == [5]
  # And logits that are not numbers give some token all the same.
  assert run(row * jnp.nan, rules_of(1)).tokens.tolist() == [V - 1]
