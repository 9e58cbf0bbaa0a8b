"""Consecutive layers of a model, and the loop over them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxchunk.models.transformer import Transformer


class Span(NamedTuple):
  """Consecutive layers of a model, from the start of a period of its pattern.

  All but `period` may be traced.

  Attributes:
    first: Of the first period in the stacks of parameters and their gradients.
    number: Of the first period in the model.
    periods: How many whole periods.
    rest: Layers of one more period behind them.
    period: Layers of a period.
  """

  first: Any
  number: Any
  periods: Any
  rest: Any
  period: int

  @classmethod
  def of(cls, model: Transformer) -> "Span":
    """All layers of a model."""
    period = len(model.blocks)
    return cls(0, 0, *divmod(model.cfg.num_layers, period), period)

  def layer(self, position: int, index: Any) -> Any:
    """The number in the model of a layer of a period of the span."""
    return (self.number + index) * self.period + position


def over_layers(
  span: Span,
  layer: Callable[[int, Any, Any], Any],
  carry: Any,
  *,
  reverse: bool = False,
) -> Any:
  """Applies `layer(position, index, carry)` to a span of layers, in order.

  A loop over whole periods of the window pattern, and what remains behind it;
  indices count periods of the span.
  """
  positions = range(span.period)
  order = positions[::-1] if reverse else positions

  def body(n: Any, carry: Any) -> Any:
    index = span.periods - 1 - n if reverse else n
    for position in order:
      carry = layer(position, index, carry)
    return carry

  def remaining(carry: Any) -> Any:
    for position in order:
      if not isinstance(span.rest, int):
        carry = _if_less(position, span, layer, carry)
      elif position < span.rest:
        carry = layer(position, span.periods, carry)
    return carry

  if reverse:
    carry = remaining(carry)
  carry = lax.fori_loop(0, span.periods, body, carry)
  return carry if reverse else remaining(carry)


def _if_less(
  position: int,
  span: Span,
  layer: Callable[[int, Any, Any], Any],
  carry: Any,
) -> Any:
  """A loop of one or no step: buffers stay in place, unlike in a branch."""
  if position == span.period - 1:
    return carry
  some = jnp.asarray(position < span.rest, jnp.int32)
  return lax.fori_loop(
    0, some, lambda _, carry: layer(position, span.periods, carry), carry
  )


def put(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
  """The tuple with one item replaced."""
  return (*items[:index], item, *items[index + 1 :])
