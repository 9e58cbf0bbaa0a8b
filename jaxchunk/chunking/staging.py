"""Which layers each pipeline stage has, and their parameters stage by stage."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxchunk.chunking.spans import Span
from jaxchunk.chunking.trainable import Trainable
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.pipeline.table import Placement


class Staging(NamedTuple):
  """How the layers of a model are dealt out to virtual stages.

  A stage has whole periods of the window pattern, the last one also what
  remains behind them. Stacks of parameters are laid out device by device and
  part by part, with the same room for every stage.

  Attributes:
    placement: Of the virtual stages.
    periods: How many each stage has.
    rest: Layers behind the last period, on the last stage.
    period: Layers of a period.
  """

  placement: Placement
  periods: tuple[int, ...]
  rest: int
  period: int

  @classmethod
  def of(
    cls,
    cfg: ModelConfig,
    placement: Placement,
    layers: Sequence[int] | None = None,
  ) -> "Staging":
    """Deals layers out.

    Args:
      cfg: The model.
      placement: Of the virtual stages.
      layers: Of each stage; by default as even as they can be, the first
        stages with one more, because the last has the head.

    Raises:
      ValueError: There are fewer layers than stages, or `layers` do not add
        up or cut a period of the window pattern.
    """
    period = len(cfg.window_pattern)
    whole, rest = divmod(cfg.num_layers, period)
    stages = placement.stages
    of_period = "" if period == 1 else f" in periods of {period}"
    if whole < stages:
      raise ValueError(
        f"num_layers={cfg.num_layers}{of_period} cannot be dealt out to "
        f"{stages} stages; at most {whole} stages have layers"
      )
    if layers is None:
      each, more = divmod(whole, stages)
      periods = [each + (stage < more) for stage in range(stages)]
      return cls(placement, tuple(periods), rest, period)
    if len(layers) != stages or sum(layers) != cfg.num_layers:
      raise ValueError(
        f"layers={tuple(layers)} of {stages} stages must be {stages} numbers "
        f"that add up to num_layers={cfg.num_layers}"
      )
    cut = [n for n in (*layers[:-1], layers[-1] - rest) if n % period or n < 1]
    if cut:
      raise ValueError(
        f"layers={tuple(layers)}: each stage needs a multiple of the window "
        f"pattern's {period} layers, at least one"
      )
    return cls(placement, tuple(n // period for n in layers), rest, period)

  @property
  def room(self) -> int:
    """Periods that there is room for on each stage."""
    last = self.periods[-1] + (self.rest > 0)
    return max(*self.periods, last)

  def layers(self, stage: int) -> int:
    """How many layers a stage has."""
    rest = self.rest if stage == len(self.periods) - 1 else 0
    return self.periods[stage] * self.period + rest

  def span(self, stage: Int[Array, ""]) -> Span:
    """The layers of a stage, which may be traced."""
    starts = np.cumsum((0, *self.periods[:-1]))
    rests = [0] * (len(self.periods) - 1) + [self.rest]
    firsts = np.asarray(self.placement.part_of) * self.room
    columns = [firsts, starts, self.periods, rests]
    first, number, periods, rest = jnp.asarray(np.asarray(columns, np.int32))[
      :, stage
    ]
    return Span(first, number, periods, rest, self.period)

  def rows(self, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Between a stack of all layers and one stage by stage.

    Args:
      position: Of the layers in the window pattern.

    Returns:
      For each place of the new stack the layer that goes there (some layer,
      where there is room for more), and for each layer its place.
    """
    placement, room = self.placement, self.room
    to = np.zeros((placement.devices, placement.parts, room), np.int64)
    back = []
    starts = np.cumsum((0, *self.periods[:-1]))
    for stage, count in enumerate(self.periods):
      last = stage == len(self.periods) - 1
      count += last and position < self.rest
      device, part = placement.device_of[stage], placement.part_of[stage]
      to[device, part, :count] = starts[stage] + np.arange(count)
      first = (device * placement.parts + part) * room
      back.append(first + np.arange(count))
    return to.reshape(-1), np.concatenate(back)

  @property
  def as_is(self) -> bool:
    """Whether stacks of all layers are stage by stage already."""
    return all(
      np.array_equal(rows, np.arange(len(rows)))
      for position in range(self.period)
      for rows in self.rows(position)
    ) and all(
      len(self.rows(position)[0]) == len(self.rows(position)[1])
      for position in range(self.period)
    )

  def staged(self, model: Transformer) -> Transformer:
    """The model with its stacks of layers stage by stage."""
    if self.as_is:
      return model
    leaves, treedef = jax.tree.flatten(model)
    moved = _take(leaves, self._indices(Trainable.of(model), 0))
    return jax.tree.unflatten(treedef, moved)

  def unstaged(self, trainable: Trainable, grads: list[Array]) -> list[Array]:
    """Gradients with their stacks in the order of layers again."""
    if self.as_is:
      return grads
    indices = self._indices(trainable, 1)
    pairs = zip(indices, trainable.chosen, strict=True)
    return _take(grads, [index for index, mine in pairs if mine])

  def _indices(
    self, trainable: Trainable, way: int
  ) -> list[tuple[int, ...] | None]:
    return [
      tuple(self.rows(path[1])[way].tolist()) if path[0] == "blocks" else None
      for path in trainable.paths
    ]


def _take(
  leaves: list[Any], indices: list[tuple[int, ...] | None]
) -> list[Any]:
  if isinstance(leaves[0], jax.ShapeDtypeStruct):
    return [
      a
      if rows is None
      else jax.ShapeDtypeStruct((len(rows), *a.shape[1:]), a.dtype)
      for a, rows in zip(leaves, indices, strict=True)
    ]
  return _take_rows(leaves, tuple(indices))


@functools.partial(jax.jit, static_argnums=1)
def _take_rows(
  leaves: list[Array], indices: tuple[tuple[int, ...] | None, ...]
) -> list[Array]:
  return [
    a if rows is None else jnp.take(a, np.asarray(rows), axis=0)
    for a, rows in zip(leaves, indices, strict=True)
  ]
