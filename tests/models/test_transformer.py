"""The decoder: layers in order, segments, compute dtypes, transformations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.kernels.attention.api import grouped_attention
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.dropout import DropoutKeys
from jaxchunk.models.rope import LinearScaling, Rope
from jaxchunk.models.tape import Tape
from jaxchunk.models.transformer import Transformer, layer_of

# A scan over one block compiles fastest.
ONE_BLOCK = {"num_layers": 2, "window_pattern": (5,)}


def make(**fields):
  """A small model with a bit of everything, norms and biases included."""
  cfg = ModelConfig(
    vocab_size=61,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    window_pattern=(5, None),
    rope=Rope(theta=1e3, scaling=LinearScaling(factor=2.0)),
    local_rope=Rope(theta=1e2),
    qk_norm=True,
    qkv_bias=True,
    post_norms=True,
    attention_softcap=5.0,
    logit_softcap=4.0,
  )
  cfg = dataclasses.replace(cfg, **fields)
  abstract = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    values = rng.standard_normal(leaf.shape)
    if leaf.shape[-1] == 61 or "kernel" in jax.tree_util.keystr(path):
      values *= leaf.shape[-2] ** -0.5
    elif "scale" in jax.tree_util.keystr(path):
      values = 1 + 0.3 * values
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, abstract)


def make64(**fields):
  return make(dtype="float64", param_dtype="float64", **fields)


def tokens_of(batch, length, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, 61, (batch, length)), jnp.int32)


def close(got, want, tolerance=1e-11):
  """In fp64: rounding over the layers stays far below 1e-11."""
  for (path, g), w in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    assert g.shape == w.shape
    error = float(jnp.max(jnp.abs(g - w)))
    assert error <= tolerance * max(float(jnp.max(jnp.abs(w))), 1), (
      jax.tree_util.keystr(path)
    )


@functools.cache
def untrained():
  """A configuration, and a model of it as the constructor leaves it."""
  cfg = dataclasses.replace(make().cfg, logit_softcap=None)
  return cfg, Transformer(cfg, rngs=nnx.Rngs(0))


@functools.cache
def gradients(implementation="xla", remat=False):
  """Loss and gradients of packed rows, and the bytes taken on the way."""
  tokens = tokens_of(2, 64)
  ids = np.repeat([[1, 2, 0], [3, 4, 0]], [20, 40, 4], axis=1)
  with jax.enable_x64(True):
    model = make64(**ONE_BLOCK | {"num_layers": 8})

    def loss(model):
      logits = model(
        tokens,
        segment_ids=jnp.asarray(ids, jnp.int32),
        implementation=implementation,
        remat=remat,
      )
      return jnp.mean(jnp.square(logits))

    program = jax.jit(jax.value_and_grad(loss)).lower(model).compile()
    size = program.memory_analysis().temp_size_in_bytes
    return jax.tree.map(np.asarray, program(model)), size


@pytest.mark.fast
def test_layers_run_in_the_order_of_the_pattern_and_drop_their_own(x64):
  # Two whole periods and a layer that remains.
  num_layers, pattern = 5, (5, None)
  model = make64(num_layers=num_layers, window_pattern=pattern, dropout=0.2)
  tokens = tokens_of(2, 20)
  positions = jnp.broadcast_to(jnp.arange(20)[None], tokens.shape)
  rows = jnp.broadcast_to(jnp.arange(2)[:, None], tokens.shape)
  rng = jax.random.key(0)
  keys = DropoutKeys.of(rng, rows, positions)

  @jax.jit
  def layer(x, block, number):
    q, k, v = block.pre(x, model.rope_tables(positions), Tape())
    mask = AttentionMask.causal()
    if block.window is not None:
      mask &= AttentionMask.window(block.window)
    o, _ = grouped_attention(
      q,
      k[None],
      v[None],
      mask=mask,
      implementation="reference",
      **block.attention_options,
    )
    return block.post(x, o, Tape(), keys.layer(number))

  x = model.embed_tokens(tokens)
  for number in range(num_layers):
    depth, position = divmod(number, len(pattern))
    block = layer_of(model.blocks[position], depth)
    assert block.window == pattern[position]
    x = layer(x, block, number)
  want = model.logits(model.final_norm(x))
  close(jax.jit(Transformer.__call__)(model, tokens, rng=rng), want)


@pytest.mark.fast
def test_segments_are_separate_rows(x64):
  model = make64(num_layers=2)
  lengths = (7, 1, 12)
  rows, padding = tokens_of(3, 12), tokens_of(1, 4, 9)[0]
  packed = [*(row[:n] for row, n in zip(rows, lengths, strict=True)), padding]
  cut = [7, 1, 12, 4]
  ids = jnp.asarray(np.repeat([1, 2, 5, 0], cut), jnp.int32)[None]
  starts = np.concatenate([np.arange(n) for n in cut])
  call = jax.jit(Transformer.__call__)
  # No segments here: a causal row does not see what follows it.
  want = call(model, rows)
  # Rotary embeddings see distances, so positions need not start again.
  for positions in (starts, np.arange(24)):
    got = call(
      model,
      jnp.concatenate(packed)[None],
      segment_ids=ids,
      positions=jnp.asarray(positions, jnp.int32)[None],
    )
    at = 0
    for row, length in zip(want, lengths, strict=True):
      close(got[0, at : at + length], row[:length])
      at += length


def test_xla_attention_is_the_reference_inside_the_model():
  close(gradients()[0], gradients("reference")[0])


def test_remat_changes_nothing_but_what_is_kept():
  want, more = gradients()
  got, less = gradients(remat=True)
  close(got, want)
  assert less < more / 2


def test_bf16_compute_errs_as_plain_bf16_does():
  tokens = tokens_of(2, 64)
  call = jax.jit(Transformer.__call__, static_argnames="implementation")
  with jax.enable_x64(True):
    want = np.asarray(call(make64(**ONE_BLOCK), tokens))
  model = make(**ONE_BLOCK, dtype="bfloat16")
  got, plain = (
    np.asarray(call(model, tokens, implementation=implementation))
    for implementation in ("xla", "reference")
  )
  errors = [np.linalg.norm(a - want) for a in (got, plain)]
  assert errors[0] <= 2 * errors[1]
  assert errors[1] < 0.05 * np.linalg.norm(want)


@pytest.mark.fast
def test_logits_parameters_and_gradients_of_a_bf16_model_are_fp32():
  model, tokens = make(**ONE_BLOCK, dtype="bfloat16"), tokens_of(1, 8)

  def both(model):
    return model(tokens), model.hidden(tokens)

  logits, hidden = jax.eval_shape(both, model)
  assert (logits.dtype, hidden.dtype) == (jnp.float32, jnp.bfloat16)
  grads = jax.eval_shape(jax.grad(lambda m: jnp.mean(m(tokens))), model)
  for leaf in jax.tree.leaves((model, grads)):
    assert leaf.dtype == jnp.float32


@pytest.mark.fast
def test_the_model_keeps_a_frozen_copy_of_its_configuration():
  cfg, model = untrained()
  x = model.embed_tokens(tokens_of(1, 4))
  before = model.logits(x)
  cfg.logit_softcap = 1e-3
  np.testing.assert_array_equal(model.logits(x), before)
  cfg.logit_softcap = None
  with pytest.raises(dataclasses.FrozenInstanceError, match="logit_softcap"):
    model.cfg.logit_softcap = 1e-3


@pytest.mark.fast
def test_dropout_does_not_depend_on_packing(x64):
  model = make64(**ONE_BLOCK, dropout=0.3)
  row, other = tokens_of(1, 7), tokens_of(1, 13, 1)
  rng, names = jax.random.key(3), jnp.asarray([4, 9], jnp.int32)
  call = jax.jit(Transformer.__call__)

  def alone(name, key=rng):
    return call(model, row, document_ids=jnp.full((1, 7), name), rng=key)

  packed = jnp.concatenate([other, row], axis=1)
  sizes, starts = jnp.asarray([13, 7]), [np.arange(13), np.arange(7)]
  got = call(
    model,
    packed,
    segment_ids=jnp.repeat(jnp.asarray([1, 2]), sizes)[None],
    positions=jnp.asarray(np.concatenate(starts), jnp.int32)[None],
    document_ids=jnp.repeat(names, sizes)[None],
    rng=rng,
  )
  close(got[:, 13:], alone(9))
  for different in (alone(8), alone(9, jax.random.key(4))):
    assert float(jnp.abs(different - alone(9)).max()) > 1e-2


@pytest.mark.fast
def test_rows_are_documents_by_default():
  model = make(**ONE_BLOCK, dropout=0.3)
  tokens = jnp.broadcast_to(tokens_of(1, 7), (2, 7))
  call = jax.jit(Transformer.__call__)
  out = call(model, tokens, rng=jax.random.key(0))
  assert float(jnp.abs(out[0] - out[1]).max()) > 1e-2


@pytest.mark.fast
def test_an_abstract_model_has_the_shapes_of_a_real_one():
  cfg, real = untrained()
  abstract = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  leaves = jax.tree.leaves(abstract)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert jax.tree.structure(abstract) == jax.tree.structure(real)
  for a, b in zip(leaves, jax.tree.leaves(real), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  tokens = jax.ShapeDtypeStruct((2, 20), jnp.int32)
  lowered = jax.jit(Transformer.__call__).lower(abstract, tokens)
  assert lowered.out_info.shape == (2, 20, 61)


@pytest.mark.fast
def test_models_of_equal_configuration_share_a_compiled_program():
  traces = []

  @jax.jit
  def scores(model, tokens):
    traces.append(1)
    return model.logits(model.embed_tokens(tokens))

  tokens, one = tokens_of(2, 6), make()
  other = jax.tree.map(lambda a: a + 1, make())
  assert one.cfg is not other.cfg
  difference = scores(one, tokens) - scores(other, tokens)
  assert float(jnp.abs(difference).max()) > 1e-2
  assert len(traces) == 1
  scores(make(logit_softcap=2.0), tokens)
  assert len(traces) == 2


@pytest.mark.fast
def test_a_tied_head_is_the_embedding():
  model = make(tie_embeddings=True)
  assert model.head is None
  assert model.unembed is model.embed[...]
  untied = make()
  assert untied.unembed is untied.head[...]
  sizes = [sum(a.size for a in jax.tree.leaves(m)) for m in (model, untied)]
  assert sizes[1] - sizes[0] == 61 * 32


@pytest.mark.fast
def test_an_untrained_model_is_near_the_uniform_guess():
  _, model = untrained()
  tokens, targets = tokens_of(4, 30), tokens_of(4, 30, 1)
  scores = jax.nn.log_softmax(jax.jit(Transformer.__call__)(model, tokens))
  nll = -jnp.take_along_axis(scores, targets[..., None], axis=-1)
  assert abs(float(nll.mean()) - np.log(61)) < 0.7


@pytest.mark.fast
def test_tokens_must_be_rows():
  with pytest.raises(ValueError, match=r"tokens must be \[B,T\], .*\(5,\)"):
    make()(jnp.zeros(5, jnp.int32))
