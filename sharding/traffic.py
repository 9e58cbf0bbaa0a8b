"""What a program sends between devices, counted before it is compiled.

Bytes are those that each device sends, as a ring of n devices does it: of a
gather or a scatter (n - 1) / n of the whole, of a sum over devices twice that.
Compilers may merge or split collectives; what has to travel stays the same.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

_SUMS = ("psum", "psum_invariant", "pmax", "pmin")
_PARTS = ("all_gather", "all_gather_invariant", "reduce_scatter", "all_to_all")


class Collective(NamedTuple):
  """A kind of collective in a program.

  Attributes:
    kind: Such as "all_gather", as jax calls it.
    axes: Of the mesh.
    size: Bytes that a device sends each time.
    times: How often it runs.
  """

  kind: str
  axes: tuple[str, ...]
  size: int
  times: int

  @property
  def total(self) -> int:
    """Bytes that a device sends."""
    return self.size * self.times


def traffic(
  traced: jax.stages.Traced, mesh: Mapping[str, int], *, trips: int
) -> list[Collective]:
  """The collectives of a program inside `jax.shard_map`, in order.

  Args:
    traced: From `jax.jit(f).trace(...)`.
    mesh: Size of each mesh axis, `mesh.shape`.
    trips: How often loops run whose number of steps is known only at run time:
      of a lane's program its chunks.

  Returns:
    One for each collective over more than one device; of branches, those of
    the one that sends most.
  """
  return [c for c in _walk(traced.jaxpr.jaxpr, mesh, 1, trips) if c.size]


def _walk(
  jaxpr: Jaxpr, mesh: Mapping[str, int], times: int, trips: int
) -> Iterator[Collective]:
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in (*_SUMS, *_PARTS, "ppermute"):
      yield _collective(eqn, mesh, times)
    elif name == "scan":
      inner = times * eqn.params["length"]
      yield from _walk(eqn.params["jaxpr"].jaxpr, mesh, inner, trips)
    elif name == "while":
      body = eqn.params["body_jaxpr"].jaxpr
      yield from _walk(body, mesh, times * trips, trips)
    elif name == "cond":
      branches = [
        list(_walk(branch.jaxpr, mesh, times, trips))
        for branch in eqn.params["branches"]
      ]
      yield from max(branches, key=lambda found: sum(c.total for c in found))
    else:
      for inside in _jaxprs(eqn.params.values()):
        yield from _walk(inside, mesh, times, trips)


def _collective(eqn: Any, mesh: Mapping[str, int], times: int) -> Collective:
  name = eqn.primitive.name
  axes = eqn.params.get("axes", eqn.params.get("axis_name"))
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  count = math.prod(mesh[axis] for axis in axes)
  if groups := eqn.params.get("axis_index_groups"):
    count = len(groups[0])
  # What is gathered is whole behind, what is scattered before.
  whole = sum(max(_bytes(a), _bytes(b)) for a, b in _pairs(eqn))
  if name == "ppermute":
    return Collective(name, axes, whole if count > 1 else 0, times)
  share = whole * (count - 1) // count
  return Collective(name, axes, share * (2 if name in _SUMS else 1), times)


def _pairs(eqn: Any) -> Iterator[tuple[Any, Any]]:
  return zip(eqn.invars, eqn.outvars, strict=True)


def _bytes(var: Any) -> int:
  return math.prod(var.aval.shape) * var.aval.dtype.itemsize


def _jaxprs(values: Any) -> Iterator[Jaxpr]:
  for value in values:
    if isinstance(value, ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, Jaxpr):
      yield value
    elif isinstance(value, tuple | list):
      yield from _jaxprs(value)
