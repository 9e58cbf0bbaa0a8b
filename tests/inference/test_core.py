"""The engine against one prompt at a time, over random traces."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from jaxchunk.inference.core import EngineCore, Request, RequestError
from jaxchunk.inference.draw import Drawn
from jaxchunk.inference.engine import EngineConfig, step_shapes
from jaxchunk.inference.generate import generate
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.runner import DeviceRunner
from jaxchunk.inference.scheduler import SCHEDULERS, Limits
from jaxchunk.inference.swap import PageSwap
from jaxchunk.kv.paged import paged_states
from jaxchunk.kv.pool import PagePool
from jaxchunk.kv.tiers import HostTier
from tests.inference.conftest import make_model

PAGE, PAGES, LENGTH = 4, 96, 96
SIZES = EngineConfig(
  max_sequences=4, step_tokens=16, page_size=PAGE, query_block=4
)
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def model():
  return make_model(pattern=(None, 24), num_layers=3)


@pytest.fixture(scope="module")
def runner(model):
  runner = DeviceRunner(
    model,
    states=paged_states(model.cfg, page_size=PAGE),
    shapes=step_shapes(SIZES, LENGTH),
    num_pages=PAGES,
    ends=(2,),
  )
  runner.compile_copies(256 // PAGE)
  return runner


@pytest.fixture(scope="module")
def alone(model):
  """What a prompt continues with when nothing else runs."""
  known = {}

  def tokens(prompt, number):
    if (prompt, number) not in known:
      stream = generate(
        model, prompt, max_new_tokens=number, chunk_size=32, eos_id=2
      )
      known[prompt, number] = list(stream)
    return known[prompt, number]

  return tokens


def make_core(
  runner,
  *,
  pages=PAGES,
  scheduler="stall_free",
  caching=True,
  tier=None,
  **more,
):
  sizes = tuple(shape.tokens for shape in step_shapes(SIZES, LENGTH))
  limits = Limits(
    tokens=sizes[-1], sequences=4, prompts=SIZES.prompts_at_once, shapes=sizes
  )
  pool = PagePool(pages, PAGE, caching=caching)
  swap = None
  if tier is not None:
    swap = PageSwap(
      runner, tier, page_size=PAGE, num_pages=PAGES, sharing=caching
    )
  return EngineCore(
    runner,
    SCHEDULERS[scheduler](limits, pool, swap),
    vocab_size=61,
    max_length=LENGTH,
    ends=(2,),
    swap=swap,
    **more,
  )


def run(core, requests=(), late=None):
  """All events' tokens and reasons, by request and index."""
  for request in requests:
    core.add(request)
  tokens, reasons = {}, {}
  for number in itertools.count():
    for action in (late or {}).pop(number, ()):
      action()
    if not core.has_work and not late:
      break
    assert number < 2000
    for event in core.step():
      key = event.sequence.request_id, event.sequence.index
      tokens.setdefault(key, []).extend(event.tokens)
      if event.finish_reason is not None:
        assert key not in reasons
        reasons[key] = event.finish_reason
    scheduler = core.scheduler
    scheduler.pool.check([s.pages for s in scheduler.running])
  assert core.scheduler.pool.held == 0
  return tokens, reasons


def draw_prompts(rng, number):
  """Prompts that begin alike more often than not."""
  common = [rng.integers(3, 61, 40).tolist() for _ in range(2)]
  prompts = []
  for _ in range(number):
    shared = common[rng.integers(2)][: rng.integers(0, 41)]
    own = rng.integers(3, 61, rng.integers(1, 24)).tolist()
    prompts.append(tuple(shared + own))
  return prompts


WAYS = {
  "plain": dict(caching=False),
  "cached": {},
  "few pages": dict(pages=28),
  "few pages, past-future": dict(pages=28, scheduler="past_future"),
  "parked": dict(pages=28, caching=False, host=True),
  "parked and shared": dict(pages=28, host=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_random_traces_equal_one_at_a_time(runner, alone, way):
  options = dict(WAYS[way])
  host = options.pop("host", False)
  totals = dict(preemptions=0, cached=0, resumed=0, cancelled=0)
  for seed in range(12):
    rng = np.random.default_rng([seed, len(way)])
    tier = HostTier(2**24) if host else None
    core = make_core(runner, tier=tier, **options)
    requests, late = [], {}
    for number, prompt in enumerate(draw_prompts(rng, 8)):
      params = dataclasses.replace(
        GREEDY, max_tokens=int(rng.integers(1, 20)), n=int(rng.integers(1, 3))
      )
      request = Request(
        request_id=f"r{number}",
        prompt=prompt,
        params=params,
        priority=int(rng.integers(2)),
      )
      requests.append(request)
      at = int(rng.integers(0, 12))
      late.setdefault(at, []).append(functools.partial(core.add, request))
      if rng.random() < 0.2:
        stop = at + int(rng.integers(1, 8))
        cancel = functools.partial(core.cancel, request.request_id)
        late.setdefault(stop, []).append(cancel)
    tokens, reasons = run(core, late=late)
    for request in requests:
      expected = alone(request.prompt, request.params.max_tokens)
      for index in range(request.params.n):
        key = request.request_id, index
        got = tokens.get(key, [])
        if reasons[key] == "cancelled":
          totals["cancelled"] += 1
          assert got == expected[: len(got)]
        else:
          assert got == expected, (seed, key)
    totals["preemptions"] += core.stats.preemptions
    totals["cached"] += core.stats.cached_tokens
    if tier is not None:
      totals["resumed"] += core.swap.stats.resumed
      tier.close()
  assert totals["cancelled"] > 5
  # Who looks ahead need not take pages back.
  few = "pages" in options and "scheduler" not in options
  assert (totals["preemptions"] > 5) == few, totals
  assert (totals["cached"] > 0) == (options.get("caching", True) or host)
  assert (totals["resumed"] > 0) == host


def test_chunks_come_back_from_the_host(runner, alone):
  """A prompt that the device has forgotten."""
  tier = HostTier(2**26)
  core = make_core(runner, tier=tier)
  # A chunk here is longer than a sequence can be: take smaller ones.
  core.swap.group = 2
  prompt = tuple(range(3, 60))
  requests = [Request(request_id="a", prompt=prompt, params=GREEDY)]
  core.swap._copier = Grouped(runner, 2)
  run(core, requests)
  core.scheduler.pool.forget()
  before = core.stats.prompt_tokens
  tokens, _ = run(core, [dataclasses.replace(requests[0], request_id="b")])
  assert tokens["b", 0] == alone(prompt, 8)
  assert core.swap.stats.restored == 56
  # The last token runs again, for the logits behind it.
  assert core.stats.prompt_tokens == before + 1
  # A damaged copy is not used.
  core.scheduler.pool.forget()
  entry = next(e for key, e in tier._entries.items() if key[0] == "chunk")
  entry.leaves[0][...] += 1
  tokens, _ = run(core, [dataclasses.replace(requests[0], request_id="c")])
  assert tokens["c", 0] == alone(prompt, 8)
  assert tier.stats.damaged == 1
  tier.close()


class Grouped:
  """Copies in other groups than those that were compiled."""

  def __init__(self, runner, group):
    self._runner, self._group = runner, group
    self._whole = 256 // PAGE

  def read(self, numbers):
    padded = np.resize(numbers, self._whole)
    copies = self._runner.read(padded)
    return _cut(copies, self._group)

  def write(self, numbers, copies):
    padded = np.full(self._whole, PAGES, np.int32)
    padded[: self._group] = numbers
    self._runner.write(padded, _widened(copies, self._whole))


def _cut(copies, group):
  import jax

  return jax.tree.map(lambda a: a[:, :, :group], copies)


def _widened(copies, whole):
  import jax

  def widen(a):
    short = whole - a.shape[2]
    return np.pad(a, [(0, 0), (0, 0), (0, short), *[(0, 0)] * (a.ndim - 3)])

  return jax.tree.map(widen, copies)


def test_draws_do_not_depend_on_the_batch(runner):
  params = SamplingParams(
    temperature=1.0, seed=5, max_tokens=8, ignore_eos=True, top_p=0.9
  )
  prompts = draw_prompts(np.random.default_rng(1), 6)
  requests = [
    Request(request_id=str(n), prompt=prompt, params=params)
    for n, prompt in enumerate(prompts)
  ]
  together, _ = run(make_core(runner), requests)
  for request in requests:
    own, _ = run(make_core(runner, caching=False), [request])
    assert own == {key: together[key] for key in own}
  assert len({tuple(tokens) for tokens in together.values()}) == 6


def test_equal_seeds_continue_alike_and_others_do_not(runner):
  params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=3)
  one = Request(request_id="a", prompt=(5, 6, 7), params=params)
  two = Request(
    request_id="b",
    prompt=(5, 6, 7),
    params=dataclasses.replace(params, seed=6, n=1),
  )
  tokens, _ = run(make_core(runner), [one, two])
  assert tokens["a", 1] == tokens["b", 0]
  assert tokens["a", 0] != tokens["a", 1]


def test_penalties_biases_and_min_tokens(runner, alone):
  prompt = (5, 6, 7)
  usual = alone(prompt, 12)
  base = dataclasses.replace(GREEDY, max_tokens=12, ignore_eos=True)
  forced = dataclasses.replace(base, logit_bias={11: 1e4})
  never = dataclasses.replace(base, frequency_penalty=100.0)
  stop = dataclasses.replace(base, stop_token_ids=(usual[0],))
  later = dataclasses.replace(stop, min_tokens=5)
  names = dict(forced=forced, never=never, stop=stop, later=later)
  requests = [
    Request(request_id=name, prompt=prompt, params=params)
    for name, params in names.items()
  ]
  core = make_core(runner)
  tokens, reasons = run(core, requests)
  assert tokens["forced", 0] == [11] * 12
  assert len(set(tokens["never", 0])) == 12
  assert ("stop", 0) not in tokens or tokens["stop", 0] == []
  assert reasons["stop", 0] == "stop"
  assert len(tokens["later", 0]) >= 5
  assert usual[0] not in tokens["later", 0][:5]


def test_logprobs_are_the_models(runner, model):
  params = dataclasses.replace(GREEDY, logprobs=3, max_tokens=3)
  core = make_core(runner)
  core.add(Request(request_id="a", prompt=(5, 6, 7), params=params))
  row, found = [5, 6, 7], []
  while core.has_work:
    for event in core.step():
      found += event.logprobs
  for one in found:
    logits = np.asarray(model(np.asarray([row])), np.float64)[0, -1]
    log_p = logits - np.log(np.sum(np.exp(logits)))
    best = np.argsort(-log_p)[:3]
    assert [token for token, _ in one.top] == best.tolist()
    np.testing.assert_allclose(
      [value for _, value in one.top], log_p[best], atol=1e-5
    )
    np.testing.assert_allclose(one.logprob, log_p[one.token], atol=1e-5)
    row.append(one.token)
  assert len(found) == 3


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(prompt=()), "no token"),
    (dict(prompt=(61,)), "token 61"),
    (dict(prompt=(3,) * 96), "96 tokens"),
    (dict(adapter="x"), "no adapter 'x'"),
    (dict(params=SamplingParams(max_tokens=95)), "max_tokens=95"),
    (dict(params=SamplingParams(stop=("a",))), "need a tokenizer"),
    (dict(params=SamplingParams(logit_bias={61: 1})), "token 61"),
    (dict(params=SamplingParams(guide={"regex": "a"})), "guides no texts"),
  ],
)
def test_bad_requests_are_named(runner, change, message):
  core = make_core(runner)
  request = Request(request_id="a", prompt=(5, 6))
  with pytest.raises(RequestError, match=message):
    core.add(dataclasses.replace(request, **change))
  assert not core.has_work


class Breaks:
  """A guide that fails with its third token."""

  def __init__(self, spec):
    self.left = spec["after"]

  def allowed(self):
    return np.full(2, 0xFFFFFFFF, np.uint32)

  def accept(self, token):
    self.left -= 1
    if not self.left:
      raise RuntimeError("lost")
    return True


def test_a_guide_that_fails_ends_its_own_text_alone(runner, alone):
  core = make_core(runner, guides=Breaks)
  guided = dataclasses.replace(GREEDY, guide={"after": 3}, ignore_eos=True)
  prompt = (5, 6, 7)
  requests = [
    Request(request_id="a", prompt=prompt, params=guided),
    Request(request_id="b", prompt=prompt, params=GREEDY),
  ]
  tokens, reasons = run(core, requests)
  assert reasons["a", 0] == "cancelled"
  assert len(tokens["a", 0]) == 2
  assert tokens["b", 0] == alone(prompt, 8)


class Null:
  """A runner without a model."""

  def __init__(self):
    self.time = 0.0

  def dispatch(self, plan):
    works = [work for work in plan.works if work.draws]
    self.time += 1
    return NullTicket(works)

  def now(self):
    return self.time


@dataclasses.dataclass
class NullTicket:
  works: list

  def result(self):
    tokens = np.full(len(self.works), 3)
    return Drawn(tokens, tokens, tokens, tokens)


@pytest.mark.fast
def test_continuations_never_wait_for_a_prompt():
  core = make_core(Null(), pages=200)
  short = SamplingParams(max_tokens=40)
  core.add(Request(request_id="short", prompt=(3,), params=short))
  core.step(), core.step()
  core.add(Request(request_id="long", prompt=(4,) * 88, params=GREEDY))
  came = []
  while core.has_work:
    came += [
      event.time
      for event in core.step()
      if event.sequence.request_id == "short"
    ]
  # A token in each step.
  assert len(came) == 39
  assert max(np.diff(came)) == 1
