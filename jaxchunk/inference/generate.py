"""Prefill by chunks, then decode token by token from the same cache.

Both are `Stage.forward`, the forward pass of training: a prompt runs in
chunks of C tokens, and a new token is a chunk of one. The cache is the
stage's sequence state. Its capacity is a power of two of chunks and the
prompt's length is a value inside the program, so a program is compiled for
each capacity and not for each prompt.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxchunk.chunking.chunk import Chunk, Lane, chunk_of
from jaxchunk.chunking.executor import data_sharding
from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.ops import Stage, States, state_of
from jaxchunk.chunking.trainable import Trainable
from jaxchunk.inference.sampling import Sampler, sample
from jaxchunk.kernels.state import ChunkPlace
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer

GREEDY = Sampler(temperature=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of the tokens so far, of every layer.

  `decode_step` takes its buffers over: use only the newest cache.

  Attributes:
    states: For each position of the window pattern, keys and values
      `[L',B,K,S,H]` of its L' layers in the compute dtype. S is the capacity;
      what lies behind `length` has no meaning.
    length: Tokens in the cache, int32.
  """

  states: States
  length: Int[Array, ""]


def cache_capacity(
  prompt_tokens: int, max_new_tokens: int, chunk_size: int
) -> int:
  """Tokens that a cache is made for: a power of two of chunks.

  Args:
    prompt_tokens: Length of the prompt.
    max_new_tokens: How many may follow.
    chunk_size: C.

  Returns:
    The least `C * 2**n` that holds both.

  Raises:
    ValueError: A number is not a positive integer.
  """
  for name, value in (
    ("prompt_tokens", prompt_tokens),
    ("max_new_tokens", max_new_tokens),
    ("chunk_size", chunk_size),
  ):
    if not isinstance(value, int | np.integer) or value < 1:
      raise ValueError(f"{name}={value!r} must be a positive integer")
  chunks = -(-(prompt_tokens + max_new_tokens) // chunk_size)
  return capacity_chunks(int(chunks)) * int(chunk_size)


def prefill(
  model: Transformer,
  tokens: Int[np.ndarray, "B T"] | Int[Array, "B T"],
  *,
  capacity: int,
  chunk_size: int,
) -> tuple[Cache, Float[Array, "B V"]]:
  """Runs prompts of one length by chunks into a new cache.

  Equivalent to `model(tokens)[:, -1]`, with activations of one chunk.

  Args:
    model: The model.
    tokens: Prompts, T >= 1. The last chunk may be ragged.
    capacity: S, tokens that the cache has room for, a multiple of the chunk
      size. Memory: `2 * S * K * H` elements a layer and row.
    chunk_size: C. One program is compiled for each B, S and C.

  Returns:
    The cache and the logits behind the last token, in at least fp32.
    Nothing waits for the device.

  Raises:
    ValueError: The prompt is empty, longer than the capacity, or not token
      ids of the model; or the sizes do not fit.
  """
  tokens = check_tokens(model.cfg, tokens)
  if chunk_size < 1 or capacity < chunk_size or capacity % chunk_size:
    raise ValueError(
      f"capacity={capacity} must be a positive multiple of chunk_size="
      f"{chunk_size}; see cache_capacity"
    )
  length = tokens.shape[1]
  if length > capacity:
    raise ValueError(
      f"tokens has T={length} tokens, more than capacity={capacity}"
    )
  padded = np.pad(tokens, ((0, 0), (0, capacity - length)))
  on_device = jax.device_put(
    (padded, np.asarray(length, np.int32)), data_sharding(model)
  )
  return _prefill_program(model, *on_device, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames=("chunk_size",))
def _prefill_program(
  model: Transformer,
  tokens: Int[Array, "B S"],
  length: Int[Array, ""],
  *,
  chunk_size: int,
) -> tuple[Cache, Float[Array, "B V"]]:
  stage = inference_stage(model.cfg, chunk_size)
  batch, capacity = tokens.shape
  row = jnp.arange(capacity, dtype=jnp.int32)[None]
  positions = jnp.broadcast_to(row, tokens.shape)
  nothing = jnp.zeros_like(positions)
  lane = Lane(
    tokens=tokens,
    targets=nothing,
    weights=nothing.astype(jnp.float32),
    segment_ids=(positions < length).astype(jnp.int32),
    positions=positions,
    document_ids=nothing,
  )

  def body(i: Any, carry: Any) -> Any:
    _, states = carry
    # Nothing runs twice, so no state is saved.
    x, states, _ = stage.forward(
      model, chunk_of(model, lane, i, chunk_size), states
    )
    return x, states

  shape = (batch, chunk_size, model.cfg.d_model)
  start = (
    jnp.zeros(shape, model.cfg.dtype),
    stage.init_states(model, batch, capacity),
  )
  num_chunks = (length + chunk_size - 1) // chunk_size
  x, states = lax.fori_loop(0, num_chunks, body, start)
  last = lax.dynamic_slice_in_dim(x, (length - 1) % chunk_size, 1, 1)
  return Cache(states, length), _logits(model, last)


@functools.partial(jax.jit, donate_argnames=("cache",))
def decode_step(
  model: Transformer, cache: Cache, token: Int[Array, " B"]
) -> tuple[Cache, Float[Array, "B V"]]:
  """Adds a token to each row and gives the logits of the next.

  A chunk of one token. The work follows the length of the cache (window
  layers: the window), not its capacity.

  Args:
    model: The model.
    cache: From `prefill` or the step before; donated and updated in place.
    token: Token ids; not checked, since they are on the device.

  Returns:
    The cache, one longer, and logits in at least fp32. They are NaN if the
    cache was full already.
  """
  stage = inference_stage(model.cfg, 1)
  capacity = cache.states[0][0].shape[3]
  tokens = token.astype(jnp.int32)[:, None]
  one = jnp.ones_like(tokens)
  positions = jnp.broadcast_to(cache.length, tokens.shape)
  place = ChunkPlace(
    index=cache.length,
    start=cache.length,
    segment_ids=one,
    # The causal mask hides what is behind the token.
    lane_segment_ids=jnp.ones((tokens.shape[0], capacity), jnp.int32),
  )
  chunk = Chunk(
    tokens=tokens,
    targets=jnp.zeros_like(tokens),
    weights=jnp.zeros(tokens.shape, jnp.float32),
    place=place,
    ropes=model.rope_tables(positions),
    dropout=None,
  )
  x, states, _ = stage.forward(model, chunk, cache.states)
  logits = _logits(model, x)
  logits = jnp.where(cache.length < capacity, logits, jnp.nan)
  return Cache(states, cache.length + 1), logits


def inference_stage(cfg: ModelConfig, chunk_size: int) -> Stage:
  """The stage of all layers, of which nothing is trained."""
  states = tuple(
    state_of(cfg, window, chunk_size) for window in cfg.window_pattern
  )
  return Stage(chunk_size, states, Trainable((), ()))


def _logits(
  model: Transformer, x: Float[Array, "B 1 D"]
) -> Float[Array, "B V"]:
  return model.logits(model.final_norm(x))[:, 0]


def generate(
  model: Transformer,
  prompt_ids: Sequence[int] | Int[np.ndarray, " T"],
  *,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  chunk_size: int = 512,
  seed: int = 0,
  eos_id: int | None = None,
) -> Iterator[int]:
  """Continues a prompt, token by token.

  The device works one token ahead of the caller. A token depends on the
  seed and on its place, so the chunk size changes nothing but rounding.

  Args:
    model: The model.
    prompt_ids: At least one token; BOS alone is a prompt.
    max_new_tokens: How many tokens at most.
    sampler: How they are chosen; by default the likeliest.
    chunk_size: C, prompt tokens that run at a time.
    seed: Of the sampler.
    eos_id: Ends the text; it is not given back itself. `None` for no end.

  Returns:
    An iterator over token ids. Arguments are checked before it is made.

  Raises:
    ValueError: An argument is out of range; names it and the remedy.
  """
  tokens = check_tokens(model.cfg, np.asarray(prompt_ids)[None])
  capacity = cache_capacity(tokens.shape[1], max_new_tokens, chunk_size)
  key = make_key(model, seed)

  def stream() -> Iterator[int]:
    cache, logits = prefill(
      model, tokens, capacity=capacity, chunk_size=chunk_size
    )
    yield from decode(
      model,
      cache,
      logits,
      max_new_tokens=max_new_tokens,
      sampler=sampler,
      key=key,
      eos_id=eos_id,
    )

  return stream()


def decode(
  model: Transformer,
  cache: Cache,
  logits: Float[Array, "1 V"],
  *,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  key: PRNGKeyArray | None = None,
  eos_id: int | None = None,
) -> Iterator[int]:
  """What `generate` does after prefill.

  Args:
    model: The model.
    cache: Of one prompt, with room for the new tokens; it is used up.
    logits: Behind the prompt's last token.
    max_new_tokens: How many tokens at most.
    sampler: How they are chosen; by default the likeliest.
    key: Of the sampler; `None` is that of seed 0.
    eos_id: Ends the text; it is not given back itself. `None` for no end.

  Yields:
    Token ids.
  """
  key = make_key(model, 0) if key is None else key
  token = _next_token(logits, key, cache.length, sampler=sampler)
  for number in range(max_new_tokens):
    ready = token
    if number + 1 < max_new_tokens:
      # Under way before the host waits for the token that it starts from.
      cache, logits = decode_step(model, cache, ready)
      token = _next_token(logits, key, cache.length, sampler=sampler)
    value = int(jax.device_get(ready)[0])
    if value == eos_id:
      return
    yield value


@functools.partial(jax.jit, static_argnames=("sampler",))
def _next_token(
  logits: Float[Array, "B V"],
  key: PRNGKeyArray,
  position: Int[Array, ""],
  *,
  sampler: Sampler,
) -> Int[Array, " B"]:
  return sample(logits, jax.random.fold_in(key, position), sampler=sampler)


def make_key(model: Transformer, seed: int) -> PRNGKeyArray:
  """A sampler's key, where the model is.

  Raises:
    ValueError: The seed is out of range.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed} must be at least 0 and below 2**32")
  return jax.device_put(jax.random.key(seed), data_sharding(model))


def check_tokens(
  cfg: ModelConfig, tokens: Int[np.ndarray, "B T"] | Int[Array, "B T"]
) -> Int[np.ndarray, "B T"]:
  """Token ids on the host, int32.

  Raises:
    ValueError: They are not token ids of the model, or there is none.
  """
  ids = np.asarray(jax.device_get(tokens))
  if ids.ndim != 2:
    raise ValueError(f"tokens must be [B,T], got shape {ids.shape}")
  if not ids.size:
    raise ValueError(
      "the prompt is empty; give it at least one token: the tokenizer's BOS "
      "alone, if it has one, is a prompt"
    )
  if not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"tokens must be integers, got {ids.dtype}")
  wrong = ids[(ids < 0) | (ids >= cfg.vocab_size)]
  if wrong.size:
    raise ValueError(
      f"token {wrong[0]} is not below vocab_size={cfg.vocab_size}; was the "
      "prompt encoded with another tokenizer?"
    )
  return ids.astype(np.int32)
