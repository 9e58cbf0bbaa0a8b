"""The public calls: exact loss and gradients of a batch, by chunks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.executor import (
  Strategy,
  accumulate,
  data_sharding,
  lane_program,
  make_options,
  token_nll,
)
from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.memory import MemorySpace
from jaxchunk.chunking.ops import Keep
from jaxchunk.chunking.parallel import accumulate_over
from jaxchunk.chunking.routing import (
  check_no_router_losses,
  has_router_losses,
)
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.chunking.traces import trace_over
from jaxchunk.chunking.trainable import check_trainable
from jaxchunk.kernels.attention.backends import Backend
from jaxchunk.models.moe import RouterWeights
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.types import Batch

# A loss of sequences: from `sum(weights * nll)` and `sum(weights)` of each
# sequence, `[Q]` in the order of the batch, to a scalar.
SequenceLoss = Callable[
  [Float[Array, " Q"], Float[Array, " Q"]], Float[Array, ""]
]


def chunked_value_and_grad(
  model: Transformer,
  batch: Batch | Mapping[str, Any],
  *,
  chunk_size: int,
  live_chunks: int = 1,
  trainable: Any = None,
  strategy: Strategy | SpaCO | None = None,
  loss: SequenceLoss | None = None,
  rng: PRNGKeyArray | None = None,
  keep: Keep = "all",
  grad_dtype: str | None = None,
  implementation: Backend | None = None,
  kv_memory: MemorySpace = "device",
  layout: Layout | None = None,
) -> tuple[Float[Array, ""], nnx.State]:
  """Loss and gradients of a batch, exactly, in the memory of a chunk.

  Equal to `full_value_and_grad(model, batch)` up to rounding, for every chunk
  size, strategy (but `SpaCO`) and packing. Sequences longer than `chunk_size`
  are split, the others packed; each lane of chunks runs through one of a few
  programs compiled for power-of-two lengths.

  Args:
    model: The model.
    batch: Rows of packed sequences; see `jaxchunk.types.Batch`.
    chunk_size: C, tokens per chunk.
    live_chunks: K, how many chunks of a sequence keep their activations; the
      others run forward twice. 0 is SeCO, 1 or more ChunkFlow.
    trainable: Which parameters get gradients: `None` for all, an `nnx`
      filter, or an `nnx.State` with the wanted ones.
    strategy: "chunk_outer" (memory per token: keys, values and their
      gradients), "layer_outer" (StreamBP; the layers' inputs), `None` for
      the smaller of the two, or `SpaCO(rate)`, which runs a random part of
      the chunks backward: the loss exact, the gradient right in the mean.
    loss: A function of the sequences' sums instead of the mean over tokens:
      `loss(nll_Q, weight_Q)`, where `nll_Q = sum(weights * nll)` and
      `weight_Q = sum(weights)` of each sequence. It costs one more forward
      pass, because its cotangents are known only after all sums.
    rng: Key for dropout, drawn by document and position; `None` is none.
      `SpaCO` needs one, and draws by lane and chunk.
    keep: What live chunks keep of each layer: "all" products that the
      backward reads, or "inputs", which are fewer bytes and more work.
    grad_dtype: Of the gradients of keys and values between chunks; at least
      fp32 by default.
    implementation: Of attention: "xla" (the default), "pallas_tpu" or
      "pallas_gpu"; see `jaxchunk.attention`.
    kv_memory: "host" keeps keys, values and their gradients in host memory
      and brings those of one chunk at a time to the device ("chunk_outer"
      only): memory on the device does not grow with the sequence.
    layout: Devices to run on, `Layout(fsdp=4, context=2)`; `None` is where the
      model is.

  Returns:
    `(loss, grads)`: the scalar `sum(weights * nll) / sum(weights)` (or
    `loss(...)`), plus the losses of routers over the whole batch, where the
    model has some (that of balance costs one more forward pass); and
    gradients in at least fp32, structured as `nnx.state(model, trainable)`.

  Raises:
    ValueError: The batch is malformed or an argument out of range.
    NotImplementedError: The layout does not go with the options.
  """
  check_trainable(model, trainable)
  if layout is not None and layout.stage > 1:
    strategy = strategy or "chunk_outer"
  examples = Batch.of(batch).examples()
  options = make_options(
    model,
    chunk_size=chunk_size,
    live_chunks=live_chunks,
    strategy=strategy,
    trainable=trainable,
    keep=keep,
    grad_dtype=grad_dtype,
    implementation=implementation,
    kv_memory=kv_memory,
  )
  if loss is not None:
    check_no_router_losses(model.cfg, "loss=...")
    if layout is not None:
      raise NotImplementedError(
        "loss=... with a layout: its first pass runs on one device; leave the "
        "layout out"
      )
    if rng is not None and model.cfg.dropout:
      raise ValueError(
        "a sequence loss with dropout is not supported: the first of its two "
        "passes runs without dropout; pass rng=None"
      )
    nll = token_nll(model, examples, chunk_size=chunk_size)
    value, cotangents = _sequence_cotangents(loss, examples, nll)
    examples = [
      dataclasses.replace(e, weights=e.weights * ct)
      for e, ct in zip(examples, cotangents, strict=True)
    ]
  if layout is None:
    sums = accumulate(model, examples, options, rng=rng)
  else:
    sums = accumulate_over(layout, model, examples, options, rng=rng)
  if loss is not None:
    return value, sums.grads
  weight = np.asarray(sums.weight, sums.loss.dtype)
  return sums.loss / weight, jax.tree.map(lambda g: g / weight, sums.grads)


def _sequence_cotangents(
  loss: SequenceLoss, examples: list[Any], nll: list[np.ndarray]
) -> tuple[Array, np.ndarray]:
  """The loss of the sequences' sums, and its derivative by each nll sum."""
  pairs = list(zip(examples, nll, strict=True))
  wide = np.result_type(nll[0].dtype, np.float32)
  sums = np.asarray(
    [np.sum(e.weights * n, where=e.weights != 0) for e, n in pairs], wide
  )
  weights = np.asarray([e.weights.sum() for e, _ in pairs], wide)
  value, cotangents = jax.value_and_grad(loss)(
    jnp.asarray(sums), jnp.asarray(weights)
  )
  return value, np.asarray(cotangents)


def lower_chunked(
  model: Transformer,
  *,
  capacity: int,
  chunk_size: int,
  live_chunks: int = 1,
  strategy: Strategy | SpaCO | None = None,
  trainable: Any = None,
  keep: Keep = "all",
  grad_dtype: str | None = None,
  implementation: Backend | None = None,
  kv_memory: MemorySpace = "device",
  layout: Layout | None = None,
  mesh: Mesh | None = None,
) -> jax.stages.Lowered:
  """The program for one lane of up to `capacity` tokens, not yet compiled.

  This is what `chunked_value_and_grad` runs; lower it to look at its memory
  (`.compile().memory_analysis()`) or to compile for another machine.

  Args:
    model: The model, real or abstract (`nnx.eval_shape`, or shapes with
      shardings on the devices to compile for).
    capacity: Tokens; rounded up to a power of two of chunks.
    chunk_size: As `chunked_value_and_grad`, like the other arguments.
    live_chunks: K.
    strategy: Which loop is outside, or `SpaCO`.
    trainable: Which parameters get gradients.
    keep: What live chunks keep.
    grad_dtype: Of the gradients of keys and values.
    implementation: Of attention.
    kv_memory: Where keys, values and their gradients are.
    layout: Of the devices, each group of which runs a lane; `None` is one, or
      where the model is.
    mesh: `layout.mesh(devices)` of devices that need not be there; by default
      of all that are.

  Returns:
    The lowered program; its accumulators are donated.

  Raises:
    ValueError: An argument is out of range.
    NotImplementedError: The layout does not go with the options.
  """
  check_trainable(model, trainable)
  if layout is not None and layout.stage > 1:
    strategy = strategy or "chunk_outer"
  if not isinstance(capacity, int | np.integer) or capacity < 1:
    raise ValueError(f"capacity={capacity!r} must be a positive integer")
  options = make_options(
    model,
    chunk_size=chunk_size,
    live_chunks=live_chunks,
    strategy=strategy,
    trainable=trainable,
    keep=keep,
    grad_dtype=grad_dtype,
    implementation=implementation,
    kv_memory=kv_memory,
  )
  if layout is not None:
    return trace_over(layout, model, capacity, options, mesh=mesh).lower()
  lane, number = abstract_lane(model, capacity, options.chunk_size)
  model = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=getattr(a, "sharding", None)
    ),
    model,
  )
  grads = [
    jax.ShapeDtypeStruct(
      a.shape,
      jnp.promote_types(a.dtype, jnp.float32),
      sharding=getattr(a, "sharding", None),
    )
    for a, mine in zip(
      jax.tree.leaves(model), options.trainable.chosen, strict=True
    )
    if mine
  ]
  wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
  sharding = number.sharding
  loss: Any = jax.ShapeDtypeStruct((), wide, sharding=sharding)
  rng = None
  if isinstance(options.strategy, SpaCO):
    key = jax.eval_shape(lambda: jax.random.key(0))
    rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)
  router = None
  if model.cfg.moe is not None and has_router_losses(model.cfg):
    shape = (model.cfg.num_layers, model.cfg.moe.num_experts)
    balance: Any = jax.ShapeDtypeStruct(shape, wide, sharding=sharding)
    router = RouterWeights(balance, loss)
  return lane_program.lower(
    model, lane, number, (loss, grads), rng, router, options=options
  )


def abstract_lane(
  model: Transformer, capacity: int, chunk_size: int
) -> tuple[Lane, jax.ShapeDtypeStruct]:
  """What a program is given beside the model, as shapes where the model is.

  Args:
    model: The model, real or abstract.
    capacity: Tokens; rounded up to a power of two of chunks.
    chunk_size: C.

  Returns:
    The lane, and the number of its chunks in use.
  """
  sharding = data_sharding(model)
  chunks = capacity_chunks(-(-int(capacity) // chunk_size))
  row = (1, chunks * chunk_size)
  wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
  rows: Any = {
    field.name: jax.ShapeDtypeStruct(
      row, wide if field.name == "weights" else jnp.int32, sharding=sharding
    )
    for field in dataclasses.fields(Lane)
  }
  return Lane(**rows), jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
