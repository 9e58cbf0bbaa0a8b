"""Ways to attend over a sequence on several devices, and where tokens lie.

What each of them sends, and which orders there are: `context.py`.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

Order = Literal["contiguous", "zigzag", "striped"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ordered:
  """What all schemes share.

  Attributes:
    order: How tokens are dealt out.

  Raises:
    ValueError: The scheme does not go with the order.
  """

  order: Order = "zigzag"
  orders: ClassVar[tuple[Order, ...]] = ("contiguous", "zigzag", "striped")

  def __post_init__(self) -> None:
    if self.order not in self.orders:
      raise ValueError(
        f"{type(self).__name__}(order={self.order!r}) is not one of "
        f"{list(self.orders)}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather(_Ordered):
  """All keys and values come to every device."""

  order: Order = "contiguous"
  orders: ClassVar[tuple[Order, ...]] = ("contiguous", "zigzag")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(_Ordered):
  """Keys and values go around."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRing(_Ordered):
  """Queries go around, partial outputs back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ulysses(_Ordered):
  """Each device gets all tokens of some heads."""

  order: Order = "contiguous"
  orders: ClassVar[tuple[Order, ...]] = ("contiguous",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class USP(_Ordered):
  """Ulysses among neighbours, and a ring around their groups.

  Attributes:
    heads: Devices of a group, among which heads are dealt out.
    order: How tokens are dealt out to the groups.
  """

  heads: int

  def __post_init__(self) -> None:
    if not isinstance(self.heads, int) or self.heads < 1:
      raise ValueError(f"USP(heads={self.heads!r}) must be a positive integer")
    super().__post_init__()


Scheme = AllGather | Ring | TokenRing | Ulysses | USP


def device_order(
  length: int, devices: int, scheme: Scheme
) -> Int[np.ndarray, " S"]:
  """Which token lies where: device n holds the n-th part of the result.

  Args:
    length: S, tokens of the whole sequence.
    devices: P, of the axis.
    scheme: How they attend.

  Returns:
    Positions; `x[..., device_order(...)]`, cut into P parts, is what the
    devices hold, and `argsort` of it leads back.

  Raises:
    ValueError: The parts would not be equal; names the next length that fits.
  """
  ranks = ring_ranks(scheme, devices)
  if length % _grain(scheme, devices):
    grain = _grain(scheme, devices)
    raise ValueError(
      f"a sequence of {length} tokens cannot be dealt out to {devices} devices "
      f"by {scheme}: it must be a multiple of {grain}; pad it to "
      f"{-(-length // grain) * grain}"
    )
  positions = np.arange(length)
  if scheme.order == "striped":
    return positions.reshape(-1, ranks).T.reshape(-1)
  if scheme.order == "zigzag":
    pieces = positions.reshape(2 * ranks, -1)
    pairs = [(n, 2 * ranks - 1 - n) for n in range(ranks)]
    return np.concatenate([pieces[n] for pair in pairs for n in pair])
  return positions


def ring_ranks(scheme: Scheme, devices: int) -> int:
  """Among how many tokens are dealt out."""
  if not isinstance(scheme, USP):
    return devices
  if devices % scheme.heads:
    fits = [n for n in range(scheme.heads, 0, -1) if devices % n == 0]
    raise ValueError(
      f"USP(heads={scheme.heads}) does not divide the {devices} devices of the "
      f"axis; the nearest that does is {fits[0]}"
    )
  return devices // scheme.heads


def _grain(scheme: Scheme, devices: int) -> int:
  """What the length must be a multiple of."""
  pieces = 2 * ring_ranks(scheme, devices) if scheme.order == "zigzag" else 1
  return int(np.lcm(devices, pieces))
