"""Mixtures of experts: a router sends each token to a few of many MLPs.

Copies of the tokens, one for each chosen expert, are sorted by expert. Without
a capacity no copy is ever dropped and the products are ragged; with one, each
expert has a buffer of fixed size, and copies beyond it are left out, so that
their tokens get only the residual (and the shared experts).

Sources: Jiang et al., Mixtral (arXiv 2401.04088); Gale et al., MegaBlocks
(arXiv 2211.15841), dropless; Lepikhin et al., GShard (arXiv 2006.16668),
capacity; Zoph et al., ST-MoE (arXiv 2202.08906), the router's z-loss; Qiu et
al. (arXiv 2501.11873), balance over the global batch; Dai et al., DeepSeekMoE
(arXiv 2401.06066), shared experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxchunk.kernels.vma import match_primal
from jaxchunk.models.tape import Tape
from jaxchunk.sharding import experts as across_devices
from jaxchunk.sharding.experts import Across, Exchange, Gather


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
  """Experts in place of the MLP of every layer.

  The router works in at least fp32.

  Attributes:
    num_experts: E.
    experts_per_token: How many of them each token goes to.
    d_ff: F, the width inside an expert.
    shared_d_ff: Width of an MLP that all tokens go through, of the shared
      experts together: several are one as wide as all of them.
    normalize_top_k: Whether the probabilities of the chosen experts are
      divided by their sum (Mixtral always, Qwen 3 by its `norm_topk_prob`).
    capacity_factor: `None` drops nothing. Otherwise an expert takes at most
      `ceil(factor * tokens * experts_per_token / num_experts)` of the tokens
      that a layer is given at once, padding counted: of a chunk. What is
      dropped, and with it the gradient, then depends on the chunks.
    balance_loss: Coefficient of `E * sum_e f_e * p_e`, summed over layers: f
      is the share of all copies that an expert got and p its mean
      probability, both over the global batch.
    z_loss: Coefficient of the mean of `logsumexp(logits) ** 2`, summed over
      layers.

  Raises:
    ValueError: A number is impossible; names it and the remedy.
  """

  num_experts: int
  experts_per_token: int
  d_ff: int
  shared_d_ff: int = 0
  normalize_top_k: bool = True
  capacity_factor: float | None = None
  balance_loss: float = 0.0
  z_loss: float = 0.0

  def __post_init__(self) -> None:
    for name in ("num_experts", "experts_per_token", "d_ff"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"moe.{name}={value!r} must be a positive integer")
    if self.experts_per_token > self.num_experts:
      raise ValueError(
        f"moe.experts_per_token={self.experts_per_token} is more than "
        f"moe.num_experts={self.num_experts}; choose at most that"
      )
    if not isinstance(self.shared_d_ff, int) or self.shared_d_ff < 0:
      raise ValueError(
        f"moe.shared_d_ff={self.shared_d_ff!r} must be an integer, 0 or more"
      )
    if self.capacity_factor is not None and not self.capacity_factor > 0:
      raise ValueError(
        f"moe.capacity_factor={self.capacity_factor} must be positive, or "
        "None to drop nothing"
      )
    for name in ("balance_loss", "z_loss"):
      if not getattr(self, name) >= 0:
        raise ValueError(
          f"moe.{name}={getattr(self, name)} must not be negative"
        )

  @property
  def has_losses(self) -> bool:
    """Whether the routers have losses of their own."""
    return self.balance_loss > 0 or self.z_loss > 0

  def capacity(self, tokens: int) -> int:
    """Copies that an expert takes of so many tokens, with a factor."""
    if self.capacity_factor is None:
      return tokens
    share = tokens * self.experts_per_token / self.num_experts
    return min(max(math.ceil(self.capacity_factor * share), 1), tokens)


class RouterSums(NamedTuple):
  """Sums over the tokens that a router saw, without padding.

  Attributes:
    counts: Copies for each expert, `[E]` int32, dropped ones too.
    probs: Its probability, `[E]`, in at least fp32.
    z: `logsumexp(logits) ** 2`, a scalar.
    dropped: Copies that found no room, int32.
  """

  counts: Int[Array, "*L E"]
  probs: Float[Array, "*L E"]
  z: Float[Array, "*L"]
  dropped: Int[Array, "*L"]


class RouterWeights(NamedTuple):
  """What the sums of a part of the batch count for in the routers' losses.

  The balance loss is linear in the probabilities once the shares of the whole
  batch are known: they are its weights.

  Attributes:
    balance: Of `RouterSums.probs`, `[L,E]`, or `[E]` of one layer.
    z: Of `RouterSums.z`, a scalar.
  """

  balance: Float[Array, "*L E"]
  z: Float[Array, ""]

  @classmethod
  def of(
    cls,
    moe: MoE,
    counts: Int[Array, "L E"],
    tokens: Float[Array, ""],
    scale: Float[Array, ""],
  ) -> "RouterWeights":
    """The weights for a batch.

    Args:
      moe: The coefficients.
      counts: Copies for each expert in the whole batch.
      tokens: Of the whole batch, without padding.
      scale: A factor on the losses.
    """
    share = counts / (tokens * moe.experts_per_token)
    each = scale / tokens
    return cls(
      moe.balance_loss * moe.num_experts * each * share, moe.z_loss * each
    )

  def loss(self, sums: RouterSums) -> Float[Array, ""]:
    """The part of the losses that these sums are."""
    return jnp.sum(self.balance * sums.probs) + self.z * jnp.sum(sums.z)


def router_loss(moe: MoE, sums: RouterSums) -> Float[Array, ""]:
  """The routers' losses of a whole batch, times their coefficients.

  Args:
    moe: The coefficients.
    sums: Of every layer, `[L, ...]`, over the whole batch.

  Returns:
    `balance_loss * sum_l E * sum_e f_e * p_e + z_loss * sum_l mean(z)`.
  """
  copies = sums.counts[0].sum().astype(sums.probs.dtype)
  tokens = copies / moe.experts_per_token
  f_LE = sums.counts / copies
  balance = moe.num_experts * jnp.sum(f_LE * (sums.probs / tokens))
  return moe.balance_loss * balance + moe.z_loss * jnp.sum(sums.z) / tokens


class Experts(nnx.Module):
  """`router [D,E]` and the experts' `gate`, `up` `[E,D,F]` and `down [E,F,D]`.

  Args:
    moe: Their number and width.
    d_model: D.
    dtype: Of the parameters.
    gain: Factor on the initial `down`.
    rngs: Seeds.
  """

  def __init__(
    self,
    moe: MoE,
    d_model: int,
    dtype: DTypeLike,
    *,
    gain: float,
    rngs: nnx.Rngs,
  ):
    E, D, F = moe.num_experts, d_model, moe.d_ff

    def normal(scale: float, *shape: int) -> nnx.Param[Array]:
      return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale)

    self.moe = moe
    self.router = normal(D**-0.5, D, E)
    self.gate = normal(D**-0.5, E, D, F)
    self.up = normal(D**-0.5, E, D, F)
    self.down = normal(gain * F**-0.5, E, F, D)

  def __call__(
    self,
    tape: Tape,
    h: Float[Array, "B T D"],
    activation: Callable[[Array], Array],
    *,
    valid: Bool[Array, "B T"] | None = None,
    across: Across | None = None,
    keep: bool = False,
  ) -> Float[Array, "B T D"]:
    """The chosen experts' outputs, weighed by the router.

    Args:
      tape: Remembers the products; `tape.router` gets the `RouterSums`.
      h: Normed tokens.
      activation: Of the gates.
      valid: Which tokens are no padding; by default all. Padding takes no
        room, is in no sum and gives 0.
      across: How to reach experts that are split over a mesh axis, inside a
        shard_map; this device's tokens are its own. By default `Exchange()`
        where not all are here.
      keep: Whether the backward pass reads the output.

    Returns:
      The outputs, without the residual.

    Raises:
      ValueError: The experts cannot be split evenly over the axis.
    """
    moe = self.moe
    shape = h.shape
    x = h.reshape(-1, shape[-1])
    mine = jnp.ones(x.shape[0], bool) if valid is None else valid.reshape(-1)
    logits = self._logits(tape, x)
    probs = jax.nn.softmax(logits)
    weights, chosen = lax.top_k(probs, moe.experts_per_token)
    if moe.normalize_top_k:
      weights = weights / weights.sum(-1, keepdims=True)
    copies = _Copies.of(chosen, mine, moe.num_experts)
    room = moe.capacity(x.shape[0])
    tape.router = RouterSums(
      copies.counts,
      jnp.sum(jnp.where(mine[:, None], probs, 0), 0),
      jnp.sum(jnp.where(mine, jax.nn.logsumexp(logits, -1) ** 2, 0)),
      jnp.maximum(copies.counts - room, 0).sum(),
    )
    matrices = [self.gate[...], self.up[...], self.down[...]]
    if across is None and matrices[0].shape[0] < moe.num_experts:
      across = Exchange()
    if across is not None:
      devices = lax.axis_size(across.axis)
      across_devices.check_split(moe.num_experts, devices)
    if isinstance(across, Gather):
      matrices = [across_devices.gather_experts(w, across) for w in matrices]
    axis = across.axis if isinstance(across, Exchange) else None
    mlp = _Mlp(tape, matrices, activation, axis, keep)
    rows = copies.sort(x), copies.sort_weights(weights)
    if moe.capacity_factor is None:
      y = mlp.dropless(rows, copies.counts, self._most_rows(x.shape[0], axis))
    else:
      y = mlp.with_capacity(rows, copies, room)
    # Where the experts' width is split, the parts are added up.
    return match_primal(copies.combine(y), x).reshape(shape)

  def _logits(self, tape: Tape, x: Float[Array, "M D"]) -> Float[Array, "M E"]:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return tape.product("router", "MD,DE->ME", x.astype(wide), self.router[...])

  def _most_rows(self, tokens: int, axis: str | None) -> int:
    """Copies that may go to one device: a token's experts are distinct."""
    devices = 1 if axis is None else lax.axis_size(axis)
    local = self.moe.num_experts // devices
    return tokens * min(self.moe.experts_per_token, local)


class _Copies(NamedTuple):
  """Copies of tokens sorted by expert; first choices before second ones.

  Copy n is choice `n // M` of token `n % M`, before sorting.

  Attributes:
    order: The copy at each place.
    inverse: The place of each copy.
    expert: Of the copy at each place; E is padding.
    counts: Copies of each expert.
    choices: Of a token.
  """

  order: Int[Array, " N"]
  inverse: Int[Array, " N"]
  expert: Int[Array, " N"]
  counts: Int[Array, " E"]
  choices: int

  @classmethod
  def of(
    cls, chosen: Int[Array, "M k"], valid: Bool[Array, " M"], num_experts: int
  ) -> "_Copies":
    expert = jnp.where(valid[None], chosen.T, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    counts = (expert[:, None] == jnp.arange(num_experts)[None]).sum(0)
    return cls(
      order,
      across_devices.inverse_permutation(order),
      expert[order],
      counts.astype(jnp.int32),
      chosen.shape[1],
    )

  def sort(self, x: Float[Array, "M D"]) -> Float[Array, "N D"]:
    # By a permutation: its gradient adds nothing up, in no order of chance.
    copies = jnp.broadcast_to(x[None], (self.choices, *x.shape))
    return _permuted(copies.reshape(-1, x.shape[-1]), self.order)

  def sort_weights(self, weights: Float[Array, "M k"]) -> Float[Array, " N"]:
    return _permuted(weights.T.reshape(-1), self.order)

  def combine(self, y: Float[Array, "N D"]) -> Float[Array, "M D"]:
    wide = jnp.promote_types(y.dtype, jnp.float32)
    y = _permuted(y, self.inverse).reshape(self.choices, -1, y.shape[-1])
    return y.astype(wide).sum(0).astype(y.dtype)

  def slots(self, room: int) -> Int[Array, "E C"]:
    """The place of the copy in each slot of a buffer, N where it is empty."""
    start = jnp.cumsum(self.counts) - self.counts
    at = jnp.arange(room)[None]
    return jnp.where(
      at < self.counts[:, None], start[:, None] + at, self.order.shape[0]
    )

  def slot_of(self, room: int) -> Int[Array, " N"]:
    """The slot, `e * room + c`, of the copy at each place, or behind all."""
    E, N = self.counts.shape[0], self.order.shape[0]
    start = jnp.cumsum(self.counts) - self.counts
    rank = jnp.arange(N) - start[jnp.minimum(self.expert, E - 1)]
    kept = (self.expert < E) & (rank < room)
    return jnp.where(kept, self.expert * room + rank, E * room)


class _Mlp(NamedTuple):
  """The gated MLPs of the experts that are here.

  A copy's weight multiplies what goes into `down`, not what comes out, whose
  gradient would want the output again.
  """

  tape: Tape
  matrices: list[Array]
  activation: Callable[[Array], Array]
  axis: str | None
  keep: bool

  def dropless(
    self,
    rows: tuple[Array, ...],
    counts: Int[Array, " E"],
    most: int,
  ) -> Float[Array, "N D"]:
    ticket = None
    if self.axis is not None:
      rows, counts, ticket = across_devices.send_rows(
        rows, counts, axis=self.axis, room=most
      )
    x, weights = rows
    product = functools.partial(self.tape.ragged_product, sizes=counts)
    gate, up, down = self.matrices
    y = product(
      "expert_down",
      self._hidden(
        product("expert_gate", x, gate), product("expert_up", x, up), weights
      ),
      down,
      keep=self.keep,
    )
    if ticket is None or self.axis is None:
      return y
    return across_devices.return_rows(y, ticket, axis=self.axis)

  def with_capacity(
    self, rows: tuple[Array, ...], copies: _Copies, room: int
  ) -> Float[Array, "N D"]:
    slots = copies.slots(room)
    x, weights = (a.at[slots].get(mode="fill", fill_value=0) for a in rows)
    if self.axis is not None:
      x, weights = (
        across_devices.send_slots(a, axis=self.axis) for a in (x, weights)
      )
    gate, up, down = self.matrices
    product = self.tape.product
    y = product(
      "expert_down",
      "ECF,EFD->ECD",
      self._hidden(
        product("expert_gate", "ECD,EDF->ECF", x, gate),
        product("expert_up", "ECD,EDF->ECF", x, up),
        weights,
      ),
      down,
      keep=self.keep,
    )
    if self.axis is not None:
      y = across_devices.return_slots(y, axis=self.axis)
    y = y.reshape(-1, y.shape[-1])
    return y.at[copies.slot_of(room)].get(mode="fill", fill_value=0)

  def _hidden(self, gate: Array, up: Array, weights: Array) -> Array:
    h = self.activation(gate) * up
    return (h * weights[..., None]).astype(gate.dtype)


def _permuted(a: Array, order: Array) -> Array:
  return a.at[order].get(unique_indices=True, mode="promise_in_bounds")
