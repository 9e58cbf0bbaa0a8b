"""Random engines over random traces, against what each text must be.

An oracle takes the device's place. For every slot of every page it keeps a hash
of all that a true key depends on: the tokens up to there, their adapter and
their positions. Behind every draw it compares all keys that are read with those
that the sequence must have, and it makes the token from the last of them.
"""

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest

from jaxchunk.inference.core import EngineCore, Request
from jaxchunk.inference.cost import LinearCost
from jaxchunk.inference.draw import Drawn
from jaxchunk.inference.engine import EngineConfig, step_shapes
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.runner import Assembler
from jaxchunk.inference.scheduler import SCHEDULERS, Limits
from jaxchunk.inference.swap import PageSwap
from jaxchunk.kv.pool import PagePool
from jaxchunk.kv.tiers import HostTier

pytestmark = pytest.mark.fast

VOCAB = 61
END = 2
ADAPTERS = {"a": 0, "b": 1}
BLOCK = 32
"""Seeds of a test."""


def next_key(before, token, adapter, position):
  mixed = before * 1000003 + token * 7919 + adapter * 104729 + position * 31
  return (mixed + 12345) % (2**31 - 1)


def draw_token(key, seed, position, params, *, counts, guide, number):
  """The first token that may come, from one on that all of these choose.

  Args:
    key: Of the token before.
    seed: Of the sequence.
    position: Of the token.
    params: Of the request.
    counts: How often each token came since the prompt.
    guide: Of the sequence, or `None`.
    number: Which new token it is, from 0.
  """
  chosen = key * 31 + seed * 977 + position
  if params.counts_tokens:
    chosen += int(counts @ np.arange(1, VOCAB + 1)) * 13
  banned = ()
  if number < params.min_tokens:
    banned = END, *params.stop_token_ids
  for token in itertools.chain(range(chosen % VOCAB, VOCAB), range(VOCAB)):
    if token not in banned and (guide is None or guide.allows(token)):
      return token
  raise AssertionError("no token may come")


class Thirds:
  """Lets the n-th token be one of a third of all, and ends after so many."""

  def __init__(self, spec):
    self._number, self._most = 0, spec["tokens"]

  def allows(self, token):
    return token % 3 == self._number % 3

  def accept(self, token):
    assert self.allows(token)
    self._number += 1
    return self._number < self._most


def continue_alone(request, index, max_length):
  """The tokens that a continuation must have, and why it ends."""
  params = request.params
  adapter = ADAPTERS.get(request.adapter, -1)
  seed = (params.seed + index) % 2**32
  guide = None if params.guide is None else Thirds(params.guide)
  counts, tokens, key = np.zeros(VOCAB, int), [], 0
  for position, token in enumerate(request.prompt):
    key = next_key(key, token, adapter, position)
  most = min(params.max_tokens, max_length - len(request.prompt))
  while True:
    number, position = len(tokens), len(request.prompt) + len(tokens)
    token = draw_token(
      key, seed, position, params, counts=counts, guide=guide, number=number
    )
    at_end = token == END and not params.ignore_eos
    at_stop = at_end or token in params.stop_token_ids
    if at_stop and number >= params.min_tokens:
      return tokens, "stop"
    tokens.append(token)
    if guide is not None and not guide.accept(token):
      return tokens, "stop"
    if len(tokens) == most:
      return tokens, "length"
    counts[token] += 1
    key = next_key(key, token, adapter, position)


@dataclasses.dataclass
class OracleTicket:
  works: list
  tokens: np.ndarray
  error: BaseException | None = None

  def result(self):
    if self.error is not None:
      raise self.error
    if not self.works:
      return None
    return Drawn(self.tokens, self.tokens, self.tokens, self.tokens)


class Oracle:
  """A runner whose keys tell what they were made of."""

  def __init__(self, shapes, page_size, num_pages):
    self._shapes = {shape.tokens: shape for shape in shapes}
    self._assembler = Assembler(self._shapes, page_size, num_pages)
    self._page_size, self._num_pages = page_size, num_pages
    slots = shapes[0].max_sequences
    self._keys = np.full(num_pages * page_size, -1)
    self._last = np.zeros(slots, int)
    self._counts = np.zeros((slots, VOCAB), int)
    # What is true of each sequence, whatever its slot and its pages.
    self._drawn = {}
    self._chains = collections.defaultdict(list)
    self._time = 0.0
    self.scheduler = None
    # The step that raises: before it, behind it, or when it is waited for.
    self.error, self.error_at, self.error_when = None, None, "before"
    self.dispatched = 0

  def now(self):
    self._time += 0.001
    return self._time

  def read(self, numbers):
    pages = self._keys.reshape(self._num_pages, -1)
    return {"keys": pages[np.minimum(numbers, self._num_pages - 1)]}

  def write(self, numbers, copies):
    pages, held = self._keys.reshape(self._num_pages, -1), self._holders()
    for page, keys in zip(numbers, copies["keys"], strict=True):
      if page < self._num_pages:
        assert not held[page], "a copy replaces what others read"
        pages[page] = keys

  def _holders(self):
    running = self.scheduler.running
    return collections.Counter(page for s in running for page in s.pages)

  def dispatch(self, plan):
    fails = self.dispatched == self.error_at
    self.dispatched += 1
    if fails and self.error_when == "before":
      raise self.error
    ticket = self._run(plan)
    if fails and self.error_when == "behind":
      raise self.error
    return dataclasses.replace(ticket, error=self.error if fails else None)

  def _run(self, plan):
    self._begin(plan)
    tokens = self._assembler.round_up(plan.tokens)
    shape = self._shapes[tokens]
    whole, v = shape.packing.empty()
    whole[:] = self._assembler.pack(plan.works, tokens)
    sequences = {work.sequence for work in plan.works}
    assert len(sequences) == len(plan.works) <= shape.sequences
    owners = self._owners(v, shape)
    real = np.flatnonzero(v["positions"] >= 0)
    assert len(real) == plan.tokens
    assert sorted(owners) == real.tolist()
    padding = v["slots"][v["positions"] < 0]
    assert (padding >= self._keys.size).all(), "padding is written"
    self._write_keys(v, owners)
    return self._draw(v, owners, plan.works)

  def _begin(self, plan):
    now = {work.sequence for work in plan.works if work.draws}
    for sequence, _ in plan.admitted:
      # Or one of its tokens would be missing among the counts.
      assert sequence.pending == (sequence in now)
      since = sequence.tokens[sequence.prompt_length :]
      self._counts[sequence.slot] = np.bincount(since, minlength=VOCAB)

  def _owners(self, v, shape):
    """Which work each token is of, as rows of queries say."""
    single, several, _ = v["numbers"]
    owners = {}
    for name, rows in (("single", single), ("several", several)):
      for row in range(rows):
        indices = v[f"{name}_index"][row]
        positions = v[f"{name}_positions"][row]
        used = indices < shape.tokens
        assert used.any() and (positions[~used] == -1).all()
        indices = indices[used]
        assert (positions[used] == v["positions"][indices]).all()
        assert owners.keys().isdisjoint(indices.tolist()), "two rows of a token"
        owners |= dict.fromkeys(indices.tolist(), v[f"{name}_owner"][row])
    return owners

  def _slots_of(self, table, positions):
    Z = self._page_size
    return table[positions // Z] * Z + positions % Z

  def _write_keys(self, v, owners):
    held, written = self._holders(), set()
    for index in sorted(owners):
      position, slot = int(v["positions"][index]), int(v["slots"][index])
      table = v["tables"][owners[index], 0]
      assert slot == self._slots_of(table, position)
      assert slot not in written, "two tokens in one slot"
      written.add(slot)
      assert held[slot // self._page_size] == 1, "a shared page is written"
      token = int(v["tokens"][index])
      if token < 0:
        token = int(self._last[-1 - token])
      before = 0
      if position:
        before = int(self._keys[self._slots_of(table, position - 1)])
      adapter = int(v["adapters"][index])
      self._keys[slot] = next_key(before, token, adapter, position)

  def _draw(self, v, owners, works):
    rows = [work for work in works if work.draws]
    assert v["numbers"][2] == len(rows)
    tokens = np.zeros(len(rows), int)
    for row, work in enumerate(rows):
      sequence, slot = work.sequence, v["draw_slot"][row]
      index = int(v["draw_index"][row])
      owner, position = owners[index], int(v["positions"][index])
      assert works[owner] is work and slot == sequence.slot
      assert v["lengths"][owner, 0] == v["position"][row] == position + 1
      key = self._check_keys(sequence, v["tables"][owner, 0], position + 1)
      tokens[row] = token = draw_token(
        key,
        int(v["seed"][row]),
        position + 1,
        sequence.params,
        counts=self._counts[slot],
        guide=sequence.guide,
        number=sequence.drawing,
      )
      self._last[slot] = self._drawn[sequence] = token
      self._counts[slot, token] += 1
    return OracleTicket(rows, tokens)

  def _check_keys(self, sequence, table, length):
    """The last of the keys that a query reads, if all are right."""
    true = self._chains[sequence]
    while len(true) < length:
      position = len(true)
      if position < len(sequence.tokens):
        token = sequence.tokens[position]
      else:
        token = self._drawn[sequence]
      before = true[-1] if true else 0
      true.append(next_key(before, token, sequence.adapter, position))
    found = self._keys[self._slots_of(table, np.arange(length))]
    wrong = np.flatnonzero(found != true[:length])
    assert not wrong.size, (sequence.request_id, sequence.index, wrong)
    return true[length - 1]


@dataclasses.dataclass
class Trial:
  """An engine, and what comes to it at which step."""

  core: EngineCore
  tier: HostTier | None
  sequences: int
  requests: dict
  cancels: dict


def draw_trial(rng):
  sequences = rng.choice([1, 1, 2, 3, 5, 8])
  page_size = rng.choice([1, 2, 4, 16])
  length = rng.choice([8, 40, 96])
  config = EngineConfig(
    max_sequences=sequences,
    step_tokens=max(sequences, rng.choice([1, 2, 3, 7, 16, 33])),
    page_size=page_size,
    query_block=rng.choice([1, 2, 4, 64]),
    prompts_at_once=rng.choice([1, 2, 4]),
    max_slowdown=rng.choice([None, 1.5]),
    scheduler=rng.choice(list(SCHEDULERS)),
    prefix_cache=rng.random() < 0.7,
  )
  if rng.random() < 0.4:
    top = config.step_tokens
    sizes = {top, *(rng.randint(1, top) for _ in range(rng.randint(0, 3)))}
    config = dataclasses.replace(config, step_sizes=tuple(sorted(sizes)))
  one = -(-length // page_size)
  num_pages = max(2, rng.choice([one, one + 1, one * sequences, 3, 12]))
  core, tier = make_core(rng, config, length, num_pages)
  requests, cancels = draw_trace(rng, core.max_length)
  return Trial(core, tier, sequences, requests, cancels)


def make_core(rng, config, length, num_pages):
  shapes = step_shapes(config, length)
  limits = Limits(
    tokens=config.step_tokens,
    sequences=config.max_sequences,
    prompts=config.prompts_at_once,
    shapes=tuple(shape.tokens for shape in shapes),
    slowdown=config.max_slowdown,
  )
  oracle = Oracle(shapes, config.page_size, num_pages)
  pool = PagePool(num_pages, config.page_size, caching=config.prefix_cache)
  tier = swap = None
  if rng.random() < 0.5:
    capacity = rng.choice([2**10, 2**14, 2**24])
    tier = HostTier(capacity, on_the_way=rng.choice([1, 64]))
    swap = PageSwap(
      oracle,
      tier,
      page_size=config.page_size,
      num_pages=num_pages,
      sharing=config.prefix_cache,
    )
    # A chunk of 256 tokens is longer than a sequence here.
    swap.group = rng.choice([1, 2, 5])
  cost = LinearCost(step=1, token=0.1, key=0.01)
  scheduler = SCHEDULERS[config.scheduler](limits, pool, swap, cost=cost)
  oracle.scheduler = scheduler
  core = EngineCore(
    oracle,
    scheduler,
    vocab_size=VOCAB,
    max_length=length,
    ends=(END,),
    adapters=ADAPTERS,
    swap=swap,
    guides=Thirds,
    seed=0,
  )
  return core, tier


def draw_trace(rng, max_length):
  """Requests by the steps before which they come, and whom to cancel when."""
  commons = [draw_tokens(rng, max_length) for _ in range(2)]
  requests = collections.defaultdict(list)
  cancels = collections.defaultdict(list)
  for number in range(rng.randint(3, 14)):
    most = rng.choice([max_length - 1, -(-max_length // 4)])
    length = rng.randint(1, most)
    shared = rng.choice(commons)[: rng.randint(0, length)]
    request = Request(
      request_id=f"r{number}",
      prompt=(*shared, *draw_tokens(rng, length - len(shared))),
      params=draw_params(rng, max_length - length),
      adapter=rng.choice([None, None, *ADAPTERS]),
      priority=rng.choice([0, 0, 1, 2]),
    )
    requests[rng.randint(0, 20)].append(request)
    if rng.random() < 0.25:
      cancels[rng.randint(0, 50)].append(request.request_id)
  return requests, cancels


def draw_tokens(rng, number):
  return [rng.randrange(VOCAB) for _ in range(number)]


def draw_params(rng, most):
  guide = rng.choice([None, None, None, dict(tokens=rng.randint(1, 9))])
  return SamplingParams(
    max_tokens=rng.choice([most, rng.randint(1, most)]),
    min_tokens=rng.choice([0, 0, 1, rng.randint(1, 20)]),
    n=rng.choice([1, 1, 1, 2, 4]),
    seed=rng.randrange(2**32),
    ignore_eos=rng.random() < 0.7,
    stop_token_ids=rng.choice([(), (), (5, 6, 7, 8)]),
    presence_penalty=rng.choice([0, 0, 1.0]),
    guide=guide,
  )


def run(trial):
  """All events' tokens and reasons, by request and index."""
  core, scheduler = trial.core, trial.core.scheduler
  requests, cancels = dict(trial.requests), dict(trial.cancels)
  tokens, reasons = collections.defaultdict(list), {}
  idle = 0
  for number in itertools.count():
    if not (core.has_work or requests or cancels):
      break
    assert number < 20_000
    for request in requests.pop(number, ()):
      core.add(request)
    for name in cancels.pop(number, ()):
      core.cancel(name)
    before = core.stats.steps
    for event in core.step():
      key = event.sequence.request_id, event.sequence.index
      assert key not in reasons, "an event behind the end"
      tokens[key] += event.tokens
      if event.finish_reason is not None:
        reasons[key] = event.finish_reason
    scheduler.pool.check([s.pages for s in scheduler.running])
    check_slots(trial)
    stands = core.stats.steps == before and core.num_live
    idle = idle + 1 if stands else 0
    assert idle < 3, "steps do nothing"
  return tokens, reasons


def check_slots(trial):
  scheduler = trial.core.scheduler
  slots = [*scheduler._slots, *(s.slot for s in scheduler.running)]
  assert sorted(slots) == list(range(trial.sequences))


def check_texts(trial, tokens, reasons):
  """That all came which had to, and nothing else."""
  seen = set()
  for request in itertools.chain(*trial.requests.values()):
    for index in range(request.params.n):
      key = request.request_id, index
      seen.add(key)
      true, why = continue_alone(request, index, trial.core.max_length)
      if reasons[key] == "cancelled":
        assert tokens[key] == true[: len(tokens[key])], key
      else:
        assert (tokens[key], reasons[key]) == (true, why), key
  assert seen == set(reasons)


def check_nothing_left(trial):
  core = trial.core
  assert core.scheduler.pool.held == 0
  assert not core.scheduler.running and not core.scheduler.num_waiting
  assert not core._live and not core._texts
  check_slots(trial)
  if core.swap is not None:
    assert not core.swap._parked and not core.swap._offered


def check_closed(tier):
  tier.close()
  assert not [key for key in tier._entries if key[0] == "parked"]
  assert tier.size == sum(entry.size for entry in tier._entries.values())
  assert tier.size <= tier.capacity


def check_seeds(first, check):
  """Checks an engine and a trace for each seed of a block.

  Returns:
    Counts of what happened, so that a test can tell that it tests something.
  """
  totals = collections.Counter()
  for seed in range(first, first + BLOCK):
    rng = random.Random(seed)
    trial = draw_trial(rng)
    try:
      check(rng, trial)
      check_nothing_left(trial)
      if trial.tier is not None:
        check_closed(trial.tier)
    except Exception as error:
      error.add_note(f"seed {seed}")
      raise
    finally:
      if trial.tier is not None:
        trial.tier.close()
    totals["errors"] += trial.core.runner.dispatched - trial.core.stats.steps
    totals.update(dataclasses.asdict(trial.core.stats))
    if trial.core.swap is not None:
      totals.update(dataclasses.asdict(trial.core.swap.stats))
  return totals


def check_once(rng, trial):
  del rng
  check_texts(trial, *run(trial))


def check_after_an_error(rng, trial):
  """The same requests again, after an error in some step."""
  core, oracle = trial.core, trial.core.runner
  oracle.error = rng.choice([KeyboardInterrupt(), RuntimeError("no memory")])
  oracle.error_at = rng.randrange(40)
  oracle.error_when = rng.choice(["before", "behind", "waited for"])
  try:
    tokens, reasons = run(trial)
  except (KeyboardInterrupt, RuntimeError) as error:
    assert error is oracle.error
    check_nothing_left(trial)
    # Of those that were cancelled before.
    while core.has_work:
      for event in core.step():
        assert event.finish_reason == "cancelled"
    tokens, reasons = run(trial)
  check_texts(trial, tokens, reasons)


@pytest.mark.parametrize("block", range(4))
def test_every_text_is_right(block):
  totals = check_seeds(block * BLOCK, check_once)
  assert totals["preemptions"] > 5 and totals["resumed"] > 0, totals
  assert totals["cached_tokens"] > 100 and totals["wasted_tokens"] > 10, totals


@pytest.mark.parametrize("block", range(2))
def test_an_error_in_a_step_leaves_nothing_behind(block):
  totals = check_seeds(1000 + block * BLOCK, check_after_an_error)
  assert totals["errors"] > BLOCK // 2, totals
  assert totals["preemptions"] > 5 and totals["cached_tokens"] > 100, totals
