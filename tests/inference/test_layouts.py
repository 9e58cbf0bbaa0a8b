"""Copies of a model, and copies over several devices, against one device."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxchunk as jc
from jaxchunk.inference.core import Request
from jaxchunk.sharding.mesh import Layout
from tests.inference.conftest import random_model
from tests.inference.test_engine import BYTES, CONFIG, SMALL, adapted

ROUND = dict(vocab_size=260)


@pytest.fixture(scope="module")
def model():
  return random_model(dataclasses.replace(CONFIG, **ROUND).frozen())


@pytest.fixture(scope="module")
def adapters(model):
  return {"a": adapted(model, 1, rank=4)}


def serve(engine, prompts):
  """Half with the adapter; greedy, drawn, penalised."""
  kinds = [
    dict(temperature=0),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=0, frequency_penalty=1.5),
  ]
  for number, prompt in enumerate(prompts):
    params = jc.SamplingParams(
      **kinds[number % 3], max_tokens=10, seed=number, ignore_eos=True
    )
    engine.core.add(
      Request(
        request_id=str(number),
        prompt=prompt,
        params=params,
        adapter="a" if number % 2 else None,
      )
    )
  tokens = [[] for _ in prompts]
  while engine.core.has_work:
    for event in engine.core.step():
      tokens[int(event.sequence.request_id)] += event.tokens
  for core in engine.cores:
    assert core.scheduler.pool.held == 0
  return tokens


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [tuple(rng.integers(0, 256, n).tolist()) for n in (3, 40, 17, 9, 25)]


@pytest.fixture(scope="module")
def alone(model, adapters, prompts):
  engine = jc.Engine(model, BYTES, adapters=adapters, **SMALL)
  return serve(engine, prompts)


@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(data=2)])
def test_layouts_give_the_same_tokens(model, adapters, prompts, alone, sizes):
  engine = jc.Engine(
    model, BYTES, adapters=adapters, layout=Layout(**sizes), **SMALL
  )
  assert serve(engine, prompts) == alone
  if "tensor" in sizes:
    pages = engine.runners[0].state.pages[0]
    assert pages.k.sharding.shard_shape(pages.k.shape)[1] == 1
    place = engine.runners[0]._place
    embed = place.put_model(model).embed[...]
    assert embed.sharding.shard_shape(embed.shape)[0] == 130
  else:
    assert engine.core.stats.new_tokens == 50
    assert all(core.stats.new_tokens for core in engine.cores)
    devices = {runner._place.devices for runner in engine.runners}
    assert len(devices) == 2


def test_a_vocabulary_that_does_not_divide_stays_whole(prompts):
  """And copies of two devices each, with windows."""
  cfg = dataclasses.replace(CONFIG, window_pattern=(None, 12)).frozen()
  model = random_model(cfg)
  small = SMALL | dict(step_sizes=(16,))
  how = dict(temperature=0, max_tokens=8)
  plain = jc.Engine(model, **small).generate(prompts, **how)
  engine = jc.Engine(model, layout=Layout(data=2, tensor=2), **small)
  again = engine.generate(prompts, **how)
  assert [a.tokens for a in again] == [a.tokens for a in plain]


@pytest.mark.fast
@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (dict(fsdp=2), "nearest layout is Layout.data=2"),
    (dict(tensor=4), "does not divide num_kv_heads=2"),
    (dict(data=16), "takes 16 devices and there are 8"),
  ],
)
def test_layouts_that_cannot_be_are_named(model, sizes, message):
  with pytest.raises(ValueError, match=message):
    jc.Engine(model, layout=Layout(**sizes), **SMALL)
  assert len(jax.devices()) == 8
