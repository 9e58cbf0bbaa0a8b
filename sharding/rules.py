"""Logical axes of arrays, and the mesh axes that split them.

A model names the axes of its arrays by what they are ("mlp", "heads",
"batch"); rules say which mesh axis splits each. Changing a layout changes the
rules or the sizes, never the model.
"""

import types
from collections.abc import Iterator, Mapping, Sequence

from jax.sharding import PartitionSpec

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""Of a mesh, from those that talk least to those that talk most."""

LOGICAL = types.MappingProxyType(
  {
    "layers": ("stage",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "rank": (),
    "experts": ("expert",),
    "lane": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "activation": (),
  }
)
"""By default what splits each logical axis: of parameters the layers, the
model's width ("embed"), heads, the MLP, the vocabulary, adapters' rank and
experts; of activations lanes, tokens ("sequence") and the width."""


Split = str | tuple[str, ...] | None
"""An entry of a `PartitionSpec`: what splits one axis of an array."""


def axis_names(split: Split) -> tuple[str, ...]:
  """The mesh axes of an entry."""
  return (split,) if isinstance(split, str) else tuple(split or ())


def split_by(names: Sequence[str]) -> Split:
  """The entry of so many mesh axes."""
  return names[0] if len(names) == 1 else tuple(names) or None


class Rules(Mapping[str, tuple[str, ...]]):
  """Mesh axes by logical axis.

  Args:
    changes: Logical axes with other mesh axes than by default: a name, several
      from the slowest to the fastest, or `None` for a copy on every device.

  Raises:
    ValueError: A mesh axis is unknown, or named twice for a logical axis.
  """

  def __init__(
    self, changes: Mapping[str, str | Sequence[str] | None] | None = None
  ):
    rules = dict(LOGICAL)
    for name, axes in (changes or {}).items():
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      if unknown := [axis for axis in axes if axis not in AXES]:
        raise ValueError(
          f"rule {name!r} names {unknown}; mesh axes are {list(AXES)}"
        )
      if len(set(axes)) < len(axes):
        raise ValueError(f"rule {name!r} names an axis twice: {list(axes)}")
      rules[name] = axes
    self._rules = types.MappingProxyType(rules)

  def __getitem__(self, name: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis.

    Raises:
      KeyError: There is no rule.
    """
    if name not in self._rules:
      raise KeyError(
        f"no rule for the logical axis {name!r}; there are {sorted(self)}"
      )
    return self._rules[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._rules)

  def __len__(self) -> int:
    return len(self._rules)

  def __hash__(self) -> int:
    return hash(tuple(sorted(self._rules.items())))

  def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    """How an array with such logical axes is split.

    Args:
      axes: One for each axis of the array; `None` is never split.

    Raises:
      KeyError: There is no rule for one.
      ValueError: Two of them are split by one mesh axis.
    """
    owner: dict[str, str] = {}
    entries: list[Split] = []
    for name in axes:
      split = () if name is None else self[name]
      for axis in split:
        if axis in owner:
          raise ValueError(
            f"an array with the axes {list(axes)} would be split twice by "
            f"{axis!r}: for {owner[axis]!r} and for {name!r}; change the rule "
            "of one"
          )
        owner[axis] = str(name)
      entries.append(split_by(split))
    return PartitionSpec(*entries)
