"""Optimizers, schedules, and the one compiled update of a run.

Parameters, gradients and moments are nested dictionaries of arrays. What an
array is follows from its name: layers are stacked along a leading axis, so a
stack of norm scales `[L,D]` is as two-dimensional as a matrix.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Int

from jaxchunk.sharding.rules import axis_names
from jaxchunk.training.adam8bit import scale_by_adam_8bit
from jaxchunk.training.apply import apply_at_once, apply_by_layer
from jaxchunk.training.config import TrainConfig

Params = Any
"""A nested dictionary of arrays."""

Schedule = Callable[[Any], Float[Array, ""]]

Kind = Literal["matrix", "embedding", "vector"]

_VECTORS = frozenset({"scale", "bias", "magnitude"})
_EMBEDDINGS = frozenset({"embed", "embedding", "head", "unembed"})
_STACKS = "blocks"


class OptimizerState(NamedTuple):
  """What the update keeps besides the parameters.

  Attributes:
    applied: Updates applied; the schedule's time.
    skipped: Steps skipped because something was not finite.
    skipped_in_a_row: Those since the last update applied.
    inner: Optax's state.
  """

  applied: Int[Array, ""]
  skipped: Int[Array, ""]
  skipped_in_a_row: Int[Array, ""]
  inner: optax.OptState


class UpdateMetrics(NamedTuple):
  """Scalars of one step, still on the device."""

  loss: Float[Array, ""]
  tokens: Float[Array, ""]
  grad_norm: Float[Array, ""]
  learning_rate: Float[Array, ""]
  skipped: Int[Array, ""]
  skipped_in_a_row: Int[Array, ""]


def kinds(params: Params) -> Any:
  """What each array is: a `"matrix"`, an `"embedding"` or a `"vector"`.

  Embeddings include the head. Matrices, possibly stacked over layers or
  experts, are all that is left with two axes beside those of its stack.
  """

  def kind(path: tuple[Any, ...], leaf: Any) -> Kind:
    names = {str(getattr(key, "key", key)) for key in path}
    if names & _VECTORS:
      return "vector"
    if names & _EMBEDDINGS:
      return "embedding"
    return "matrix" if leaf.ndim - (_STACKS in names) >= 2 else "vector"

  return jax.tree_util.tree_map_with_path(kind, params)


def learning_rate_schedule(train: TrainConfig) -> Schedule:
  """The learning rate of the step after `count` updates.

  Linear warm-up that ends at the peak, then a cosine to the final rate, or a
  constant and in the last `decay_steps` a decay `1 - sqrt(progress)` to it
  (Hägele et al., arXiv 2405.18392).
  """
  ramp, steps = train.warmup_steps, train.num_steps
  start = ramp if train.schedule == "cosine" else steps - train.decay_steps
  floor = train.final_learning_rate

  def rate(count: ArrayLike) -> Float[Array, ""]:
    time = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum((time + 1) / max(ramp, 1), 1)
    # The last step, `steps - 1`, is the one at the final rate.
    progress = jnp.clip((time - start + 1) / max(steps - start, 1), 0, 1)
    if train.schedule == "cosine":
      shape = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    else:
      shape = 1 - jnp.sqrt(progress)
    return train.learning_rate * warm * (floor + (1 - floor) * shape)

  return rate


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
  """The optimizer by name, with decoupled weight decay on matrices alone.

  All take the learning rate of AdamW: Muon's updates are scaled to AdamW's
  root mean square (0.2, arXiv 2502.16982), and Adafactor's have about 1.
  """
  rate = learning_rate_schedule(train)

  def is_matrix(params: Params) -> Any:
    return jax.tree.map(lambda kind: kind == "matrix", kinds(params))

  def is_large(params: Params) -> Any:
    return jax.tree.map(lambda kind: kind != "vector", kinds(params))

  if train.optimizer == "muon":
    return optax.contrib.muon(
      rate,
      beta=train.muon_beta,
      eps=train.epsilon,
      weight_decay=train.weight_decay,
      adam_b1=train.beta1,
      adam_b2=train.beta2,
      muon_weight_dimension_numbers=muon_dimension_numbers,
      consistent_rms=0.2,
    )
  scale: optax.GradientTransformation
  if train.optimizer == "adafactor":
    scale = optax.chain(
      optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    )
  else:
    numbers = (train.beta1, train.beta2, train.epsilon)
    if train.optimizer == "adamw8bit":
      scale = scale_by_adam_8bit(*numbers, large=is_large)
    else:
      scale = optax.scale_by_adam(*numbers)
  return optax.chain(
    scale,
    optax.add_decayed_weights(train.weight_decay, is_matrix),
    optax.scale_by_learning_rate(rate),
  )


def muon_dimension_numbers(params: Params) -> Any:
  """Matrices are `[..., in, out]`, each orthogonalised alone; else `None`."""
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  return jax.tree.map(
    lambda kind: numbers if kind == "matrix" else None, kinds(params)
  )


def state_shardings(
  train: TrainConfig,
  state: OptimizerState,
  device: Sharding,
  of_parameters: Params | None = None,
) -> OptimizerState:
  """Where each array of the state is.

  Args:
    train: Its `optimizer_memory` says whether what the optimizer keeps of
      matrices and embeddings is in host memory.
    state: The state, or its shapes.
    device: Where all else is.
    of_parameters: Where what is kept of each parameter is, if not there too.
  """
  known = {
    _names(path): sharding
    for path, sharding in jax.tree_util.tree_leaves_with_path(of_parameters)
  }

  def place(path: tuple[Any, ...], kind: Kind, leaf: Any) -> Sharding:
    found = _fitted(known.get(_names(path), device), leaf.shape)
    if kind == "vector" or train.optimizer_memory == "device":
      return found
    return found.with_memory_kind("pinned_host")

  return jax.tree_util.tree_map_with_path(place, kinds(state), state)


def _names(path: tuple[Any, ...]) -> tuple[Any, ...]:
  """The dictionaries' keys in a path: of a moment those of its parameter."""
  keys = jax.tree_util.DictKey
  return tuple(key.key for key in path if isinstance(key, keys))


def _fitted(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
  """For an array that may have fewer numbers than its parameter."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  spec, mesh = tuple(sharding.spec), sharding.mesh
  if len(spec) != len(shape):
    spec = ()

  def parts(split: Any) -> int:
    return math.prod(mesh.shape[name] for name in axis_names(split))

  pairs = zip(spec, shape, strict=False)
  kept = [split if size % parts(split) == 0 else None for split, size in pairs]
  return NamedSharding(mesh, P(*kept))


def init_state(
  optimizer: optax.GradientTransformation, params: Params
) -> OptimizerState:
  """The state before the first update."""
  # Each its own buffer: the update donates them all.
  zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
  return OptimizerState(zeros[0], zeros[1], zeros[2], optimizer.init(params))


def _stages(kept: Params | None) -> int:
  """Over how many devices the layers of stacks are split."""
  leaves = jax.tree.leaves({} if kept is None else kept.get(_STACKS, {}))
  if not leaves or not isinstance(leaves[0], NamedSharding):
    return 1
  first = next(iter(leaves[0].spec), None)
  return math.prod(leaves[0].mesh.shape[axis] for axis in axis_names(first))


Update = Callable[
  [Params, OptimizerState, Array, Array, Params],
  tuple[Params, OptimizerState, UpdateMetrics],
]


def make_update(
  train: TrainConfig,
  places: OptimizerState | None = None,
  *,
  kept: Params | None = None,
  updated: Params | None = None,
) -> Update:
  """Compiles `update(params, state, loss, weight, grads)`; donates the state.

  Divides the sums `loss = sum(w * nll)` and `grads` once by
  `weight = sum(w)`, clips the global norm and applies the optimizer. If the
  loss or the norm is not finite nothing changes but the counts of skipped
  steps.

  Args:
    train: What optimizer, and how.
    places: `state_shardings`; needed where a part is in host memory.
    kept: Where each parameter is, of a run on many devices.
    updated: Where each is while it is updated: split as its moments are.

  Returns:
    A function to `(params, state, metrics)`. Its first two arguments are
    gone afterwards.
  """
  optimizer = make_optimizer(train)
  rate = learning_rate_schedule(train)
  apply = apply_at_once(optimizer)
  # Between codes of 8 bits and new ones lie several arrays in fp32, which a
  # TPU's compiler does not fuse; at once they would be those of all layers.
  if train.optimizer_memory == "host" or train.optimizer == "adamw8bit":
    apply = apply_by_layer(optimizer, _STACKS, _stages(kept))

  @functools.partial(
    jax.jit, donate_argnums=(0, 1), out_shardings=(kept, places, None)
  )
  def update(
    params: Params,
    state: OptimizerState,
    loss: Array,
    weight: Array,
    grads: Params,
  ) -> tuple[Params, OptimizerState, UpdateMetrics]:
    if updated is not None:
      params = jax.lax.with_sharding_constraint(params, updated)
    mean = loss / weight
    norm = optax.tree.norm(grads) / weight
    finite = jnp.isfinite(mean) & jnp.isfinite(norm)
    factor = 1 / weight
    if train.clip_norm is not None:
      factor *= jnp.minimum(1, train.clip_norm / jnp.maximum(norm, 1e-30))
    key = None
    if train.stochastic_rounding:
      key = jax.random.fold_in(jax.random.key(train.seed), state.applied)
    stepped, inner = apply(params, state.inner, grads, factor, finite, key)
    metrics = UpdateMetrics(
      loss=mean,
      tokens=weight,
      grad_norm=norm,
      learning_rate=rate(state.applied),
      skipped=state.skipped + ~finite,
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    after = OptimizerState(
      applied=state.applied + finite,
      skipped=metrics.skipped,
      skipped_in_a_row=metrics.skipped_in_a_row,
      inner=inner,
    )
    return stepped, after, metrics

  return update
