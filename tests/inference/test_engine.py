"""The engine as a library: texts, adapters, forms, narrow pages."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.inference.core import RequestError
from jaxchunk.inference.engine import EngineConfig
from jaxchunk.inference.generate import generate
from jaxchunk.kv.policies import KeepAll
from jaxchunk.models.adapters import add_lora, merge_lora
from jaxchunk.models.lora import LoRA
from tests.inference.conftest import random_model

BYTES = ByteTokenizer()
CONFIG = jc.ModelConfig(
  vocab_size=259,
  d_model=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  d_ff=48,
)
SMALL: dict = dict(
  max_length=128,
  max_sequences=4,
  step_tokens=16,
  step_sizes=(1, 4, 16),
  num_pages=64,
  page_size=8,
  query_block=8,
)


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG.frozen())


def adapted(model, seed, **fields):
  """With adapters that change something."""
  rng = np.random.default_rng(seed)
  made = add_lora(model, LoRA(**fields))

  def fill(leaf):
    values = rng.standard_normal(leaf.shape) * 0.3
    return jax.numpy.asarray(values, leaf.dtype)

  graph, lora, rest = nnx.split(made, nnx.LoRAParam, ...)
  return nnx.merge(graph, jax.tree.map(fill, lora), rest)


@pytest.fixture(scope="module")
def adapters(model):
  return {
    "wide": adapted(model, 1, rank=4),
    "narrow": adapted(model, 2, rank=2, targets=("q", "down"), alpha=4),
  }


@pytest.fixture(scope="module")
def engine(model, adapters):
  said = []
  engine = jc.Engine(
    model, BYTES, adapters=adapters, say=said.append, seed=0, **SMALL
  )
  assert "engine: 3 steps compiled in" in said[-1]
  return engine


def test_texts_and_tokens(engine, model):
  prompts = ["import os", "a", [5, 6, 7]]
  answers = engine.generate(prompts, temperature=0, max_tokens=10)
  for prompt, answer in zip(prompts, answers, strict=True):
    ids = engine.encode(prompt)
    alone = generate(
      model, ids, max_new_tokens=10, chunk_size=16, eos_id=BYTES.eos_id
    )
    assert answer.prompt == ids
    assert answer.tokens == list(alone)
    assert answer.text == BYTES.decode(answer.tokens)
  one = engine.generate("a", temperature=0, max_tokens=10)
  assert one == [answers[1]]
  assert engine.generate([]) == []


def test_each_prompt_may_have_its_own_params(engine):
  params = [jc.SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5)]
  done = []
  answers = engine.generate(
    ["a", "b"], params, progress=lambda *numbers: done.append(numbers)
  )
  assert [len(answer.tokens) for answer in answers] == [1, 5]
  assert done == [(1, 2), (2, 2)]
  with pytest.raises(ValueError, match="3 prompts have params for 2"):
    engine.generate(["a", "b", "c"], params)


def test_stop_texts_are_cut_and_never_shown(engine):
  usual = engine.generate(
    "xy", temperature=1, seed=4, max_tokens=40, ignore_eos=True
  )[0]
  stop = usual.text[5:8]
  assert stop
  pieces = list(
    engine.stream(
      "xy", temperature=1, seed=4, max_tokens=40, ignore_eos=True, stop=(stop,)
    )
  )
  text = "".join(event.text for event in pieces)
  assert text == usual.text[: usual.text.index(stop)]
  assert pieces[-1].finish_reason == "stop"


def test_a_stream_that_is_left_ends_its_request(engine):
  stream = engine.stream("abc", max_tokens=100, ignore_eos=True)
  next(stream)
  stream.close()
  assert not engine.core.has_work
  assert engine.core.scheduler.pool.held == 0


def test_streams_run_by_turns_and_lose_nothing(engine):
  how = dict(temperature=0, max_tokens=8, ignore_eos=True)
  alone = [engine.generate(text, **how)[0].tokens for text in ("a", "bc")]
  one, two = (engine.stream(text, **how) for text in ("a", "bc"))
  found = [[], []]
  for pair in zip(one, two, strict=True):
    for tokens, event in zip(found, pair, strict=True):
      tokens += event.tokens
    if len(found[0]) == 3:
      # Another that comes to its end in between, and one that is left.
      assert engine.generate("a", **how)[0].tokens == alone[0]
      engine.stream("d", **how).close()
  assert found == alone
  assert not engine.core.has_work


def test_tokens_are_integers(engine):
  with pytest.raises(TypeError):
    engine.generate([[1.5]])


def test_requests_with_several_adapters_run_side_by_side(
  engine, model, adapters
):
  """As the merged models do alone."""
  names = [None, "wide", "narrow", "wide"]
  prompts = [tuple(range(20, 20 + n)) for n in (30, 30, 30, 7)]
  from jaxchunk.inference.core import Request

  params = jc.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
  for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
    engine.core.add(
      Request(
        request_id=str(number), prompt=prompt, params=params, adapter=name
      )
    )
  tokens = [[] for _ in names]
  while engine.core.has_work:
    for event in engine.core.step():
      tokens[int(event.sequence.request_id)] += event.tokens
  for name, prompt, got in zip(names, prompts, tokens, strict=True):
    alone = model if name is None else merge_lora(adapters[name])
    assert got == list(generate(alone, prompt, max_new_tokens=12))
  # Equal prompts of different adapters share no keys.
  assert len({tuple(got) for got in tokens[:3]}) == 3
  answer = engine.generate([prompts[1]], params, adapter="wide")[0]
  assert answer.tokens == tokens[1]


def test_adapters_that_do_not_fit_are_named(model):
  with pytest.raises(ValueError, match="adapter 'a': the model has no adapt"):
    jc.Engine(model, adapters={"a": model}, **SMALL)
  dora = add_lora(model, LoRA(rank=2, dora=True))
  with pytest.raises(ValueError, match="'a' is a DoRA"):
    jc.Engine(model, adapters={"a": dora}, **SMALL)


def test_texts_of_a_form(engine):
  pytest.importorskip("llguidance")
  schema = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
  }
  answers = engine.generate(
    ["x"] * 3, guide={"json": schema}, max_tokens=90, seed=1, n=1
  )
  for answer in answers:
    assert answer.completions[0].finish_reason == "stop"
    assert set(json.loads(answer.text)) == {"a"}
  answer = engine.generate("x", guide={"choice": ["yes", "no"]}, n=4)[0]
  assert {one.text for one in answer.completions} <= {"yes", "no"}
  answer = engine.generate("x", guide={"regex": "[ab]{3}c"})[0]
  assert len(answer.text) == 4 and answer.text[3] == "c"
  with pytest.raises(RequestError, match="invalid regex"):
    engine.generate("x", guide={"regex": "("})
  assert not engine.core.has_work


@dataclasses.dataclass(frozen=True)
class Backwards:
  """Shows all pages, the last full one first: only their order changes."""

  name: str = "backwards"
  beside: bool = True

  def select(self, q, pages, layer, view, q_positions):
    del q, layer, q_positions
    Z = pages.k.shape[3]
    full = view.lengths[..., None] // Z
    at = jax.numpy.arange(view.table.shape[-1])[None, None]
    turned = jax.numpy.where(at < full, full - 1 - at, at)
    table = jax.numpy.take_along_axis(view.table, turned, axis=-1)
    return dataclasses.replace(view, table=table)


def test_a_selector_sees_every_layers_queries_and_pages(model, engine):
  prompts = [tuple(range(10, 10 + n)) for n in (40, 23, 3)]
  how = dict(temperature=0, max_tokens=12, ignore_eos=True)
  usual = engine.generate(prompts, **how)
  turned = jc.Engine(model, selector=Backwards(), **SMALL)
  assert turned.runners[0].state.pages[0].positions is not None
  answers = turned.generate(prompts, **how)
  assert [a.tokens for a in answers] == [a.tokens for a in usual]


def test_keeping_all_changes_nothing(engine):
  """What other compactors will be held against."""
  pages = engine.runners[0].state.pages[0]
  view = object()
  assert KeepAll().compact(pages, view, None) == (pages, view)


def test_pages_of_eight_bits_change_little(model):
  """Next to nothing at the logits, so that a few tokens stay the same."""
  prompts = [tuple(range(10, 10 + n)) for n in (40, 23)]
  plain = jc.Engine(model, **SMALL).generate(prompts, max_tokens=1, logprobs=5)
  for kv_dtype, most in (("int8", 0.05), ("float8_e4m3fn", 0.3)):
    engine = jc.Engine(model, kv_dtype=kv_dtype, **SMALL)
    narrow = engine.generate(prompts, max_tokens=1, logprobs=5)
    for one, two in zip(plain, narrow, strict=True):
      a = dict(one.completions[0].logprobs[0].top)
      b = dict(two.completions[0].logprobs[0].top)
      common = a.keys() & b.keys()
      assert len(common) >= 3
      assert max(abs(a[token] - b[token]) for token in common) < most
    pages = engine.runners[0].state.pages[0]
    assert pages.k.dtype == kv_dtype and pages.k_scale is not None


@pytest.mark.fast
@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(max_sequences=0), "max_sequences=0 must be"),
    (dict(step_tokens=8, max_sequences=9), "step_tokens=8 must be at least"),
    (dict(scheduler="x"), "scheduler='x' must be one of"),
    (dict(kv_dtype="int4"), "kv_dtype='int4' must be one of"),
    (dict(kv_gib=0), "kv_gib=0 must be positive"),
    (dict(step_sizes=(1, 8)), r"step_sizes=\(1, 8\) must be"),
    (dict(max_slowdown=1), "max_slowdown=1 must be above 1"),
  ],
)
def test_impossible_sizes_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(EngineConfig(), **fields).check()


@pytest.mark.fast
@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(temperature=-1), "temperature=-1 must be from 0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_p=0), "top_p=0 must be from 1e-06"),
    (dict(top_k=0), "top_k=0 must be from 1"),
    (dict(n=0), "n=0 must be from 1"),
    (dict(max_tokens=0), "max_tokens=0"),
    (dict(max_tokens=1.5), "max_tokens=1.5 must be an integer"),
    (dict(seed=2**32), "seed=4294967296"),
    (dict(stop="a"), "stop='a' must be texts"),
    (dict(stop=("",)), "none of them empty"),
    (dict(logit_bias={-1: 1}), "no token id"),
    (dict(logprobs=21), "logprobs=21 must be from 0 to 20"),
    (dict(repetition_penalty=0), "repetition_penalty=0 must be from 0.01"),
    (dict(logit_bias={1: float("inf")}), "not from -10000 to 10000"),
    (dict(min_p=True), "min_p=True must be a number"),
  ],
)
def test_absurd_params_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    jc.SamplingParams(**fields)


def test_a_length_beyond_the_models_is_named(model):
  cfg = dataclasses.replace(CONFIG, context_length=64)
  longer = random_model(cfg.frozen())
  with pytest.raises(ValueError, match="max_length=128 is more than"):
    jc.Engine(longer, **SMALL)
