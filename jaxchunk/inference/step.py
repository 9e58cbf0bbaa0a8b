"""One step on the device: tokens of many sequences, then draws.

The tokens of a step lie side by side in one row; everything but attention
does not know whose they are. A program is compiled for each of a few numbers
of tokens T, and for nothing else: which sequences run, how many draw and by
which rules are values.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.chunking.shards import take_rows
from jaxchunk.inference.draw import Drawn, Rules, draw
from jaxchunk.inference.packing import Packing
from jaxchunk.kernels.paged_attention.pages import KVPages
from jaxchunk.kernels.vma import vary_like
from jaxchunk.kv.paged import PagedKV, PagedState, Rows, StepPlace
from jaxchunk.models.adapter_set import (
  AdapterSet,
  Factors,
  SelectedAdapters,
  chosen,
)
from jaxchunk.models.tape import Tape
from jaxchunk.models.transformer import (
  Block,
  RopeTables,
  Transformer,
  layer_of,
)
from jaxchunk.models.turned import turned_logits

# Beyond every token and slot.
_NONE = 2**30
_FLOATS = (
  "temperature",
  "top_p",
  "min_p",
  "repetition",
  "presence",
  "frequency",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
  """Sizes of a step's arrays.

  Attributes:
    tokens: T.
    max_sequences: The most that run at a time.
    prompts: Of which several tokens may run.
    query_block: Q, tokens of one sequence that read together.
    table: M, pages that a sequence may have.
    heads: Tables of each sequence: 1 for all key heads alike, or K.
  """

  tokens: int
  max_sequences: int
  prompts: int
  query_block: int
  table: int
  heads: int = 1

  @property
  def sequences(self) -> int:
    """W, the most that this step runs."""
    return min(self.tokens, self.max_sequences)

  @property
  def queries(self) -> int:
    """Q, here."""
    return min(self.query_block, self.tokens)

  @property
  def rows(self) -> int:
    """R, rows of several queries."""
    if self.tokens == 1:
      return 0
    # The last row of each may be ragged, and none has one token only.
    ragged = min(self.prompts, self.tokens // 2)
    return self.tokens // self.queries + ragged

  @functools.cached_property
  def packing(self) -> Packing:
    """How the numbers reach the device."""
    T, W, R, Q = self.tokens, self.sequences, self.rows, self.queries
    fields: dict[str, tuple[tuple[int, ...], str]] = {
      # A negative one is the token drawn last for slot -1 - token.
      "tokens": ((T,), "int32"),
      "positions": ((T,), "int32"),
      "slots": ((T,), "int32"),
      "adapters": ((T,), "int32"),
      "tables": ((W, self.heads, self.table), "int32"),
      "lengths": ((W, self.heads), "int32"),
      "single_index": ((W, 1), "int32"),
      "single_positions": ((W, 1), "int32"),
      "single_owner": ((W,), "int32"),
      "several_index": ((R, Q), "int32"),
      "several_positions": ((R, Q), "int32"),
      "several_owner": ((R,), "int32"),
      # Rows of one query, rows of several, and draws.
      "numbers": ((3,), "int32"),
      # The token behind which each draw is, and the slot it goes to.
      "draw_index": ((W,), "int32"),
      "draw_slot": ((W,), "int32"),
      "seed": ((W,), "uint32"),
      "position": ((W,), "int32"),
      "top_k": ((W,), "int32"),
      "logprobs": ((W,), "int32"),
      **{name: ((W,), "float32") for name in _FLOATS},
    }
    return Packing(fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
  """What few requests ask for, of each draw; see `Rules`."""

  bias_ids: Int[Array, "W N"]
  bias: Float[Array, "W N"]
  allowed: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What stays on the device between steps.

  Attributes:
    pages: Keys and values.
    tokens: The last token drawn for each slot, `[S]`.
    counts: How often each token came in each slot, `[S,V]`; see `draw.PROMPT`.
  """

  pages: PagedKV
  tokens: Int[Array, " S"]
  counts: Int[Array, "S V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """A step's tokens on their way through the layers.

  Attributes:
    x: What goes from layer to layer, `[1,T,D]`.
    positions: `[T]`, -1 for padding.
    adapters: Number of each token's adapter, `[T]`.
    place: Where they lie.
    ropes: For their positions.
  """

  x: Float[Array, "1 T D"]
  positions: Int[Array, " T"]
  adapters: Int[Array, " T"]
  place: StepPlace
  ropes: RopeTables


def run_step(
  model: Transformer,
  adapters: AdapterSet | None,
  state: State,
  packed: Int[Array, " n"],
  extras: Extras,
  *,
  shape: StepShape,
  states: tuple[PagedState, ...],
  vocab: tuple[str, ...] = (),
) -> tuple[State, Drawn]:
  """Runs a step; inside a `jax.shard_map` this device's part of the heads.

  Args:
    model: The model.
    adapters: That requests may name; `None` is none.
    state: Is taken over.
    packed: As `shape.packing` has it.
    extras: What few requests ask for.
    shape: Sizes.
    states: What layers do with pages, for each position of the pattern.
    vocab: The mesh axis that splits embedding and head, if one does.

  Returns:
    The state afterwards, and a token for each of W draws.
  """
  tokens = begin(model, state.tokens, packed, shape=shape, vocab=vocab)
  period = len(states)
  whole, rest = divmod(model.cfg.num_layers, period)

  def run(tokens: Tokens, pages: PagedKV, position: int, index: Any) -> Any:
    block = layer_of(model.blocks[position], index)
    factors = None if adapters is None else adapters.layer(position, index)
    owners = None if adapters is None else adapters.owners
    return run_layer(
      block, factors, owners, tokens, pages[position], index, states[position]
    )

  def several(tokens: Tokens, pages: PagedKV, number: int, index: Any) -> Any:
    """The first layers of a round of the window pattern."""
    for position in range(number):
      x, mine = run(tokens, pages, position, index)
      tokens = dataclasses.replace(tokens, x=x)
      pages = (*pages[:position], mine, *pages[position + 1 :])
    return tokens, pages

  def body(index: Any, carry: Any) -> Any:
    x, pages = carry
    after, pages = several(
      dataclasses.replace(tokens, x=x), pages, period, index
    )
    return after.x, pages

  x, pages = lax.fori_loop(0, whole, body, (tokens.x, state.pages))
  tokens = dataclasses.replace(tokens, x=x)
  tokens, pages = several(tokens, pages, rest, whole)
  draws = find_draws(tokens.x, packed, extras, shape=shape)
  number = shape.packing.unpack(packed)["numbers"][2]
  last, counts, drawn = _draw(
    model, draws, number, state.tokens, state.counts, vocab
  )
  return State(pages, last, counts), drawn


def begin(
  model: Transformer,
  last: Int[Array, " S"],
  packed: Int[Array, " n"],
  *,
  shape: StepShape,
  vocab: tuple[str, ...] = (),
) -> Tokens:
  """What comes before the first layer.

  Args:
    model: The model; its layers are not used.
    last: The last token drawn for each slot.
    packed: As `shape.packing` has it.
    shape: Sizes.
    vocab: As in `run_step`.
  """
  given = shape.packing.unpack(packed)
  tokens, positions = given["tokens"], given["positions"]
  drawn = last.at[-1 - tokens].get(mode="fill", fill_value=0)
  tokens = jnp.where(tokens < 0, drawn, tokens)
  return Tokens(
    model.scale_embeddings(take_rows(model.embed[...], tokens[None], vocab)),
    positions,
    given["adapters"],
    _place(given, shape),
    model.rope_tables(jnp.maximum(positions, 0)[None]),
  )


def run_layer(
  block: Block,
  factors: Factors | None,
  owners: Int[Array, " AR"] | None,
  tokens: Tokens,
  pages: KVPages,
  index: Any,
  state: PagedState,
) -> tuple[Float[Array, "1 T D"], KVPages]:
  """A layer: what the next one takes, and the pages with its keys and values.

  Args:
    block: The layer.
    factors: Of its adapters, if there are any.
    owners: Of the adapters' columns.
    tokens: Of the step.
    pages: Of its position in the window pattern.
    index: Which of these pages' layers it is; may be traced.
    state: What it does with pages.
  """
  tape = Tape()
  if factors is not None and owners is not None:
    tape = SelectedAdapters(factors, chosen(owners, tokens.adapters))
  place, positions = tokens.place, tokens.positions
  q, k, v = block.pre(tokens.x, tokens.ropes, tape)
  pages = state.write(pages, index, place, positions, k[0], v[0])
  o = state.attend(pages, index, place, q[0])
  valid = (positions >= 0)[None]
  return block.post(tokens.x, o[None], tape, None, valid), pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
  """What the draws of a step need; the first ones are in use.

  Attributes:
    x: Of the last layer, for the tokens behind which they are, `[W,D]`.
    slots: Of their sequences, `[W]`.
    rules: By which they are drawn.
  """

  x: Float[Array, "W D"]
  slots: Int[Array, " W"]
  rules: Rules


def find_draws(
  x: Float[Array, "1 T D"],
  packed: Int[Array, " n"],
  extras: Extras,
  *,
  shape: StepShape,
) -> Draws:
  """What is left of a step behind the last layer.

  Args:
    x: Of the last layer.
    packed: As `shape.packing` has it.
    extras: What few requests ask for.
    shape: Sizes.

  Returns:
    Draws for W = `shape.max_sequences`.
  """
  given = shape.packing.unpack(packed)
  short = shape.max_sequences - shape.sequences
  given = {
    name: jnp.pad(given[name], (0, short))
    for name in ("seed", "position", "top_k", "logprobs", *_FLOATS)
  } | {
    name: jnp.pad(given[name], (0, short), constant_values=_NONE)
    for name in ("draw_index", "draw_slot")
  }
  rules = Rules(
    **{name: given[name] for name in ("seed", "position", "top_k", *_FLOATS)},
    logprobs=given["logprobs"] > 0,
    bias_ids=extras.bias_ids,
    bias=extras.bias,
    allowed=extras.allowed,
  )
  x = x[0].at[given["draw_index"]].get(mode="fill", fill_value=0)
  return Draws(x, given["draw_slot"], rules)


def run_draws(
  model: Transformer,
  draws: Draws,
  last: Int[Array, " S"],
  counts: Int[Array, "S V"],
  *,
  size: int,
  turned: bool = False,
  vocab: tuple[str, ...] = (),
) -> tuple[Int[Array, " S"], Int[Array, "S V"], Drawn]:
  """The first `size` draws.

  Args:
    model: The model; its layers are not used.
    draws: Of a step.
    last: The last token drawn for each slot.
    counts: How often each token came in each slot.
    size: How many; the last of them may be of no use.
    turned: Whether the head's matrix stands on the left of its product.
    vocab: As in `run_step`.

  Returns:
    `last` and `counts` with the new tokens, and these.
  """
  few = jax.tree.map(lambda a: a[:size], draws)
  x = model.final_norm(few.x)
  if turned:
    logits = model.cap(turned_logits(x, model.unembed))
  else:
    logits = _whole_rows(model.logits(x[None])[0], vocab)
  drawn = draw(logits, few.rules, counts, few.slots, turned=turned)
  last = last.at[few.slots].set(drawn.tokens, mode="drop")
  counts = counts.at[few.slots, drawn.tokens].add(1, mode="drop")
  return last, counts, drawn


def _whole_rows(
  logits: Float[Array, "R v"], vocab: tuple[str, ...]
) -> Float[Array, "R V"]:
  """Logits of the whole vocabulary, the same on every device."""
  for axis in vocab:
    parts = lax.axis_size(axis)
    own = logits.shape[1]
    whole = jnp.zeros((len(logits), own * parts), logits.dtype)
    whole = lax.dynamic_update_slice_in_dim(
      vary_like(whole, logits), logits, lax.axis_index(axis) * own, 1
    )
    # All but one are zero: the sum is exact, and known to be the same.
    logits = lax.psum(whole, axis)
  return logits


def draw_sizes(most: int) -> tuple[int, ...]:
  """How many draws there are programs for."""
  return (*(size for size in (1, 4, 16, 64) if size < most), most)


def _place(given: dict[str, Array], shape: StepShape) -> StepPlace:
  several = None
  if shape.rows:
    several = Rows(
      given["several_index"],
      given["several_positions"],
      given["several_owner"],
      given["numbers"][1],
    )
  return StepPlace(
    slots=given["slots"],
    tables=given["tables"],
    lengths=given["lengths"],
    single=Rows(
      given["single_index"],
      given["single_positions"],
      given["single_owner"],
      given["numbers"][0],
    ),
    several=several,
  )


def _draw(
  model: Transformer,
  draws: Draws,
  number: Int[Array, ""],
  last: Int[Array, " S"],
  counts: Int[Array, "S V"],
  vocab: tuple[str, ...],
) -> tuple[Int[Array, " S"], Int[Array, "S V"], Drawn]:
  """The first `number` draws, by a branch for about so many."""
  most = len(draws.slots)
  sizes = draw_sizes(most)

  def branch(size: int, last: Array, counts: Array) -> Any:
    last, counts, drawn = run_draws(
      model, draws, last, counts, size=size, vocab=vocab
    )
    short = most - size
    padded = jax.tree.map(
      lambda a: jnp.pad(a, ((0, short), *((0, 0),) * (a.ndim - 1))), drawn
    )
    return last, counts, padded

  def nothing(last: Array, counts: Array) -> Any:
    shapes = jax.eval_shape(functools.partial(branch, 1), last, counts)[2]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return last, counts, zeros

  branches: list[Any] = [
    nothing,
    *(functools.partial(branch, size) for size in sizes),
  ]
  # The first size with room for all.
  case = jnp.sum(jnp.asarray([0, *sizes[:-1]]) < number)
  found: tuple[Array, Array, Drawn] = lax.switch(case, branches, last, counts)
  return found
