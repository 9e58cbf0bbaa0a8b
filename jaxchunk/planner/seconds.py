"""How long a step takes, by formula: a bound with a stated efficiency.

Of a lane products, at a share of the peak, run beside what is gathered or
visits other devices; what no product hides is added: partial sums over
"tensor", the passes over the gradients' accumulators. Lanes are dealt out to
groups as a run deals them, and the last group ends the step.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxchunk.chunking.balance import longest_processing_time
from jaxchunk.chunking.cost import (
  StepCost,
  forward_passes,
  layer_flops_per_token,
  plan_cost,
  runs_layer_outer,
)
from jaxchunk.chunking.memory import Strategy, state_bytes_per_token
from jaxchunk.chunking.plan import ChunkPlan, chunk_plan
from jaxchunk.models.config import ModelConfig
from jaxchunk.planner.candidates import Candidate, Request
from jaxchunk.planner.kept import Kept
from jaxchunk.planner.memory import Memory
from jaxchunk.planner.pipeline import pipeline_seconds, simulated_seconds

EFFICIENCY = 0.5
"""Share of the peak that products reach."""

_MOST_BATCHES = 8


class Step(NamedTuple):
  """A step's time, in the mean over some batches.

  Attributes:
    seconds: Until the last group is done and the parameters are updated.
    tokens: In the batch.
    flops_share: Products that training needs, over what all devices could do
      in that time at their peak (the MFU).
    products: Seconds of the busiest group's products alone.
    copies: Seconds of what it sends or copies.
    padding: Share of the chunks' tokens.
  """

  seconds: float
  tokens: float
  flops_share: float
  products: float
  copies: float
  padding: float

  @property
  def tokens_per_second(self) -> float:
    """Of all devices."""
    return self.tokens / self.seconds


class Sent(NamedTuple):
  """Bytes that a device sends for a lane.

  Attributes:
    gathered: Parameters, and gradients scattered, over what shares them.
    visits: Queries, and what comes back, over "context".
    partial: Partial sums over "tensor".
  """

  gathered: float
  visits: float
  partial: float


def sent_bytes(
  cfg: ModelConfig, kept: Kept, candidate: Candidate, chunks: int
) -> Sent:
  """What a device sends for a lane; `sharding.traffic` counts it exactly.

  Args:
    cfg: The model.
    kept: Of the layout, see `Memory.kept`.
    candidate: How it runs.
    chunks: Of the lane.
  """
  layout = candidate.layout
  item = jnp.dtype(cfg.dtype).itemsize
  forward = sum(
    forward_passes(chunks, candidate.live_chunks, candidate.strategy)
  )
  layers = cfg.num_layers // layout.stage
  gathered = _gathered(kept, candidate, chunks, forward)
  tokens = candidate.chunk_size // layout.context
  query = tokens * cfg.num_heads // layout.tensor * cfg.head_width * item
  # Forward q and o, backward q, o, do, and dq in twice the width.
  passes = 2 * forward + 5 * chunks
  visits = (layout.context - 1) * passes * layers * query
  width = tokens * cfg.d_model * item
  share = 2 * (layout.tensor - 1) / layout.tensor
  # Of attention and the MLP each way, and once more where a layer begins; of
  # the embedding, and in twice the width of the head.
  sums = (2 * forward + 3 * chunks) * layers + forward + 2 * chunks
  partial = share * sums * width
  return Sent(gathered, visits, partial)


def _gathered(
  kept: Kept, candidate: Candidate, chunks: int, forward: int
) -> float:
  if candidate.layout.gather == "step":
    return 0.0
  layers, head = kept.sent_layers, kept.sent_head
  if runs_layer_outer(chunks, candidate.strategy):
    # Once for all chunks, and the head once.
    return 2 * layers.weights + layers.gradients + head.both
  passes = forward + chunks
  return passes * layers.weights + chunks * (layers.gradients + head.both)


class Clock:
  """Steps of one request; plans are made once for all layouts."""

  def __init__(self, request: Request, memory: Memory):
    self.request, self.memory = request, memory
    budget = request.batch_tokens
    self.batches = request.lengths.batches(budget, _MOST_BATCHES)
    self._plan = functools.cache(self._make_plan)
    self._cost = functools.cache(self._make_cost)

  def _make_plan(self, batch: int, size: int) -> ChunkPlan:
    return chunk_plan(self.batches[batch], size)

  def _make_cost(
    self, batch: int, size: int, live: int, strategy: Strategy
  ) -> StepCost:
    plan = self._plan(batch, size)
    return plan_cost(
      self.request.model, plan, live_chunks=live, strategy=strategy
    )

  def step(self, candidate: Candidate, *, simulate: bool = False) -> Step:
    """The time of a step of a candidate.

    Args:
      candidate: How it runs.
      simulate: Whether its stages are simulated tick by tick.
    """
    steps = [
      self._step(n, candidate, simulate) for n in range(len(self.batches))
    ]
    means = [sum(values) / len(steps) for values in zip(*steps, strict=True)]
    return Step(*means)

  def _step(self, batch: int, candidate: Candidate, simulate: bool) -> Step:
    plan = self._plan(batch, candidate.chunk_size)
    cost = self._cost(
      batch, candidate.chunk_size, candidate.live_chunks, candidate.strategy
    )
    # Lanes of as many chunks send as much.
    beside = functools.cache(functools.partial(self._beside, candidate))
    lanes = [
      self._lane(candidate, flops, beside(lane.num_chunks))
      for lane, flops in zip(plan.lanes, cost.lanes, strict=True)
    ]
    busy = max(
      self._groups(candidate, plan, lanes, simulate),
      key=lambda one: one.seconds,
    )
    seconds = busy.seconds + self._end(candidate)
    machine = self.request.machine
    peak = machine.flops * machine.count
    return Step(
      seconds=seconds,
      tokens=plan.num_tokens,
      flops_share=cost.model / (seconds * peak),
      products=busy.products,
      copies=busy.copies,
      padding=plan.padding_fraction,
    )

  def _lane(
    self, candidate: Candidate, flops: float, beside: "_Beside"
  ) -> "_Busy":
    """A lane on its group, of several stages all together."""
    share = candidate.layout.context * candidate.layout.tensor
    flops += beside.flops
    products = flops / share / (EFFICIENCY * self.request.machine.flops)
    return _Busy(
      max(products, beside.hidden) + beside.alone,
      products,
      beside.copies,
    )

  def _beside(self, candidate: Candidate, chunks: int) -> "_Beside":
    """What a lane of so many chunks takes beside its products."""
    cfg, layout = self.request.model, candidate.layout
    links, kept = self.request.machine.links, self.memory.kept(layout)
    sent = sent_bytes(cfg, kept, candidate, chunks)
    hidden = (sent.gathered + sent.visits) * layout.stage / links.ring
    if candidate.kv_memory == "host":
      hidden += self._host_bytes(candidate, chunks) / links.host
    # Gradients are read and written for every chunk, weights read twice.
    passed = 2 * chunks * kept.used.both * layout.stage / links.memory
    partial = sent.partial * layout.stage / links.ring
    flops = 0.0
    if candidate.keep == "inputs":
      flops = chunks * candidate.chunk_size * layer_flops_per_token(cfg)
    return _Beside(flops, hidden, passed + partial, hidden + partial)

  def _host_bytes(self, candidate: Candidate, chunks: int) -> float:
    """Copied for a lane whose keys and values are on the host."""
    cfg = self.request.model
    pairs = chunks * (chunks + 1) // 2 * candidate.chunk_size
    item = jnp.dtype(cfg.dtype).itemsize
    keys = cfg.num_layers * 2 * cfg.kv_heads * cfg.head_width * item
    gradients = state_bytes_per_token(cfg, "chunk_outer") - keys
    # Forward twice; backward keys come and gradients come and go.
    return pairs * (3 * keys + 2 * gradients)

  def _groups(
    self,
    candidate: Candidate,
    plan: ChunkPlan,
    lanes: Sequence["_Busy"],
    simulate: bool,
  ) -> list["_Busy"]:
    """What each team of groups has to do."""
    layout = candidate.layout
    in_step = layout.gather == "layer" and layout.splits("embed")
    size = layout.fsdp if in_step else 1
    order = sorted(range(len(lanes)), key=lambda n: -lanes[n].seconds)
    rows = [order[n : n + size] for n in range(0, len(order), size)]
    slowest = [lanes[row[0]] for row in rows]
    dealt = longest_processing_time(
      [one.seconds for one in slowest], candidate.groups // size
    )
    if candidate.schedule is None:
      return [_sum([slowest[n] for n in mine]) for mine in dealt]
    return [
      self._staged(candidate, plan, [rows[n][0] for n in mine], lanes, simulate)
      for mine in dealt
    ]

  def _staged(
    self,
    candidate: Candidate,
    plan: ChunkPlan,
    mine: Sequence[int],
    lanes: Sequence["_Busy"],
    simulate: bool,
  ) -> "_Busy":
    assert candidate.schedule is not None
    counts = [plan.lanes[lane].num_chunks for lane in mine]
    stages = candidate.layout.stage
    total = _sum([lanes[lane] for lane in mine])
    if simulate and counts:
      layout = candidate.layout
      share = layout.context * layout.tensor
      seconds = simulated_seconds(
        self.request.model,
        candidate,
        counts,
        share * EFFICIENCY * self.request.machine.flops,
      )
      # What is sent, and whatever else is no product, as of lanes alone.
      seconds *= total.seconds / total.products
    else:
      chunks: list[float] = []
      for lane, count in zip(mine, counts, strict=True):
        chunks += [lanes[lane].seconds / count] * count
      seconds = pipeline_seconds(chunks, stages, candidate.schedule)
    return _Busy(seconds, total.products / stages, total.copies / stages)

  def _end(self, candidate: Candidate) -> float:
    """Sums over devices and the update, behind the last lane."""
    kept, links = self.memory.kept(candidate.layout), self.request.machine.links
    layout = candidate.layout
    once = layout.gather == "step"
    copies = layout.num_devices // (layout.tensor * layout.stage)
    own = kept.used if once else kept.stored
    copies //= 1 if once else kept.shared
    # Scattered, and new parameters gathered.
    sent = (copies - 1) / copies * own.both
    passed = 2 * kept.stored.weights + kept.updated + 2 * kept.optimizer
    host = 2 * kept.optimizer_host / links.host
    return sent / links.ring + passed / links.memory + host


class _Beside(NamedTuple):
  """Of a lane: FLOPs on top, and seconds.

  Attributes:
    flops: Of what is computed again.
    hidden: Of copies that products hide.
    alone: Of what they do not.
    copies: Of all copies.
  """

  flops: float
  hidden: float
  alone: float
  copies: float


class _Busy(NamedTuple):
  """Seconds: in all, of products, of copies."""

  seconds: float
  products: float
  copies: float


def _sum(parts: Sequence[_Busy]) -> _Busy:
  return _Busy(*map(sum, zip(*parts, strict=True))) if parts else _Busy(0, 0, 0)
