"""Rotary position embeddings and their ways to reach longer contexts.

All scalings here are functions of the position alone, never of the length of
the sequence at hand, so that a token is embedded the same in every chunk.
Where the published scaling follows that length, it is set once: `length`.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
  """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

  factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class NtkScaling:
  """The base grows to `theta * factor ** (H / (H - 2))` (NTK-aware)."""

  factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Low frequencies divided by `factor`, high ones kept (Llama 3.1).

  Attributes:
    factor: Divisor of frequencies with long wavelengths.
    low_freq_factor: Wavelengths over original / this are divided.
    high_freq_factor: Wavelengths under original / this are kept.
    original_length: Context length of the first training, in tokens.
  """

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
  """NTK by parts with a temperature (Peng et al., arXiv 2309.00071).

  Attributes:
    factor: Ratio of the new context length to the original.
    original_length: Context length of the first training, in tokens.
    beta_fast: Channels that turn more often than this are kept.
    beta_slow: Channels that turn less often than this are divided.
    attention_factor: Multiplies q and k; `None` is `0.1 ln(factor) + 1`.
    truncate: Round the borders of the ramp to whole channels.
  """

  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNtkScaling:
  """NTK-aware, with the factor that transformers takes at a length.

  Attributes:
    factor: Of the base, as `NtkScaling`, is then
      `factor * length / original_length - (factor - 1)`.
    original_length: Context length of the first training, in tokens.
    length: That of the longest sequence; up to `original_length` nothing is
      scaled.
  """

  factor: float
  original_length: int
  length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
  """A divisor for each frequency (Ding et al., arXiv 2402.13753).

  Attributes:
    short_factors: Divisors up to `original_length`.
    long_factors: Divisors beyond it.
    original_length: Context length of the first training, in tokens.
    length: That of the longest sequence; decides which divisors are used.
    attention_factor: Multiplies q and k.
  """

  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  original_length: int
  length: int
  attention_factor: float = 1.0

  @property
  def factors(self) -> tuple[float, ...]:
    """The divisors in use."""
    long = self.length > self.original_length
    return self.long_factors if long else self.short_factors


Scaling = (
  LinearScaling
  | NtkScaling
  | Llama3Scaling
  | YarnScaling
  | DynamicNtkScaling
  | LongRopeScaling
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """A rotary embedding.

  Attributes:
    theta: The base: channel pair c turns by `theta ** (-2c / R)` a token.
    scaling: How it reaches beyond the context length of the first training.
    fraction: R / H: the first R channels of a head turn, the others stay.

  Raises:
    ValueError: A number is impossible; names it and its value.
  """

  theta: float = 10_000.0
  scaling: Scaling | None = None
  fraction: float = 1.0

  def __post_init__(self) -> None:
    if not self.theta > 1:
      raise ValueError(f"rope theta={self.theta} must be more than 1")
    if not 0 < self.fraction <= 1:
      raise ValueError(f"rope fraction={self.fraction} must be in (0, 1]")
    for name in (
      "factor",
      "original_length",
      "length",
      "low_freq_factor",
      "beta_slow",
    ):
      value = getattr(self.scaling, name, 1)
      if not value > 0:
        raise ValueError(f"rope {name}={value} must be positive")
    for low, high in (
      ("low_freq_factor", "high_freq_factor"),
      ("beta_slow", "beta_fast"),
    ):
      ends = getattr(self.scaling, low, 0), getattr(self.scaling, high, 1)
      if not ends[0] < ends[1]:
        raise ValueError(
          f"rope {low}={ends[0]} must be less than {high}={ends[1]}"
        )

  def width(self, head_dim: int) -> int:
    """R, how many channels of a head turn."""
    return int(head_dim * self.fraction)

  def check(self, head_dim: int, name: str) -> None:
    """Checks what depends on the width of a head.

    Args:
      head_dim: H.
      name: What to call the embedding in a message.

    Raises:
      ValueError: An odd number of channels would turn, or their number is not
        that of the scaling's factors.
    """
    width = self.width(head_dim)
    if width % 2 or not width:
      raise ValueError(
        f"{name}.fraction={self.fraction} of head_dim={head_dim} turns {width} "
        "channels; it must be an even number of at least 2"
      )
    if isinstance(self.scaling, LongRopeScaling):
      for kind in ("short_factors", "long_factors"):
        count = len(getattr(self.scaling, kind))
        if count != width // 2:
          raise ValueError(
            f"{name}.scaling.{kind} has {count} numbers for {width // 2} pairs "
            "of channels"
          )

  def __lt__(self, other: "Rope") -> bool:
    # An order of any kind: pytrees sort the keys of dictionaries.
    return repr(self) < repr(other)


def frequencies(
  head_dim: int, rope: Rope
) -> tuple[Float[np.ndarray, " R/2"], float]:
  """Angular frequency of each pair of channels, and a factor on cos and sin.

  Args:
    head_dim: H, even.
    rope: The embedding.

  Returns:
    Frequencies in radians per token, fp64, and the factor.
  """
  width = rope.width(head_dim)
  exponent = np.arange(0, width, 2) / width
  plain = rope.theta**-exponent
  match rope.scaling:
    case None:
      return plain, 1.0
    case LinearScaling(factor=factor):
      return plain / factor, 1.0
    case NtkScaling(factor=factor):
      return _ntk(rope.theta, exponent, factor), 1.0
    case DynamicNtkScaling() as scaling:
      ratio = max(scaling.length / scaling.original_length, 1)
      factor = scaling.factor * ratio - (scaling.factor - 1)
      return _ntk(rope.theta, exponent, factor), 1.0
    case LongRopeScaling() as scaling:
      return plain / np.asarray(scaling.factors), scaling.attention_factor
    case Llama3Scaling() as scaling:
      return _llama3(plain, scaling), 1.0
    case YarnScaling() as scaling:
      return _yarn(plain, rope.theta, scaling)


def _ntk(theta: float, exponent: np.ndarray, factor: float) -> np.ndarray:
  width = 2 * len(exponent)
  grown = theta * factor ** (width / (width - 2))
  return np.asarray(grown**-exponent)


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
  turns = scaling.original_length * plain / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return plain * (keep + (1 - keep) / scaling.factor)


def _yarn(
  plain: np.ndarray, theta: float, scaling: YarnScaling
) -> tuple[np.ndarray, float]:
  width = 2 * len(plain)

  def channel(turns: float) -> float:
    period = scaling.original_length / (turns * 2 * math.pi)
    return width * math.log(period) / (2 * math.log(theta))

  low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  ramp = (np.arange(width // 2) - low) / max(high - low, 1e-3)
  keep = 1 - np.clip(ramp, 0, 1)
  factor = scaling.attention_factor
  if factor is None:
    factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
  return plain * (keep + (1 - keep) / scaling.factor), factor


def rope_tables(
  positions: Int[Array, "B T"], head_dim: int, rope: Rope, dtype: jnp.dtype
) -> tuple[Float[Array, "B T R/2"], Float[Array, "B T R/2"]]:
  """Cosines and sines of every position and pair of channels.

  Args:
    positions: Token positions.
    head_dim: H.
    rope: The embedding.
    dtype: Of the activations; the tables are in at least fp32.

  Returns:
    `(cos, sin)`.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  freqs, factor = frequencies(head_dim, rope)
  angle = (
    positions[..., None].astype(wide) * jnp.asarray(freqs, wide)[None, None]
  )
  return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
  x: Float[Array, "*B T H"],
  tables: tuple[Float[Array, "B T R/2"], Float[Array, "B T R/2"]],
) -> Float[Array, "*B T H"]:
  """Turns channel c with channel c + R/2 by the tables' angles.

  Args:
    x: `[B, ..., T, H]`: any axes may stand between batch and time.
    tables: From `rope_tables`.

  Returns:
    As x.
  """
  between = tuple(range(1, x.ndim - 2))
  cos, sin = (jnp.expand_dims(t, between) for t in tables)
  half = cos.shape[-1]
  first, second = (
    part.astype(cos.dtype) for part in (x[..., :half], x[..., half : 2 * half])
  )
  turned = [first * cos - second * sin, second * cos + first * sin]
  parts = [part.astype(x.dtype) for part in turned]
  if 2 * half < x.shape[-1]:
    parts.append(x[..., 2 * half :])
  return jnp.concatenate(parts, axis=-1)
