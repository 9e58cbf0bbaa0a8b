"""Prefill and decode against the whole row, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.inference import generate as module
from jaxchunk.inference.generate import (
  Cache,
  cache_capacity,
  decode_step,
  generate,
  prefill,
)
from jaxchunk.inference.sampling import Sampler
from jaxchunk.training.metrics import CompileCounter

from .conftest import make_model

# Most tests share the programs of these sizes.
CAPACITY = 64
whole_row = jax.jit(lambda model, tokens: model(tokens))


def truth_of(model, tokens):
  return np.asarray(whole_row(model, tokens))


def assert_close(logits, truth):
  """Within 1e-4 of the logits' range."""
  assert logits.shape == truth.shape
  bound = 1e-4 * np.ptp(truth)
  assert np.max(np.abs(np.asarray(logits) - truth)) <= bound


@pytest.mark.parametrize(
  ("chunk_size", "capacity"), [(7, 70), (16, 64), (64, 64)]
)
def test_prefill_gives_the_logits_of_the_whole_row(
  model, tokens, chunk_size, capacity
):
  truth = truth_of(model, tokens[:1])
  for length in range(1, 65):
    row = tokens[:1, :length]
    cache, logits = prefill(
      model, row, capacity=capacity, chunk_size=chunk_size
    )
    assert int(cache.length) == length
    assert_close(logits, truth[:, length - 1])


def test_every_step_gives_the_logits_of_the_whole_row(model, tokens):
  check_every_step(model, tokens[:1])


def test_every_step_of_mixed_layers_and_rows(tokens):
  """A layer is left over behind the pattern."""
  model = make_model(
    pattern=(5, None),
    num_layers=3,
    qk_norm=True,
    attention_softcap=5.0,
    tie_embeddings=True,
    dropout=0.5,
  )
  check_every_step(model, tokens)


def check_every_step(model, tokens):
  truth = truth_of(model, tokens)
  cache, logits = prefill(
    model, tokens[:, :11], capacity=CAPACITY, chunk_size=16
  )
  assert_close(logits, truth[:, 10])
  for t in range(11, 64):
    cache, logits = decode_step(model, cache, tokens[:, t])
    assert_close(logits, truth[:, t])


def test_low_precision_errs_at_most_twice_what_the_whole_row_errs(tokens):
  tokens = tokens[:1]
  model = make_model(dtype="bfloat16")
  truth = truth_of(make_model(), tokens)
  plain = np.max(np.abs(truth_of(model, tokens) - truth))
  cache, _ = prefill(model, tokens[:, :11], capacity=CAPACITY, chunk_size=16)
  for t in range(11, 64):
    cache, logits = decode_step(model, cache, tokens[:, t])
    assert cache.states[0][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert np.max(np.abs(logits - truth[:, t])) <= 2 * plain


def test_a_full_cache_gives_nan(model, tokens):
  cache, _ = prefill(model, tokens[:1, :63], capacity=CAPACITY, chunk_size=16)
  cache, logits = decode_step(model, cache, tokens[:1, 63])
  assert np.all(np.isfinite(logits))
  cache, logits = decode_step(model, cache, tokens[:1, 0])
  assert np.all(np.isnan(logits))


def naive(model, prompt, count):
  """The whole row again for every token."""
  row = np.zeros((1, 64), np.int32)
  row[0, : len(prompt)] = prompt
  for place in range(len(prompt), len(prompt) + count):
    row[0, place] = np.argmax(truth_of(model, row)[0, place - 1])
  return row[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.fast
@pytest.mark.parametrize("length", [1, 17])
def test_greedy_is_the_naive_loop_at_any_chunk_size(model, tokens, length):
  prompt = tokens[0, :length]
  expected = naive(model, prompt, 40)
  assert len(set(expected)) > 8  # The model is no constant.
  for chunk_size in (16, 64):
    out = generate(model, prompt, max_new_tokens=40, chunk_size=chunk_size)
    assert list(out) == expected


@pytest.mark.fast
def test_it_ends_before_eos_or_after_the_last_token(model):
  def run(**options):
    return list(
      generate(model, [3], **{"max_new_tokens": 40, "chunk_size": 16} | options)
    )

  out = run()
  assert len(out) == 40
  assert run(eos_id=out[9]) == out[: out.index(out[9])]
  assert run(eos_id=out[0]) == []
  assert run(max_new_tokens=1, chunk_size=64) == out[:1]


def test_a_seed_reproduces_and_the_chunk_size_does_not_matter(model):
  sampler = Sampler(temperature=0.9, top_k=20, top_p=0.95)

  def draw(seed, chunk_size=16):
    options = {"sampler": sampler, "seed": seed, "chunk_size": chunk_size}
    return list(generate(model, [1, 2, 3], max_new_tokens=40, **options))

  assert draw(5) == draw(5) == draw(5, chunk_size=64)
  assert draw(5) != draw(6)


def test_other_prompts_of_one_capacity_compile_nothing(model, tokens):
  def run(length, count):
    out = generate(
      model, tokens[0, :length], max_new_tokens=count, chunk_size=16
    )
    assert len(list(out)) == count

  run(1, 33)
  with CompileCounter() as counter:
    for length, count in ((5, 30), (41, 3), (40, 24)):
      run(length, count)
    assert counter.take() == 0


def test_nothing_is_transferred_behind_the_scenes(model, tokens):
  options = {"max_new_tokens": 40, "chunk_size": 16}
  expected = list(generate(model, tokens[0, :5], **options))
  out = generate(model, tokens[0, :5], **options)
  with jax.transfer_guard("disallow"):
    assert list(out) == expected


def test_the_host_asks_for_a_token_when_the_next_is_under_way(
  model, monkeypatch
):
  events = []

  def spy(owner, name, event):
    function = getattr(owner, name)

    def called(*args):
      events.append(event)
      return function(*args)

    monkeypatch.setattr(owner, name, called)

  out = generate(model, [1], max_new_tokens=3, chunk_size=64)
  spy(module, "decode_step", "step")
  spy(module.jax, "device_get", "get")
  for _ in out:
    events.append("token")
  assert events[-8:] == [
    *("step", "get", "token"),
    *("step", "get", "token"),
    *("get", "token"),
  ]


def test_a_step_works_in_the_cache_it_was_given(model, tokens):
  cache, _ = prefill(model, tokens[:1], capacity=CAPACITY, chunk_size=16)
  decode_step(model, cache, tokens[:1, 0])
  assert all(a.is_deleted() for a in jax.tree.leaves(cache.states))

  shape = (2, 1, 2, 1 << 16, 8)
  array = jax.ShapeDtypeStruct(shape, jnp.float32)
  length = jax.ShapeDtypeStruct((), jnp.int32)
  token = jax.ShapeDtypeStruct((1,), jnp.int32)
  large = Cache(((array, array),), length)
  memory = decode_step.lower(model, large, token).compile().memory_analysis()
  size = 2 * 4 * np.prod(shape)
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < size / 8


@pytest.mark.fast
def test_capacity_is_a_power_of_two_of_chunks():
  assert cache_capacity(1, 1, 512) == 512
  assert cache_capacity(500, 12, 512) == 512
  assert cache_capacity(500, 13, 512) == 1024
  assert cache_capacity(1025, 1, 512) == 2048
  assert cache_capacity(5, 5, 3) == 12


BAD_CALLS = {
  "empty": ({"prompt_ids": []}, "prompt is empty.*BOS"),
  "vocabulary": ({"prompt_ids": [1, 61]}, "token 61 .*vocab_size=61"),
  "negative": ({"prompt_ids": [-1]}, "token -1 "),
  "float": ({"prompt_ids": [0.5]}, "integers, got float64"),
  "rows": ({"prompt_ids": [[1], [2]]}, r"\[B,T\]"),
  "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
  "less": ({"max_new_tokens": -4}, "max_new_tokens=-4 must be"),
  "half": ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be"),
  "chunk": ({"chunk_size": 0}, "chunk_size=0 must be"),
  "seed": ({"seed": -1}, "seed=-1 must be"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_argument_is_named_before_anything_runs(model, case):
  change, message = BAD_CALLS[case]
  call = {"prompt_ids": [1, 2], "max_new_tokens": 3, **change}
  with pytest.raises(ValueError, match=message):
    generate(model, **call)


@pytest.mark.parametrize(
  ("length", "capacity", "message"),
  [
    (17, 16, "T=17 tokens, more than capacity=16"),
    (3, 12, "capacity=12 must be a positive multiple of chunk_size=8"),
    (3, 0, "capacity=0"),
    (0, 16, "prompt is empty"),
  ],
)
def test_prefill_checks_its_sizes(model, tokens, length, capacity, message):
  with pytest.raises(ValueError, match=message):
    prefill(model, tokens[:, :length], capacity=capacity, chunk_size=8)
