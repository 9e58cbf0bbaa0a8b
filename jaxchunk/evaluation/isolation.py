"""Proof that packed documents do not see each other, bit by bit.

A packing is run twice; in between everything that belongs to one document of
each row is replaced. Whatever belongs to the others must come out with the
same bits: outputs and gradients of attention (`attention_leaks`), token losses
and parameter gradients of a model (`model_leaks`).

Only a zero's sign may differ: a changed document whose loss has no weight adds
zeros to gradients, and a product of zero has the sign of its other factor.
What is replaced stays finite. Attention multiplies a hidden value by a weight
of exactly 0, which hides any number but not an infinity or a NaN; `scale`
makes the numbers as large as one likes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxchunk.chunking.executor import Options, accumulate, token_nll
from jaxchunk.kernels.attention.api import attention, grouped, ungrouped
from jaxchunk.kernels.attention.backends import passes
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.models.transformer import Transformer
from jaxchunk.types import Batch

# Queries and keys of a block of the random block tables.
TABLE_BLOCK = 64


class Inputs(NamedTuple):
  """What attention takes, and the cotangents of its two results."""

  q: Any
  k: Any
  v: Any
  do: Any
  dlse: Any


class Outputs(NamedTuple):
  """What attention gives, and its gradients."""

  o: Any
  lse: Any
  dq: Any
  dk: Any
  dv: Any


Operation = Callable[[Inputs, AttentionMask], Outputs]
# From segment ids of keys `[B,S]` and a generator, to the segment ids of the
# queries `[B,T]` and the mask.
MaskOf = Callable[
  [np.ndarray, np.random.Generator], tuple[np.ndarray, AttentionMask]
]
# From a batch, to the nll `[B,T]` and the gradient of the weighted sum.
Way = Callable[[Batch], tuple[np.ndarray, list[np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Leak:
  """A document changed, and something of another one changed with it.

  Attributes:
    packing: Number of the packing.
    what: Which result: "o", "lse", "dq", "dk", "dv", "nll" or "gradient".
    changed: Row and segment of the document that was changed.
    harmed: Row and segment of the other; `None` for a gradient of parameters,
      to which all the others contribute.
  """

  packing: int
  what: str
  changed: tuple[int, int]
  harmed: tuple[int, int] | None

  def __str__(self) -> str:
    if self.harmed is None:
      harmed = "the parameter gradient of the other documents"
    else:
      harmed = "{} of row {}, document {}".format(self.what, *self.harmed)
    row, document = self.changed
    return (
      f"packing {self.packing}: changing row {row}, document {document} "
      f"changed {harmed}"
    )


def random_segments(
  rng: np.random.Generator, rows: int, length: int, most: int = 6
) -> Int[np.ndarray, "B S"]:
  """Rows of 2 to `most` documents of random lengths, some with padding."""
  ids = np.zeros((rows, length), np.int32)
  for row in ids:
    count = int(rng.integers(2, most + 1))
    end = length - int(rng.integers(0, length // 4)) * int(rng.integers(0, 2))
    cuts = np.sort(rng.choice(np.arange(1, end), count - 1, replace=False))
    row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
  return ids


def _with_segments(ids: np.ndarray, mask: AttentionMask) -> Any:
  return ids, mask & AttentionMask.segments(jnp.asarray(ids))


def _prefix(ids: np.ndarray, rng: np.random.Generator) -> Any:
  """The queries are the second half of the keys."""
  del rng
  half = ids.shape[1] // 2
  pair = (jnp.asarray(ids[:, half:]), jnp.asarray(ids))
  mask = AttentionMask.causal(half) & AttentionMask.segments(*pair)
  return ids[:, half:], mask


def _table(ids: np.ndarray, rng: np.random.Generator) -> Any:
  """Two random blocks of keys for each block of queries; one key head."""
  blocks = ids.shape[1] // TABLE_BLOCK
  table = rng.integers(-1, blocks, (len(ids), 1, blocks, 2))
  size = TABLE_BLOCK
  chosen = AttentionMask.blocks(jnp.asarray(table), q_block=size, kv_block=size)
  return _with_segments(ids, AttentionMask.causal() & chosen)


MASKS: dict[str, MaskOf] = {
  "causal": lambda ids, _: _with_segments(ids, AttentionMask.causal()),
  "both ways": lambda ids, _: _with_segments(ids, AttentionMask()),
  "window": lambda ids, _: _with_segments(
    ids, AttentionMask.causal() & AttentionMask.window(9)
  ),
  "sinks": lambda ids, _: _with_segments(
    ids, AttentionMask.causal() & AttentionMask.window(9, sinks=3)
  ),
  "prefix": _prefix,
  "table": _table,
}


@functools.partial(jax.jit, static_argnames="name")
def _differentiated(
  inputs: Inputs, mask: AttentionMask, *, name: Any
) -> Outputs:
  def run(q: Array, k: Array, v: Array) -> Any:
    return attention(q, k, v, mask=mask, implementation=name, return_lse=True)

  (o, lse), vjp = jax.vjp(run, inputs.q, inputs.k, inputs.v)
  return Outputs(o, lse, *vjp((inputs.do, inputs.dlse.astype(lse.dtype))))


@functools.partial(jax.jit, static_argnames=("name", "interpret"))
def _interpreted(
  inputs: Inputs, mask: AttentionMask, *, name: str, interpret: Any
) -> Outputs:
  K = inputs.k.shape[2]
  q, do = (grouped(a, K) for a in (inputs.q, inputs.do))
  dlse = grouped(inputs.dlse[..., None], K)[..., 0].astype(jnp.float32)
  k, v = (a.transpose(0, 2, 1, 3)[None] for a in (inputs.k, inputs.v))
  options = {"scale": q.shape[-1] ** -0.5, "interpret": interpret}
  run = passes(name)
  o, lse = run.forward(q, k, v, mask, **options)
  zero = jnp.zeros(k.shape, jnp.float32)
  dq, dk, dv = run.backward(
    q, k, v, mask, o, lse, do, zero, zero, dlse=dlse, **options
  )
  dk, dv = (g[0].transpose(0, 2, 1, 3) for g in (dk, dv))
  lse = ungrouped(lse[..., None])[..., 0]
  return Outputs(ungrouped(o), lse, ungrouped(dq), dk, dv)


def operation(name: str, interpret: Any = None) -> Operation:
  """Attention by name, forward and backward in one program.

  Args:
    name: An implementation of `jaxchunk.attention`.
    interpret: How to interpret a Pallas kernel where its device is not there;
      `None` runs it.

  Returns:
    The operation.
  """
  if interpret is None:
    return functools.partial(_differentiated, name=name)
  return functools.partial(_interpreted, name=name, interpret=interpret)


def _replaced(
  inputs: Inputs, seed: int, scale: float, q_own: Array, k_own: Array
) -> Inputs:
  """All inputs where `q_own` and `k_own` hold, drawn anew."""
  rng = np.random.default_rng(seed)
  owns = (q_own, k_own, k_own, q_own, q_own)
  new = []
  for a, own in zip(inputs, owns, strict=True):
    other = jnp.asarray(scale * rng.standard_normal(a.shape), a.dtype)
    own = own.reshape(*own.shape, *[1] * (a.ndim - 2))
    new.append(jnp.where(own, other, a))
  return Inputs(*new)


def different(a: Any, b: Any) -> np.ndarray:
  """Where two arrays differ in bits; zeros are one, and NaN is itself."""
  a, b = (np.ascontiguousarray(x) for x in (a, b))
  bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
  both_zero = (a == 0) & (b == 0)
  return np.asarray((a.view(bits) != b.view(bits)) & ~both_zero)


def attention_leaks(
  run: Operation,
  mask_of: MaskOf,
  *,
  packings: int,
  seed: int = 0,
  rows: int = 8,
  length: int = 128,
  heads: tuple[int, int] = (2, 1),
  width: int = 64,
  dtype: str = "float32",
  scale: float = 1e3,
) -> list[Leak]:
  """Changes one document of each row in what attention reads.

  Queries, keys, values and both cotangents of the document are replaced. A
  row is one packing; rows of a call also must not see each other.

  Args:
    run: The operation.
    mask_of: From `MASKS`.
    packings: How many packings.
    seed: Of lengths and numbers.
    rows: Packings in a call, B.
    length: Keys of a packing, S.
    heads: N and K; a table needs K = 1.
    width: H.
    dtype: Of the inputs.
    scale: Standard deviation of what replaces the document.

  Returns:
    The leaks; at most one for each result, changed and harmed document.
  """
  leaks: list[Leak] = []
  for first in range(0, packings, rows):
    rng = np.random.default_rng((seed, first))
    kv = random_segments(rng, rows, length)
    q, mask = mask_of(kv, rng)
    N, K = heads
    q_shape, k_shape = (*q.shape, N, width), (*kv.shape, K, width)
    shapes = (q_shape, k_shape, k_shape, q_shape, q_shape[:3])
    inputs = Inputs(
      *(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    )
    changed = np.asarray([rng.integers(1, ids.max() + 1) for ids in kv])
    owns = [jnp.asarray(ids == changed[:, None]) for ids in (q, kv)]
    before = run(inputs, mask)
    after = run(_replaced(inputs, first, scale, *owns), mask)
    count = min(rows, packings - first)
    for name, a, b in zip(Outputs._fields, before, after, strict=True):
      ids = (kv if name in ("dk", "dv") else q)[:count]
      numbers = different(a, b)[:count]
      moved = numbers.reshape(*numbers.shape[:2], -1).any(2)
      leaks += _row_leaks(first, name, ids, changed, moved)
  return leaks


def _row_leaks(
  first: int, what: str, ids: np.ndarray, changed: np.ndarray, moved: Any
) -> Iterator[Leak]:
  """Leaks of a result by token, `moved[B,T]`."""
  for row, (mine, here) in enumerate(zip(ids, moved, strict=True)):
    for harmed in np.unique(mine[here & (mine != changed[row]) & (mine > 0)]):
      own = (row, int(changed[row]))
      yield Leak(first + row, what, own, (row, int(harmed)))


def by_chunks(model: Transformer, options: Options, rng: Any = None) -> Way:
  """Losses and gradients as training computes them."""

  def run(batch: Batch) -> tuple[np.ndarray, list[np.ndarray]]:
    examples = batch.examples()
    parts = token_nll(model, examples, chunk_size=options.chunk_size)
    nll = np.zeros(batch.tokens.shape, parts[0].dtype)
    nll[batch.segment_ids > 0] = np.concatenate(parts)
    sums = accumulate(model, examples, options, rng=rng)
    return nll, [np.asarray(g) for g in jax.tree.leaves(sums.grads)]

  return run


@functools.partial(jax.jit, static_argnames="implementation")
def _whole_rows(
  model: Transformer, arrays: Mapping[str, Array], *, implementation: str
) -> Any:
  def loss(model: Transformer) -> tuple[Array, Array]:
    h = model.hidden(
      arrays["tokens"],
      segment_ids=arrays["segment_ids"],
      positions=arrays["positions"],
      implementation=implementation,
    )
    log_p = jax.nn.log_softmax(model.logits(h).astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, arrays["targets"][..., None], -1)[..., 0]
    return jnp.sum(nll * arrays["weights"]), nll

  (_, nll), grads = jax.value_and_grad(loss, has_aux=True)(model)
  return nll, grads


def in_whole_rows(model: Transformer, implementation: str) -> Way:
  """The plain model on packed rows, by ordinary autodiff."""

  def run(batch: Batch) -> tuple[np.ndarray, list[np.ndarray]]:
    nll, grads = _whole_rows(
      model, dataclasses.asdict(batch), implementation=implementation
    )
    return np.asarray(nll), [np.asarray(g) for g in jax.tree.leaves(grads)]

  return run


def model_leaks(
  run: Way, *, vocab_size: int, packings: int, length: int, seed: int = 0
) -> list[Leak]:
  """Changes the tokens and targets of one document of a packed row.

  The changed document has no weight, so that neither the others' losses nor
  the gradient of all parameters may change.

  Args:
    run: From `by_chunks` or `in_whole_rows`.
    vocab_size: V.
    packings: How many rows, one at a time.
    length: Tokens of a row.
    seed: Of lengths and tokens.

  Returns:
    The leaks.
  """
  leaks = []
  for packing in range(packings):
    rng = np.random.default_rng((seed, packing))
    ids = random_segments(rng, 1, length)
    changed = int(rng.integers(1, ids.max() + 1))
    own = ids == changed
    shape = (2, 2, 1, length)
    old, new = rng.integers(0, vocab_size, shape).astype(np.int32)
    weights = np.where(own | (ids == 0), 0, 0.5 + rng.random(ids.shape))
    results = []
    for tokens, targets in (old, np.where(own, new, old)):
      fields = {"tokens": tokens, "targets": targets, "segment_ids": ids}
      results.append(run(Batch.of(fields | {"weights": weights})))
    (nll, grads), (nll_after, grads_after) = results
    moved = different(nll, nll_after)
    found = _row_leaks(0, "nll", ids, np.asarray([changed]), moved)
    leaks += [dataclasses.replace(leak, packing=packing) for leak in found]
    pairs = zip(grads, grads_after, strict=True)
    if any(different(a, b).any() for a, b in pairs):
      leaks.append(Leak(packing, "gradient", (0, changed), None))
  return leaks
