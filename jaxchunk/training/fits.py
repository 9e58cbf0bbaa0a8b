"""Whether a run fits on devices that need not be there.

The programs of a run are compiled for the device, and the compiler says what
memory each takes. To that is added what lies on the device meanwhile: the
optimizer's state while a lane runs, the frozen parameters during an update.
Nothing is allocated and nothing runs; see `jaxchunk.targets`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from jaxchunk.chunking.executor import loss_program, make_options
from jaxchunk.chunking.gradient import abstract_lane, lower_chunked
from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.pipeline import stored_as_run
from jaxchunk.chunking.traces import (
  lanes_under_way,
  trace_loss_over,
  trace_stages,
  trace_sums_over,
)
from jaxchunk.chunking.turns import GROUPS
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.targets import Target, tracing_for
from jaxchunk.training import checkpoint, initial, optimizer
from jaxchunk.training.config import Config, TrainConfig, strategy_of
from jaxchunk.training.places import Places, places_of

RESERVE = 0.03
"""Share of a device's memory that the runtime keeps for itself."""

Shapes = Any
"""A pytree of `jax.ShapeDtypeStruct`."""


@dataclasses.dataclass(frozen=True)
class Need:
  """The memory of a run while one of its programs is running.

  Attributes:
    program: Which.
    device: Bytes on the device, with all that lies there meanwhile.
    host: Bytes of host memory, likewise.
    refused: What the compiler said if it gave up; `device` is then at least
      what it named.
    peak: The same by the compiler's count of what is held at once. On a TPU it
      is less, and the one that decides: programs compile whose `device`
      exceeds its memory, as long as `peak` does not.
  """

  program: str
  device: int
  host: int
  refused: str | None = None
  peak: int = 0


def limit(target: Target) -> int:
  """Bytes on a device that a run may take."""
  return int((1 - RESERVE) * target.memory)


def kept_bytes(config: Config) -> dict[str, int]:
  """Bytes of a device by what a run keeps, wherever that is.

  Args:
    config: The run.

  Returns:
    Bytes of `"parameters"` (trained and frozen), `"gradients"` and
    `"optimizer"`.
  """
  params, frozen = _parameters(config)
  return {
    "parameters": _bytes((params, frozen)),
    "gradients": _bytes(_gradients(params)),
    "optimizer": _bytes(_state(config)),
  }


def optimizer_bytes(config: Config) -> tuple[int, int]:
  """Bytes of the optimizer's state on a device, and for it on the host."""
  state = _state(config)
  total = _bytes(state)
  if config.train.optimizer_memory == "device":
    return total, 0
  kinds = jax.tree.leaves(optimizer.kinds(state))
  leaves = zip(kinds, jax.tree.leaves(state), strict=True)
  small = _bytes([leaf for kind, leaf in leaves if kind == "vector"])
  return small, total - small


def needs(config: Config, target: Target, longest: int) -> Iterator[Need]:
  """What every program of a run needs, the largest lanes first.

  Args:
    config: The run.
    target: What to compile for.
    longest: Of the sequences to come, in tokens.

  Yields:
    The need of a lane of each capacity, from that of the longest sequence
    downwards, of the longest evaluation, of the sums over devices if there
    are several, and of the update.

  Raises:
    RuntimeError: What compiles for the target is not installed.
  """
  train = config.train
  capacity = _capacity(longest, train.chunk_size)
  while capacity >= train.chunk_size:
    yield lane_need(config, target, capacity)
    capacity //= 2
  if train.eval_every:
    heldout = min(longest, train.eval_tokens)
    capacity = _capacity(heldout, train.chunk_size)
    yield evaluation_need(config, target, capacity)
  if config.layout.layout() is not None:
    yield sums_need(config, target)
  yield update_need(config, target)


def _capacity(tokens: int, chunk_size: int) -> int:
  """Of the lane that holds so many tokens."""
  return capacity_chunks(-(-tokens // chunk_size)) * chunk_size


def lane_need(config: Config, target: Target, capacity: int) -> Need:
  """Of loss and gradients of a lane, as `executor.accumulate` runs it.

  Args:
    config: The run.
    target: What to compile for.
    capacity: Of the lane, in tokens; rounded up to a power of two of chunks.
  """
  train, mesh = config.train, _mesh(config, target)
  if config.layout.stage > 1:
    return _stages_need(config, target, capacity)
  with tracing_for(target.device):
    lowered = lower_chunked(
      _model(config, target),
      capacity=capacity,
      chunk_size=train.chunk_size,
      live_chunks=train.live_chunks,
      strategy=strategy_of(config),
      trainable=initial.trainable(config.model),
      keep=train.keep,
      implementation=train.implementation,
      kv_memory=train.kv_memory,
      layout=config.layout.layout(),
      mesh=mesh,
    )
  program = f"lane of {capacity:,} tokens"
  device, host = optimizer_bytes(config)
  return _need(program, lowered, device + _stored_beside(config), host)


def _stages_need(config: Config, target: Target, capacity: int) -> Need:
  """Of a batch whose lanes are that long: stages have several under way."""
  train, layout = config.train, config.layout.layout()
  assert layout is not None
  model = _model(config, target)
  options = make_options(
    model,
    chunk_size=train.chunk_size,
    live_chunks=train.live_chunks,
    strategy=strategy_of(config),
    trainable=initial.trainable(config.model),
    keep=train.keep,
    implementation=train.implementation,
  )
  groups = math.prod(layout.shape[axis] for axis in GROUPS)
  size = train.chunk_size
  total = -(-config.data.batch_tokens // (size * groups))
  lanes = lanes_under_way(-(-capacity // size), total, layout.stage)
  with tracing_for(target.device):
    mesh = _mesh(config, target)
    lowered = trace_stages(layout, model, lanes, options, mesh=mesh).lower()
  program = f"stages with lanes of {capacity:,} tokens"
  device, host = optimizer_bytes(config)
  return _need(program, lowered, device + _stored_beside(config), host)


def evaluation_need(config: Config, target: Target, capacity: int) -> Need:
  """Of the loss of held-out sequences, as `executor.loss_sum` runs it."""
  train, layout = config.train, config.layout.layout()
  model = _model(config, target)
  options = make_options(
    model,
    chunk_size=train.chunk_size,
    live_chunks=train.live_chunks,
    trainable=initial.trainable(config.model),
    implementation=train.implementation,
    kv_memory=train.kv_memory,
  )
  with tracing_for(target.device):
    if layout is not None:
      lowered = trace_loss_over(
        layout, model, capacity, options, mesh=_mesh(config, target)
      ).lower()
    else:
      lane, number = abstract_lane(model, capacity, train.chunk_size)
      place = _places(config, target).everywhere
      total = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
      lowered = loss_program.lower(model, lane, number, total, options=options)
  program = f"evaluation of {capacity:,} tokens"
  device, host = optimizer_bytes(config)
  return _need(program, lowered, device + _stored_beside(config), host)


def sums_need(config: Config, target: Target) -> Need:
  """Of what adds up gradients over the devices of a layout."""
  train, layout = config.train, config.layout.layout()
  assert layout is not None
  model = _model(config, target)
  options = make_options(
    model,
    chunk_size=train.chunk_size,
    strategy=strategy_of(config),
    trainable=initial.trainable(config.model),
  )
  with tracing_for(target.device):
    mesh = _mesh(config, target)
    lowered = trace_sums_over(layout, model, options, mesh=mesh).lower()
  device, host = optimizer_bytes(config)
  kept = kept_bytes(config)["parameters"] + _stored_beside(config)
  return _need("sums over devices", lowered, device + kept, host)


def _stored_beside(config: Config) -> int:
  """Bytes of parameters as they are kept, where programs have others.

  Gathered ones, or in the order of the stages.
  """
  layout = config.layout.layout()
  if layout is None:
    return 0
  if layout.gather == "layer" and stored_as_run(layout, config.model):
    return 0
  return kept_bytes(config)["parameters"]


def update_need(config: Config, target: Target) -> Need:
  """Of the optimizer's update, as the training loop runs it."""
  train, places = config.train, _places(config, target)
  params, frozen = _parameters(config, target)
  state = _state(config, target)
  grads = _gradients(_placed(params, places.updated))
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=places.everywhere)
  on_host = train.optimizer_memory == "host"
  update: Any
  with tracing_for(target.device):
    if on_host and target.platform == "gpu":
      # Compiling alone, a GPU has no arguments in host memory.
      update = _updates_from_nothing(train, state)
      lowered = update.lower(params, scalar, scalar, grads)
    else:
      update = optimizer.make_update(
        train,
        jax.tree.map(lambda x: x.sharding, state),
        kept=places.params,
        updated=places.updated,
      )
      lowered = update.lower(params, state, scalar, scalar, grads)
  return _need("update", lowered, _bytes(frozen), 0)


def _updates_from_nothing(train: TrainConfig, shapes: Shapes) -> Any:
  """An update whose state begins, in part in host memory, inside of it.

  A loop of unknown length around it keeps the state where it is.
  """
  update = optimizer.make_update(train)

  def begin(kind: str, x: Any) -> Any:
    if kind == "vector":
      return jnp.zeros(x.shape, x.dtype)
    scalar = jax.device_put(jnp.zeros((), x.dtype), jax.memory.Space.Host)
    return lax.broadcast(scalar, x.shape)

  def run(params: Any, loss: Any, weight: Any, grads: Any) -> Any:
    def step(_: Any, carry: Any) -> Any:
      params, state = carry
      return update(params, state, loss, weight, grads)[:2]

    state = jax.tree.map(begin, optimizer.kinds(shapes), shapes)
    steps = weight.astype(jnp.int32)
    return lax.fori_loop(0, steps, step, (params, state))[0]

  return jax.jit(run, donate_argnums=0)


def _need(
  program: str, lowered: jax.stages.Lowered, device: int, host: int
) -> Need:
  """Compiles; adds what lies on the device and the host beside the program."""
  try:
    memory: Any = lowered.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    text = str(error).partition("\n")[0]
    found = re.search(r"(?:Used |temporaries \()([\d.]+)G", text)
    if found is None:
      raise
    arguments = sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(lowered.in_avals)
    )
    named = int(float(found[1]) * 2**30)
    return Need(
      program,
      device + named + arguments,
      host,
      refused=text,
      # What a TPU's compiler names are not temporaries alone.
      peak=device + named,
    )
  total = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  return Need(
    program,
    device + total,
    host
    + memory.host_argument_size_in_bytes
    + memory.host_output_size_in_bytes
    - memory.host_alias_size_in_bytes
    + memory.host_temp_size_in_bytes,
    # A GPU's count may be that of host memory, if that is more.
    peak=device + min(total, memory.peak_memory_in_bytes),
  )


@functools.cache
def _abstract(cfg: ModelConfig) -> tuple[Any, nnx.State, nnx.State]:
  """Once for all layouts and programs of a run."""
  return initial.abstract_model(cfg)


def _mesh(config: Config, target: Target) -> Mesh:
  """The target's devices that the run takes."""
  layout = config.layout.layout()
  if layout is None:
    return Layout().mesh([target.device])
  return layout.mesh(target.devices)


def _places(config: Config, target: Target | None = None) -> Places:
  """Where a run's arrays are; without a target only how they are split."""
  model: Transformer = nnx.merge(*_abstract(config.model.frozen()))
  layout = config.layout.layout() or Layout()
  if target is not None:
    return places_of(model, layout, _mesh(config, target))
  shape = layout.shape
  mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
  return places_of(model, layout, mesh)


def _parameters(
  config: Config, target: Target | None = None
) -> tuple[Shapes, Shapes]:
  """What is trained and what is frozen."""
  places = _places(config, target)
  _, *states = _abstract(config.model.frozen())
  params, frozen = map(nnx.to_pure_dict, states)
  return _placed(params, places.params), _placed(frozen, places.frozen)


def _placed(shapes: Shapes, places: Any) -> Shapes:
  return jax.tree.map(checkpoint.target_like, shapes, places)


def _model(config: Config, target: Target) -> Transformer:
  """The model as shapes on its devices."""
  graphdef, *_ = _abstract(config.model.frozen())
  states = map(nnx.State, _parameters(config, target))
  model: Transformer = nnx.merge(graphdef, *states)
  return model


def _gradients(params: Shapes) -> Shapes:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, jnp.promote_types(x.dtype, jnp.float32), sharding=x.sharding
    ),
    params,
  )


def _state(config: Config, target: Target | None = None) -> Shapes:
  """The optimizer's state."""
  places = _places(config, target)
  params, _ = _parameters(config, target)
  init = functools.partial(
    optimizer.init_state, optimizer.make_optimizer(config.train)
  )
  state = jax.eval_shape(init, params)
  return _placed(
    state,
    optimizer.state_shardings(
      config.train, state, places.everywhere, places.updated
    ),
  )


def _bytes(tree: Shapes) -> int:
  """On one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape))
    * x.dtype.itemsize
    // _in_a_byte(x.dtype)
    for x in jax.tree.leaves(tree)
  )


def _in_a_byte(dtype: Any) -> int:
  """How many numbers share one, on a device."""
  return 2 if dtype == jnp.uint4 else 1
