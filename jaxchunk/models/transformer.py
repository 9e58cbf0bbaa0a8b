"""The decoder family: Llama, Qwen, Gemma and the like are configurations.

Modules are containers of arrays and of a frozen configuration; a layer is
three functions, `pre` (to queries, keys and values), attention, and `post`,
so that the chunk executor can put its own sequence state in the middle.
Layers with the same place in the window pattern are stacked along a leading
axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxchunk.kernels.attention.api import grouped_attention
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.dropout import DropoutKeys, dropout
from jaxchunk.models.lora import Adapter
from jaxchunk.models.moe import Experts, RouterSums
from jaxchunk.models.quantized import Matrix, QuantizedKernel
from jaxchunk.models.rope import Rope, rope_tables, rotate
from jaxchunk.models.tape import Tape
from jaxchunk.models.turned import TurnedKernel

RopeTables = dict[Rope, tuple[Array, Array]]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Linear(nnx.Module):
  """A matrix `kernel [in, out]`, perhaps with a `bias [out]` and an adapter.

  The kernel is quantized if the configuration says so.
  """

  def __init__(
    self,
    cfg: ModelConfig,
    name: str,
    inputs: int,
    outputs: int,
    *,
    gain: float = 1.0,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    dtype = jnp.dtype(cfg.param_dtype)
    kernel = jax.random.normal(rngs.params(), (inputs, outputs), dtype)
    kernel = kernel * gain * inputs**-0.5
    self.kernel: nnx.Param[Array] | QuantizedKernel | TurnedKernel = nnx.Param(
      kernel
    )
    if cfg.quantization is not None:
      self.kernel = QuantizedKernel(kernel, cfg.quantization)
    self.bias = nnx.data(nnx.Param(jnp.zeros(outputs, dtype)) if bias else None)
    adapter = None
    if cfg.lora is not None and name in cfg.lora.targets:
      adapter = Adapter(cfg.lora, self.matrix, dtype, rngs)
    self.adapter: Adapter | None = nnx.data(adapter)
    self.name = name

  @property
  def matrix(self) -> Matrix:
    """The kernel as it is held; of a stack of layers, all of them."""
    if isinstance(self.kernel, QuantizedKernel | TurnedKernel):
      return self.kernel.matrix
    return self.kernel[...]

  def __call__(
    self,
    tape: Tape,
    spec: str,
    x: Array,
    shape: tuple[int, ...],
    *,
    keep: bool = True,
    like: Array | None = None,
  ) -> Array:
    """`einsum(spec, x, kernel.reshape(shape))`, with the adapter's part.

    Args:
      tape: Remembers the product by the name of the matrix.
      spec: Einsum of x and the matrix; see `Tape.product`.
      x: Activations.
      shape: Of the matrix in `spec`; first what is summed, then what is not.
      keep: Whether the backward pass reads the output.
      like: As in `Tape.product`.

    Returns:
      The product, without the bias.
    """
    matrix = self.matrix
    if self.adapter is None:
      return tape.product(
        self.name, spec, x, matrix.reshape(shape), keep=keep, like=like
      )
    factor = self.adapter.column_factor(matrix)
    y = tape.adapted_product(
      self.name,
      spec,
      x,
      matrix.reshape(shape),
      self.adapter.a[...],
      self.adapter.b[...],
      scale=self.adapter.scale,
      keep=keep or factor is not None,
      like=like,
    )
    if factor is None:
      return y
    # In fp32: next to 1 there is little room in bf16.
    return (y * output_vector(spec, factor, shape)).astype(y.dtype)

  def add_bias(self, spec: str, y: Array, shape: tuple[int, ...]) -> Array:
    """`y + bias`, for the same spec and shape."""
    if self.bias is None:
      return y
    return y + output_vector(spec, self.bias[...], shape).astype(y.dtype)


def output_vector(spec: str, v: Array, shape: tuple[int, ...]) -> Array:
  """A vector of the outputs of `spec`, shaped to multiply or add to them."""
  inputs, out = spec.split("->")
  letters = inputs.split(",")[1]
  sizes = {
    letter: size
    for letter, size in zip(letters, shape, strict=True)
    if letter in out
  }
  return v.reshape([sizes.get(letter, 1) for letter in out])


class Norm(nnx.Module):
  """RMSNorm, computed in at least fp32."""

  def __init__(self, cfg: ModelConfig, width: int):
    self.offset = 1.0 if cfg.unit_offset_norm else 0.0
    self.eps = cfg.norm_eps
    dtype = jnp.dtype(cfg.param_dtype)
    self.scale = nnx.Param(jnp.full(width, 1 - self.offset, dtype))

  def __call__(
    self, x: Float[Array, "*B D"], axes: tuple[int, ...] = (-1,)
  ) -> Float[Array, "*B D"]:
    """`x / rms(x) * scale`, over the axes that hold the width."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    scale = self.scale[...].astype(wide.dtype) + self.offset
    within = {axis % x.ndim for axis in axes}
    scale = scale.reshape(
      [size if axis in within else 1 for axis, size in enumerate(x.shape)]
    )
    return (wide * lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)


class Block(nnx.Module):
  """One layer: attention and a gated MLP, each with norms around it.

  Inside a `jax.shard_map` its matrices may be parts, split by heads and by the
  MLP's width: then q, k, v are those of the device's heads, and what goes
  from layer to layer is the same on every device.
  With `cfg.moe` the MLP is that of the shared experts, if there are any, and
  `experts` are beside it.
  """

  def __init__(self, cfg: ModelConfig, window: int | None, rngs: nnx.Rngs):
    self.cfg = cfg
    self.window = window
    D, F, H = cfg.d_model, cfg.mlp_width, cfg.head_width
    N, K = cfg.num_heads, cfg.kv_heads
    linear = functools.partial(Linear, cfg, rngs=rngs)
    norm = functools.partial(Norm, cfg)
    out_gain = (2 * cfg.num_layers) ** -0.5
    pre_norm = norm(D) if cfg.pre_norms else None
    self.attention_norm: Norm | None = nnx.data(pre_norm)
    self.q = linear("q", D, N * H, bias=cfg.qkv_bias)
    self.k = linear("k", D, K * H, bias=cfg.qkv_bias)
    self.v = linear("v", D, K * H, bias=cfg.qkv_bias)
    widths = (H, H) if cfg.qk_norm_over == "head" else (N * H, K * H)
    q_norm, k_norm = map(norm, widths) if cfg.qk_norm else (None, None)
    self.q_norm: Norm | None = nnx.data(q_norm)
    self.k_norm: Norm | None = nnx.data(k_norm)
    self.o = linear("o", N * H, D, gain=out_gain)
    post_norm = norm(D) if cfg.post_norms else None
    self.attention_post_norm: Norm | None = nnx.data(post_norm)
    pre_norm = norm(D) if cfg.pre_norms else None
    self.mlp_norm: Norm | None = nnx.data(pre_norm)
    if F:
      self.gate = linear("gate", D, F)
      self.up = linear("up", D, F)
      self.down = linear("down", F, D, gain=out_gain)
    experts = None
    if cfg.moe is not None:
      dtype = jnp.dtype(cfg.param_dtype)
      experts = Experts(cfg.moe, D, dtype, gain=out_gain, rngs=rngs)
    self.experts: Experts | None = nnx.data(experts)
    post_norm = norm(D) if cfg.post_norms else None
    self.mlp_post_norm: Norm | None = nnx.data(post_norm)

  def pre(
    self, x: Float[Array, "B T D"], ropes: RopeTables, tape: Tape
  ) -> tuple[
    Float[Array, "B K G T H"],
    Float[Array, "B K T H"],
    Float[Array, "B K T H"],
  ]:
    """Queries, keys and values of a stretch of tokens, rotated."""
    cfg = self.cfg
    H, G = cfg.head_width, cfg.num_heads // cfg.kv_heads
    K = self.k.matrix.shape[-1] // H
    h = x if self.attention_norm is None else self.attention_norm(x)
    # Here, so that the gradients of h by q, k and v are added up as one.
    h = vary_like(h, self.q.matrix)

    def project(linear: Linear, heads: str, *sizes: int, keep: bool) -> Array:
      spec = f"BTD,D{heads}H->B{heads}TH"
      shape = (cfg.d_model, *sizes, H)
      y = linear(tape, spec, h, shape, keep=keep)
      return linear.add_bias(spec, y, shape)

    # Attention's backward reads q; k is in the sequence state by then.
    q = project(self.q, "KG", K, G, keep=True)
    k = project(self.k, "K", K, keep=cfg.qk_norm)
    v = project(self.v, "K", K, keep=False)
    if self.q_norm is not None and self.k_norm is not None:
      heads = () if cfg.qk_norm_over == "head" else (1, 2)
      q = self.q_norm(q, (*heads, -1))
      k = self.k_norm(k, (*heads[:1], -1))
    tables = ropes[cfg.rope_of(self.window)]
    return rotate(q, tables), rotate(k, tables), v

  def post(
    self,
    x: Float[Array, "B T D"],
    o: Float[Array, "B K G T H"],
    tape: Tape,
    keys: DropoutKeys | None = None,
    valid: Bool[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """The layer's output from its input and the output of attention.

    Experts have nothing to do with tokens that are not `valid`: padding.
    """
    cfg = self.cfg
    K, G, H = o.shape[1], o.shape[2], o.shape[4]
    D = cfg.d_model
    y = self.o(tape, "BKGTH,KGHD->BTD", o, (K, G, H, D), like=x)
    if self.attention_post_norm is not None:
      y = self.attention_post_norm(y)
    x = x + dropout(y, cfg.dropout, keys, site=0)
    h = x if self.mlp_norm is None else self.mlp_norm(x)
    if self.experts is None:
      y = self._mlp(tape, h, like=x)
    else:
      act = _ACTIVATIONS[cfg.activation]
      y = self.experts(tape, h, act, valid=valid, keep=cfg.post_norms)
      if cfg.mlp_width:
        y = y + self._mlp(tape, h, like=x)
    if self.mlp_post_norm is not None:
      y = self.mlp_post_norm(y)
    return x + dropout(y, cfg.dropout, keys, site=1)

  def _mlp(
    self, tape: Tape, h: Float[Array, "B T D"], *, like: Array
  ) -> Float[Array, "B T D"]:
    cfg = self.cfg
    D, F = cfg.d_model, self.gate.matrix.shape[-1]
    h = vary_like(h, self.gate.matrix)
    gate = self.gate(tape, "BTD,DF->BTF", h, (D, F))
    up = self.up(tape, "BTD,DF->BTF", h, (D, F))
    h = _ACTIVATIONS[cfg.activation](gate) * up
    keep = cfg.post_norms
    return self.down(tape, "BTF,FD->BTD", h, (F, D), keep=keep, like=like)

  @property
  def attention_options(self) -> dict[str, Any]:
    """Scale and soft-cap of the scores."""
    cfg = self.cfg
    return {"scale": cfg.score_scale, "softcap": cfg.attention_softcap}


class Transformer(nnx.Module):
  """A decoder-only language model.

  `model(tokens_BT)` gives logits. Parameters: `embed [V,D]`, `blocks`, one
  stack of layers `[L', ...]` per position of the window pattern,
  `final_norm`, and `head [V,D]` unless the embedding is tied.

  Args:
    cfg: The configuration; the model keeps a frozen copy.
    rngs: Seeds of the initial parameters, `nnx.Rngs(0)`.
  """

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    cfg = cfg.frozen()
    self.cfg = cfg
    dtype = jnp.dtype(cfg.param_dtype)
    shape = (cfg.vocab_size, cfg.d_model)
    gain = cfg.d_model**-0.5
    embed = jax.random.normal(rngs.params(), shape, dtype) * gain
    self.embed = nnx.Param(embed)
    stacks = []
    for position, window in enumerate(cfg.window_pattern):
      keys = jax.random.split(rngs.params(), cfg.layers_of(position))
      make = functools.partial(_make_block, cfg, window)
      stacks.append(jax.vmap(make)(keys))
    self.blocks = nnx.List(stacks)
    self.final_norm = Norm(cfg, cfg.d_model)
    head = None
    if not cfg.tie_embeddings:
      head = jax.random.normal(rngs.params(), shape, dtype) * gain
    self.head = nnx.data(None if head is None else nnx.Param(head))

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    document_ids: Int[Array, "B T"] | None = None,
    rng: PRNGKeyArray | None = None,
    implementation: str | None = None,
    remat: bool = False,
  ) -> Float[Array, "B T V"]:
    """Logits of every position, over whole rows.

    Args:
      tokens: Token ids.
      segment_ids: 0 is padding; tokens see only their own segment. One
        segment a row by default.
      positions: Rotary positions; by default from 0 in every row.
      document_ids: Names of the sequences, for dropout.
      rng: Key for dropout; `None` is no dropout.
      implementation: Of attention; see `jaxchunk.attention`.
      remat: Keep only the layers' inputs for the backward pass.

    Returns:
      Logits, in at least fp32.
    """
    x = self.hidden(
      tokens,
      segment_ids=segment_ids,
      positions=positions,
      document_ids=document_ids,
      rng=rng,
      implementation=implementation,
      remat=remat,
    )
    return self.logits(x)

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    document_ids: Int[Array, "B T"] | None = None,
    rng: PRNGKeyArray | None = None,
    implementation: str | None = None,
    remat: bool = False,
  ) -> Float[Array, "B T D"]:
    """The normed output of the last layer; arguments as `__call__`."""
    return self.hidden_and_routers(
      tokens,
      segment_ids=segment_ids,
      positions=positions,
      document_ids=document_ids,
      rng=rng,
      implementation=implementation,
      remat=remat,
    )[0]

  def hidden_and_routers(
    self,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    document_ids: Int[Array, "B T"] | None = None,
    rng: PRNGKeyArray | None = None,
    implementation: str | None = None,
    remat: bool = False,
  ) -> tuple[Float[Array, "B T D"], RouterSums | None]:
    """`hidden`, and what the routers of all layers said, `[L, ...]`."""
    if tokens.ndim != 2:
      raise ValueError(f"tokens must be [B,T], got shape {tokens.shape}")
    if positions is None:
      row = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
      positions = jnp.broadcast_to(row, tokens.shape)
    mask = AttentionMask.causal()
    if segment_ids is not None:
      mask &= AttentionMask.segments(segment_ids)
    ropes = self.rope_tables(positions)
    keys = None
    if rng is not None and self.cfg.dropout:
      if document_ids is None:
        row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        document_ids = jnp.broadcast_to(row, tokens.shape)
      keys = DropoutKeys.of(rng, document_ids, positions)

    valid = None if segment_ids is None else segment_ids > 0

    def layer(x: Array, block: Block, index: Any) -> tuple[Array, Any]:
      tape = Tape()
      q, k, v = block.pre(x, ropes, tape)
      seen = mask
      if block.window is not None:
        seen = mask & AttentionMask.window(block.window)
      o, _ = grouped_attention(
        q,
        k[None],
        v[None],
        mask=seen,
        implementation=implementation,
        **block.attention_options,
      )
      y = block.post(x, o, tape, keys and keys.layer(index), valid)
      return y, tape.router

    if remat:
      layer = jax.checkpoint(layer)
    x = self.embed_tokens(tokens)
    period = len(self.cfg.window_pattern)
    whole, rest = divmod(self.cfg.num_layers, period)

    def body(x: Array, step: Any) -> tuple[Array, list[Any]]:
      number, stacks = step
      said = []
      for position, block in enumerate(stacks):
        x, router = layer(x, block, number * period + position)
        said.append(router)
      return x, said

    stacks = [jax.tree.map(lambda a: a[:whole], b) for b in self.blocks]
    x, said = lax.scan(body, x, (jnp.arange(whole), stacks))
    routers = _in_order(said)
    for position in range(rest):
      block = layer_of(self.blocks[position], whole)
      x, router = layer(x, block, whole * period + position)
      routers = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b[None]]), routers, router
      )
    return self.final_norm(x), routers

  def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Token embeddings in the compute dtype."""
    return self.scale_embeddings(self.embed[...][tokens])

  def scale_embeddings(
    self, rows: Float[Array, "B T D"]
  ) -> Float[Array, "B T D"]:
    """Rows of `embed` as the first layer takes them."""
    x = rows.astype(self.cfg.dtype)
    if self.cfg.scale_embeddings:
      # Rounded to the compute dtype first, as the published models do.
      x = x * jnp.asarray(self.cfg.d_model**0.5, x.dtype)
    return x

  def rope_tables(self, positions: Int[Array, "B T"]) -> RopeTables:
    """Cosines and sines for every kind of layer."""
    cfg = self.cfg
    ropes = {cfg.rope_of(window) for window in cfg.window_pattern}
    dtype = jnp.dtype(cfg.dtype)
    return {
      rope: rope_tables(positions, cfg.head_width, rope, dtype)
      for rope in ropes
    }

  @property
  def unembed(self) -> Float[Array, "V D"]:
    """The head's matrix: `head`, or `embed` when tied."""
    return (self.embed if self.head is None else self.head)[...]

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits of normed hidden states, in at least fp32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    w = self.unembed.astype(x.dtype)
    logits = jnp.einsum("BTD,VD->BTV", x, w, preferred_element_type=wide)
    return self.cap(logits)

  def cap(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits with the soft-cap, if the model has one."""
    cap = self.cfg.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _make_block(cfg: ModelConfig, window: int | None, key: Array) -> Block:
  return Block(cfg, window, nnx.Rngs(key))


def _in_order(stacks: list[Any]) -> Any:
  """One stack of all layers from one per position of the window pattern."""
  return jax.tree.map(
    lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *stacks
  )


def layer_of(stack: Any, index: Any) -> Any:
  """Layer `index` (may be traced) of a pytree of stacked arrays `[L, ...]`."""

  def take(a: Array) -> Array:
    return lax.dynamic_index_in_dim(a, index, keepdims=False)

  return jax.tree.map(take, stack)
