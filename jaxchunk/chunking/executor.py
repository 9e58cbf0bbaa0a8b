"""Runs planned lanes through a few compiled programs and adds up their sums."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxchunk.chunking import chunk_outer, layer_outer, spaco
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.lanes import (
  LaneArrays,
  capacity_chunks,
  pack_lanes,
  pad_lane,
)
from jaxchunk.chunking.memory import (
  STRATEGIES,
  MemorySpace,
  Strategy,
  state_bytes_per_token,
)
from jaxchunk.chunking.ops import Keep, Stage, state_of
from jaxchunk.chunking.plan import ChunkPlan, chunk_plan
from jaxchunk.chunking.routing import (
  check_no_router_losses,
  has_router_losses,
  lane_counts,
)
from jaxchunk.chunking.scores import TokenScores, chunk_scores, weighted_sum
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.chunking.trainable import Trainable
from jaxchunk.kernels.attention.backends import BACKENDS, Backend
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.moe import RouterWeights
from jaxchunk.models.transformer import Transformer
from jaxchunk.types import Example, check_vocabulary

_GRAD_DTYPES = ("bfloat16", "float16", "float32", "float64")


class Sums(NamedTuple):
  """Sums over a batch, to be divided once by the global weight.

  Attributes:
    loss: `sum(weights * nll)`, a scalar on device.
    weight: `sum(weights)`.
    grads: Gradients of `loss`, in at least fp32.
    plan: How the batch was cut into chunks.
  """

  loss: Float[Array, ""]
  weight: float
  grads: nnx.State
  plan: ChunkPlan


class Options(NamedTuple):
  """What a lane program is compiled for, besides shapes.

  Attributes:
    chunk_size: C.
    live_chunks: K.
    strategy: Which loop is outside, or which chunks run backward.
    trainable: Which parameters get gradients.
    keep: What a live chunk keeps of each layer.
    grad_dtype: Of the gradients of keys and values; `None` is at least fp32.
    implementation: Of attention.
    kv_memory: Where keys, values and their gradients are.
  """

  chunk_size: int
  live_chunks: int
  strategy: Strategy | SpaCO
  trainable: Trainable
  keep: Keep = "all"
  grad_dtype: str | None = None
  implementation: Backend = "xla"
  kv_memory: MemorySpace = "device"

  def stage(self, cfg: ModelConfig) -> Stage:
    """The stage of all layers."""
    states = tuple(
      state_of(
        cfg,
        window,
        self.chunk_size,
        self.grad_dtype,
        self.implementation,
        self.kv_memory,
      )
      for window in cfg.window_pattern
    )
    return Stage(self.chunk_size, states, self.trainable, self.keep)


def choose_strategy(
  cfg: ModelConfig, live_chunks: int, grad_dtype: str | None = None
) -> Strategy:
  """The strategy with the smaller state per token.

  Live chunks other than one are a wish about chunk-outer and decide for it.
  """
  if live_chunks != 1:
    return "chunk_outer"
  chunk, layer = (
    state_bytes_per_token(cfg, strategy, grad_dtype) for strategy in STRATEGIES
  )
  return "chunk_outer" if chunk <= layer else "layer_outer"


def make_options(
  model: Transformer,
  *,
  chunk_size: int,
  live_chunks: int = 1,
  strategy: Strategy | SpaCO | None = None,
  trainable: Any = None,
  keep: Keep = "all",
  grad_dtype: str | None = None,
  implementation: Backend | None = None,
  kv_memory: MemorySpace = "device",
) -> Options:
  """Checks and completes what a program is compiled for.

  Raises:
    ValueError: A number is out of range or a name unknown.
  """
  if not isinstance(chunk_size, int | np.integer) or chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size!r} must be a positive integer")
  if not isinstance(live_chunks, int | np.integer) or live_chunks < 0:
    raise ValueError(
      f"live_chunks={live_chunks!r} must be an integer, 0 or more"
    )
  if kv_memory not in ("device", "host"):
    raise ValueError(
      f"kv_memory={kv_memory!r} is not one of ['device', 'host']"
    )
  if kv_memory == "host":
    strategy = strategy or "chunk_outer"
    if strategy != "chunk_outer":
      raise ValueError(
        f"kv_memory='host' needs strategy='chunk_outer', got {strategy!r}, "
        "whose keys and values are of one layer at a time"
      )
  if strategy is None:
    strategy = choose_strategy(model.cfg, live_chunks, grad_dtype)
  if isinstance(strategy, SpaCO):
    check_no_router_losses(model.cfg, f"strategy={strategy}")
    if live_chunks > 1:
      raise ValueError(
        f"live_chunks={live_chunks} with {strategy}: no chunk stays alive "
        "there, because few run backward; leave live_chunks at 1 or 0"
      )
  elif strategy not in STRATEGIES:
    raise ValueError(
      f"strategy={strategy!r} is not one of {list(STRATEGIES)}, or "
      "SpaCO(rate=...)"
    )
  if keep not in ("all", "inputs"):
    raise ValueError(f"keep={keep!r} is not one of ['all', 'inputs']")
  if grad_dtype not in (None, *_GRAD_DTYPES):
    raise ValueError(
      f"grad_dtype={grad_dtype!r} is not one of {list(_GRAD_DTYPES)}, or None"
    )
  if implementation is None:
    implementation = "xla"
  if implementation not in BACKENDS:
    raise ValueError(
      f"implementation={implementation!r} is not one of {list(BACKENDS)}"
    )
  return Options(
    int(chunk_size),
    int(live_chunks),
    strategy,
    Trainable.of(model, trainable),
    keep,
    grad_dtype,
    implementation,
    kv_memory,
  )


@functools.partial(
  jax.jit, static_argnames=("options",), donate_argnames=("totals",)
)
def lane_program(
  model: Transformer,
  lane: Lane,
  num_chunks: Array,
  totals: tuple[Array, list[Array]],
  rng: PRNGKeyArray | None,
  router: RouterWeights | None = None,
  *,
  options: Options,
) -> tuple[Array, list[Array]]:
  """Adds a lane's loss and gradients to the donated totals.

  Raises:
    ValueError: The strategy draws chunks and there is no key.
  """
  stage = dataclasses.replace(options.stage(model.cfg), router=router)
  return lane_gradient(stage, options, model, lane, num_chunks, totals, rng)


def lane_gradient(
  stage: Stage,
  options: Options,
  model: Transformer,
  lane: Lane,
  num_chunks: Array,
  totals: tuple[Array, list[Array]],
  rng: PRNGKeyArray | None,
) -> tuple[Array, list[Array]]:
  """`lane_program` on a device that may have a part of each chunk.

  Args:
    stage: Of the part.
    options: Of the whole.
    model: The parameters.
    lane: Tokens, in the order of this device.
    num_chunks: How many chunks are in use.
    totals: Loss and gradients so far.
    rng: As in `accumulate`.

  Raises:
    ValueError: The strategy draws chunks and there is no key.
  """
  capacity = lane.tokens.shape[1] // stage.chunk_size
  if isinstance(options.strategy, SpaCO):
    if rng is None:
      raise ValueError(
        f"rng=None with {options.strategy}: pass a key of this step, from "
        "which its chunks are drawn"
      )
    chosen = spaco.draw_chunks(options.strategy, lane, capacity, rng)
    return spaco.lane_gradient(
      stage, options.strategy, model, lane, num_chunks, totals, chosen, rng
    )
  # In one chunk there is nothing to choose.
  if options.strategy == "layer_outer" and capacity > 1:
    return layer_outer.lane_gradient(
      stage, model, lane, num_chunks, totals, rng
    )
  return chunk_outer.lane_gradient(
    stage, options.live_chunks, model, lane, num_chunks, totals, rng
  )


@functools.partial(
  jax.jit, static_argnames=("options",), donate_argnames=("counts",)
)
def counts_program(
  model: Transformer,
  lane: Lane,
  num_chunks: Array,
  counts: Array,
  rng: PRNGKeyArray | None,
  *,
  options: Options,
) -> Array:
  """Adds the copies that each expert gets of a lane to the donated counts."""
  stage = options.stage(model.cfg)
  return lane_counts(stage, model, lane, num_chunks, counts, rng)


@functools.partial(jax.jit, static_argnames=("options",))
def nll_program(
  model: Transformer, lane: Lane, num_chunks: Array, *, options: Options
) -> Array:
  """Negative log-likelihood of every token of a lane."""
  stage = options.stage(model.cfg)
  return chunk_outer.lane_nll(stage, model, lane, num_chunks)


@functools.partial(jax.jit, static_argnames=("options",))
def scores_program(
  model: Transformer, lane: Lane, num_chunks: Array, *, options: Options
) -> TokenScores:
  """Scores of every token of a lane."""
  stage = options.stage(model.cfg)
  return chunk_outer.lane_map(chunk_scores, stage, model, lane, num_chunks)


@functools.partial(jax.jit, static_argnames=("options",))
def loss_program(
  model: Transformer,
  lane: Lane,
  num_chunks: Array,
  total: Array,
  *,
  options: Options,
) -> Array:
  """Adds `sum(weights * nll)` of a lane to the total."""
  nll = chunk_outer.lane_nll(options.stage(model.cfg), model, lane, num_chunks)
  return total + weighted_sum(lane.weights, nll)


def _zero_totals(
  model: Transformer, *, trainable: Trainable
) -> tuple[Array, list[Array]]:
  """Where the model is, as a program's own totals are.

  Left free to move, the first totals of a batch would have every program
  compiled once more.
  """
  totals = _make_totals(model, trainable)
  return jax.device_put(totals, data_sharding(model))


def zero_totals(
  model: Transformer, trainable: Trainable
) -> tuple[Array, list[Array]]:
  """Loss and gradients of nothing."""
  loss = jnp.zeros((), jnp.promote_types(model.cfg.dtype, jnp.float32))
  return loss, trainable.zeros(model)


_make_totals = jax.jit(zero_totals, static_argnums=1)


def accumulate(
  model: Transformer,
  examples: Sequence[Example],
  options: Options,
  *,
  rng: PRNGKeyArray | None = None,
) -> Sums:
  """Sums of loss and gradients over sequences, run by chunks.

  The sums do not depend on the chunk size, the packing or the strategy, and
  add up over calls and devices; divide them once by the global weight. Work
  is dispatched asynchronously: nothing waits for the device. Losses of routers
  are over the sequences of one call, which must be the global batch then.

  Args:
    model: The model.
    examples: Sequences of any length.
    options: From `make_options`.
    rng: Key for dropout, and for the chunks that `SpaCO` draws; `None` is no
      dropout.

  Returns:
    The sums; `grads` has the structure of `nnx.state(model, trainable)`.

  Raises:
    ValueError: A token is not in the vocabulary, or `SpaCO` has no key.
  """
  plan, lanes = plan_lanes(model, examples, options.chunk_size)
  weight = weight_of(examples)
  router = None
  if has_router_losses(model.cfg):
    placed = place_lanes(model, lanes, plan)
    tokens = sum(plan.lengths)
    router = _router_weights(model, placed, tokens, weight, options, rng)
  totals = _zero_totals(model, trainable=options.trainable)
  for lane, num_chunks in place_lanes(model, lanes, plan):
    totals = lane_program(
      model, lane, num_chunks, totals, rng, router, options=options
    )
  loss, grads = totals
  return Sums(loss, weight, options.trainable.state(grads), plan)


def _router_weights(
  model: Transformer,
  placed: Iterator[tuple[Lane, Array]],
  tokens: int,
  weight: float,
  options: Options,
  rng: PRNGKeyArray | None,
) -> RouterWeights:
  """What the routers' sums of these lanes count for.

  Their losses are means over tokens; all sums are divided by the weight once.
  """
  moe = model.cfg.moe
  assert moe is not None
  wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
  counts, numbers = jax.device_put(
    (
      np.zeros((model.cfg.num_layers, moe.num_experts), np.int32),
      (np.asarray(tokens, wide), np.asarray(weight, wide)),
    ),
    data_sharding(model),
  )
  if moe.balance_loss:
    for lane, num_chunks in placed:
      counts = counts_program(
        model, lane, num_chunks, counts, rng, options=options
      )
  return router_weights(moe, counts, *numbers)


router_weights = jax.jit(RouterWeights.of, static_argnums=0)
"""What routers' sums count for, compiled."""


def warm_up(
  model: Transformer,
  longest: int,
  options: Options,
  *,
  rng: PRNGKeyArray | None = None,
) -> int:
  """Compiles every program that `accumulate` may need, by running it once.

  Which capacities a batch needs depends on what is in it; after this no batch
  compiles anything.

  Args:
    model: The model.
    longest: Length of the longest sequence to come, in tokens.
    options: From `make_options`.
    rng: Any key if dropout or `SpaCO` will be used.

  Returns:
    How many programs there are: at most `2 + log2(longest / C)`, for a
    longest of C or more.
  """
  token = np.zeros(1, np.int32)
  example = Example(token, token, np.zeros(1, np.float32))
  plan, lanes = plan_lanes(model, [example], options.chunk_size)
  totals = _zero_totals(model, trainable=options.trainable)
  top = capacity_chunks(-(-longest // options.chunk_size))
  capacities = [1 << n for n in range(top.bit_length())]
  for capacity in capacities:
    router = None
    if has_router_losses(model.cfg):
      placed = place_lanes(model, lanes, plan, capacity)
      router = _router_weights(model, placed, 1, 1.0, options, rng)
    for lane, num_chunks in place_lanes(model, lanes, plan, capacity):
      totals = lane_program(
        model, lane, num_chunks, totals, rng, router, options=options
      )
  # What they needed is free again when this returns.
  jax.block_until_ready(totals)
  return len(capacities)


def loss_sum(
  model: Transformer,
  examples: Sequence[Example],
  *,
  chunk_size: int,
  implementation: Backend | None = None,
  kv_memory: MemorySpace = "device",
) -> Float[Array, ""]:
  """`sum(weights * nll)` over sequences, forward only; see `accumulate`.

  Args:
    model: The model.
    examples: Sequences of any length.
    chunk_size: C, tokens per chunk.
    implementation: Of attention, as `make_options`.
    kv_memory: Where keys and values are, likewise.

  Returns:
    The sum, a scalar on device.

  Raises:
    ValueError: An argument is out of range, or a token not in the vocabulary.
  """
  options = make_options(
    model,
    chunk_size=chunk_size,
    implementation=implementation,
    kv_memory=kv_memory,
  )
  plan, lanes = plan_lanes(model, examples, options.chunk_size)
  wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
  total = jax.device_put(np.zeros((), wide), data_sharding(model))
  for lane, num_chunks in place_lanes(model, lanes, plan):
    total = loss_program(model, lane, num_chunks, total, options=options)
  return total


def token_nll(
  model: Transformer, examples: Sequence[Example], *, chunk_size: int
) -> list[np.ndarray]:
  """Negative log-likelihood of every target of every sequence, `[T]` each.

  Args:
    model: The model.
    examples: Sequences of any length.
    chunk_size: C, tokens per chunk.

  Returns:
    Unweighted nll in at least fp32, on the host, in the order given.
  """
  return _per_sequence(nll_program, model, examples, chunk_size)


def token_scores(
  model: Transformer, examples: Sequence[Example], *, chunk_size: int
) -> list[TokenScores]:
  """As `token_nll`, and whether each target is the likeliest token.

  Args:
    model: The model.
    examples: Sequences of any length.
    chunk_size: C, tokens per chunk.

  Returns:
    Scores `[T]` of every sequence, on the host, in the order given.
  """
  return _per_sequence(scores_program, model, examples, chunk_size)


def _per_sequence(
  program: Callable[..., Any],
  model: Transformer,
  examples: Sequence[Example],
  chunk_size: int,
) -> list[Any]:
  """What a program gives for every token, cut into sequences."""
  options = make_options(model, chunk_size=chunk_size)
  plan, lanes = plan_lanes(model, examples, options.chunk_size)
  running = [
    program(model, lane, num_chunks, options=options)
    for lane, num_chunks in place_lanes(model, lanes, plan)
  ]
  found: dict[int, Any] = {}
  for lane, out in zip(plan.lanes, running, strict=True):
    rows = jax.tree.map(lambda a: np.asarray(a)[0], out)
    for sequence, offset in lane.sequences:
      where = slice(offset, offset + len(examples[sequence]))
      found[sequence] = jax.tree.map(operator.itemgetter(where), rows)
  return [found[n] for n in range(len(examples))]


def plan_lanes(
  model: Transformer, examples: Sequence[Example], chunk_size: int
) -> tuple[ChunkPlan, list[LaneArrays]]:
  """How sequences are cut into chunks, and the lanes that hold them.

  Raises:
    ValueError: A token is not in the vocabulary.
  """
  check_vocabulary(examples, model.cfg.vocab_size)
  plan = chunk_plan([len(e) for e in examples], chunk_size)
  return plan, pack_lanes(examples, plan)


def weight_of(examples: Sequence[Example]) -> float:
  """`sum(weights)` of all tokens."""
  return float(sum(e.weights.sum(dtype=np.float64) for e in examples))


def place_lanes(
  model: Transformer,
  lanes: Sequence[LaneArrays],
  plan: ChunkPlan,
  chunks: int = 1,
) -> Iterator[tuple[Lane, Array]]:
  """Pads lanes to their capacity and puts them where the model is.

  Args:
    model: The model.
    lanes: From `pack_lanes`.
    plan: Of the lanes.
    chunks: The least capacity.

  Yields:
    Lanes on device and how many of their chunks are in use.
  """
  sharding = data_sharding(model)
  wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
  for arrays in lanes:
    capacity = capacity_chunks(max(arrays.num_chunks, chunks))
    padded = pad_lane(arrays, capacity * plan.chunk_size)
    fields = {
      "tokens": padded.tokens,
      "targets": padded.targets,
      "weights": padded.weights.astype(wide),
      "segment_ids": padded.segment_ids,
      "positions": padded.positions,
      "document_ids": padded.document_ids,
    }
    rows = {name: array[None] for name, array in fields.items()}
    rows, count = jax.device_put((rows, np.int32(arrays.num_chunks)), sharding)
    yield Lane(**rows), count


def data_sharding(model: Transformer) -> jax.sharding.Sharding | None:
  """Replicated over the devices that hold the model.

  `None` for a model on no device in particular: what is placed must be as free
  as it, or every program would be compiled once more for the difference.
  """
  leaf = jax.tree.leaves(model)[0]
  if isinstance(leaf, jax.Array) and not leaf.committed:
    return None
  sharding = getattr(leaf, "sharding", None)
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(
      sharding.mesh, jax.sharding.PartitionSpec()
    )
  return sharding
