"""The next token of each of many sequences, each by its own rules.

One program serves all rules: they are values. What no row asks for is skipped.
Nothing is sorted. The k-th largest logit, or the one at which the probabilities
of all larger ones reach p, is found bit by bit: the floats in the order of
their bits are integers, and 32 sums over the vocabulary decide the 32 bits. A
token is drawn by one random number and the sums of the probabilities, which
are taken over blocks first.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, UInt

from jaxchunk.inference.params import MAX_LOGPROBS

PROMPT = 1 << 14
"""In counts of tokens: the token is in the prompt."""

_BLOCK = 256
_ALL = np.uint32(0xFFFFFFFF)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
  """How a token is drawn for each of R rows; see `SamplingParams`.

  Attributes:
    seed: Of the draws.
    position: The new token's, which together with the seed decides.
    temperature: 0 is greedy.
    top_k: 0 is all.
    top_p: 1 is all.
    min_p: 0 is all.
    repetition: 1 is none.
    presence: 0 is none.
    frequency: 0 is none.
    logprobs: Whether log-probabilities are asked for.
    bias_ids: Tokens whose logits are moved; V or more is none.
    bias: By how much.
    allowed: One bit for each token that may come, the lowest first; 0 rows
      are all.
  """

  seed: UInt[Array, " R"]
  position: Int[Array, " R"]
  temperature: Float[Array, " R"]
  top_k: Int[Array, " R"]
  top_p: Float[Array, " R"]
  min_p: Float[Array, " R"]
  repetition: Float[Array, " R"]
  presence: Float[Array, " R"]
  frequency: Float[Array, " R"]
  logprobs: Bool[Array, " R"]
  bias_ids: Int[Array, "R N"]
  bias: Float[Array, "R N"]
  allowed: UInt[Array, "R w"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """What came out for each row.

  Attributes:
    tokens: The new token.
    logprobs: Of the new token, by the model alone; 0 if nobody asked.
    top_tokens: The likeliest ones.
    top_logprobs: Theirs.
  """

  tokens: Int[Array, " R"]
  logprobs: Float[Array, " R"]
  top_tokens: Int[Array, "R n"]
  top_logprobs: Float[Array, "R n"]


def draw(
  logits: Float[Array, "R V"] | Float[Array, "V R"],
  rules: Rules,
  counts: Int[Array, "S V"],
  slots: Int[Array, " R"],
  *,
  turned: bool = False,
) -> Drawn:
  """Draws a token for every row.

  Args:
    logits: Of the model, in fp32.
    rules: Of each row.
    counts: How often each token came in each slot, `PROMPT` added if it is in
      the prompt; read only where a row asks for a penalty.
    slots: Of the rows.
    turned: Whether the logits are `[V,R]`.
  """
  axis = 0 if turned else 1
  V = logits.shape[axis]
  asked = (rules.temperature > 0) | rules.logprobs | _penalised(rules)
  asked |= jnp.any(rules.bias_ids < V, axis=1)
  asked |= jnp.any(rules.allowed != _ALL, axis=1)
  likely = min(MAX_LOGPROBS, V)

  def plain() -> Drawn:
    # Of the logits as they came: nothing is copied.
    return _without_report(_likeliest(logits, axis), likely, logits.dtype)

  def ruled() -> Drawn:
    rows = logits.T if turned else logits
    return _ruled(rows, rules, counts, slots, likely)

  drawn: Drawn = lax.cond(jnp.any(asked), ruled, plain)
  return drawn


def _ruled(
  logits: Float[Array, "R V"],
  rules: Rules,
  counts: Int[Array, "S V"],
  slots: Int[Array, " R"],
  likely: int,
) -> Drawn:
  moved = _moved(logits, rules, counts, slots)
  tokens = lax.cond(
    jnp.any(rules.temperature > 0),
    lambda: jnp.where(
      rules.temperature > 0, _random(moved, rules), _likeliest(moved, 1)
    ),
    lambda: _likeliest(moved, 1),
  )

  def reported() -> Drawn:
    # Normalised first: differences of large numbers would be rounded.
    log_p = jax.nn.log_softmax(logits)
    top, ids = lax.top_k(log_p, likely)
    own = jnp.take_along_axis(log_p, tokens[:, None], 1)[:, 0]
    return Drawn(tokens, own, ids.astype(jnp.int32), top)

  def silent() -> Drawn:
    return _without_report(tokens, likely, logits.dtype)

  drawn: Drawn = lax.cond(jnp.any(rules.logprobs), reported, silent)
  return drawn


def _without_report(
  tokens: Int[Array, " R"], likely: int, dtype: DTypeLike
) -> Drawn:
  shape = (len(tokens), likely)
  zeros = jnp.zeros(shape, dtype)
  return Drawn(tokens, zeros[:, 0], jnp.zeros(shape, jnp.int32), zeros)


def _likeliest(logits: Array, axis: int) -> Int[Array, " R"]:
  """The first of the largest: two plain reductions, quicker than argmax."""
  largest = jnp.max(logits, axis=axis, keepdims=True)
  V = logits.shape[axis]
  place = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
  found = jnp.min(jnp.where(logits == largest, place, V), axis=axis)
  # Of logits that are not numbers, none is the largest.
  return jnp.minimum(found, V - 1)


def _penalised(rules: Rules) -> Bool[Array, " R"]:
  asked = (rules.repetition != 1) | (rules.presence != 0)
  return asked | (rules.frequency != 0)


def _moved(
  logits: Float[Array, "R V"],
  rules: Rules,
  counts: Int[Array, "S V"],
  slots: Int[Array, " R"],
) -> Float[Array, "R V"]:
  """Logits with biases, penalties, and without what may not come."""
  V = logits.shape[1]

  def biased(logits: Array) -> Array:
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, rules.bias_ids].add(rules.bias, mode="drop")

  logits = lax.cond(
    jnp.any(rules.bias_ids < V), biased, lambda logits: logits, logits
  )

  def penalised(logits: Array) -> Array:
    own = counts.at[slots].get(mode="clip")
    since = (own & (PROMPT - 1)).astype(logits.dtype)
    factor = jnp.where(own > 0, rules.repetition[:, None], 1)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits -= rules.presence[:, None] * (since > 0)
    return logits - rules.frequency[:, None] * since

  logits = lax.cond(
    jnp.any(_penalised(rules)), penalised, lambda logits: logits, logits
  )

  def kept(logits: Array) -> Array:
    places = jnp.arange(32, dtype=jnp.uint32)[None, None]
    bits = rules.allowed[:, :, None] >> places
    bits = (bits & 1).reshape(len(logits), -1)[:, :V] > 0
    return jnp.where(bits, logits, -jnp.inf)

  return lax.cond(
    jnp.any(rules.allowed != _ALL), kept, lambda logits: logits, logits
  )


def _random(logits: Float[Array, "R V"], rules: Rules) -> Int[Array, " R"]:
  logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
  # The largest becomes 0, so that no temperature makes it infinite.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  smallest = float(jnp.finfo(logits.dtype).tiny)
  logits = logits / jnp.maximum(rules.temperature, smallest)[:, None]
  logits = lax.cond(
    jnp.any(rules.top_k > 0), _keep_top_k, lambda x, _: x, logits, rules.top_k
  )
  logits = lax.cond(
    jnp.any(rules.top_p < 1), _keep_top_p, lambda x, _: x, logits, rules.top_p
  )
  least = jnp.log(rules.min_p)[:, None]
  probs = jnp.where(logits >= least, jnp.exp(logits), 0)
  keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(
    rules.seed, rules.position
  )
  number = jax.vmap(lambda key: jax.random.uniform(key, (), logits.dtype))(keys)
  return pick(probs, number)


def pick(
  weights: Float[Array, "R V"], number: Float[Array, " R"]
) -> Int[Array, " R"]:
  """The token at which the running sum passes `number` times the whole.

  Args:
    weights: Not negative, and one at least positive.
    number: In [0, 1).
  """
  R, V = weights.shape
  blocks = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK)))
  blocks = blocks.reshape(R, -1, _BLOCK)
  sums = blocks.sum(-1)
  upto = jnp.cumsum(sums, axis=1)
  goal = number[:, None] * upto[:, -1:]
  block = _first(upto > goal, sums > 0)
  within = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
  own = jnp.take_along_axis(sums, block[:, None], 1)
  before = jnp.take_along_axis(upto, block[:, None], 1) - own
  inside = before + jnp.cumsum(within, axis=1)
  place = _first(inside > goal, within > 0)
  # Of weights that are all zero or no numbers, none is the right one.
  return jnp.minimum(block * _BLOCK + place, V - 1).astype(jnp.int32)


def _first(
  past: Bool[Array, "R n"], there: Bool[Array, "R n"]
) -> Int[Array, " R"]:
  """The first that is past and there; where rounding leaves none, the last."""
  wanted = past & there
  last = there.shape[1] - 1 - jnp.argmax(there[:, ::-1], axis=1)
  return jnp.where(wanted.any(1), jnp.argmax(wanted, axis=1), last)


def _keep_top_k(
  logits: Float[Array, "R V"], k: Int[Array, " R"]
) -> Float[Array, "R V"]:
  """The k largest logits and those equal to the last; k = 0 is all."""
  ones = jnp.ones_like(logits)
  least = _threshold(logits, ones, k.astype(logits.dtype))
  keep = (_ordered(logits) >= least[:, None]) | (k == 0)[:, None]
  return jnp.where(keep, logits, -jnp.inf)


def _keep_top_p(
  logits: Float[Array, "R V"], p: Float[Array, " R"]
) -> Float[Array, "R V"]:
  """The largest logits that reach p together, and those equal to the last."""
  probs = jax.nn.softmax(logits)
  # The likeliest token stays, however little is asked for.
  p = jnp.maximum(p, jnp.finfo(p.dtype).tiny)
  least = _threshold(logits, probs, p)
  keep = (_ordered(logits) >= least[:, None]) | (p >= 1)[:, None]
  return jnp.where(keep, logits, -jnp.inf)


def _ordered(x: Float[Array, "R V"]) -> UInt[Array, "R V"]:
  """Integers in the order of the floats."""
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  return jnp.where(bits >> 31 > 0, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(
  logits: Float[Array, "R V"],
  weights: Float[Array, "R V"],
  goal: Float[Array, " R"],
) -> UInt[Array, " R"]:
  """The largest value such that weights of logits from it on reach the goal.

  As `_ordered` counts. 0 where all together do not reach it.
  """
  ordered = _ordered(logits)

  def decide(n: Any, found: Array) -> Array:
    higher = found | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
    above = jnp.where(ordered >= higher[:, None], weights, 0)
    return jnp.where(above.sum(-1) >= goal, higher, found)

  start = jnp.zeros(len(logits), jnp.uint32)
  return lax.fori_loop(0, 32, decide, start)
