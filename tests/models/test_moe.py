"""Mixtures of experts compute what a loop over tokens and experts does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.models.adapters import add_lora, merge_lora
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.lora import LoRA
from jaxchunk.models.moe import Experts, MoE, RouterSums, router_loss
from jaxchunk.models.quantized import Quantization
from jaxchunk.models.ragged import ragged_product
from jaxchunk.models.tape import Tape
from jaxchunk.models.transformer import Block, Transformer

_B, _T, _D, _E, _F = 2, 9, 8, 5, 6
_MOE = MoE(num_experts=_E, experts_per_token=2, d_ff=_F)
_LOOSE = dataclasses.replace(_MOE, capacity_factor=float(_E))
_PARTS = ("expert_gate", "expert_up", "expert_down")


def random(shape, dtype="float64", seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make_experts(moe, dtype="float64"):
  experts = Experts(moe, _D, dtype, gain=1.0, rngs=nnx.Rngs(0))
  return jax.tree.map(lambda a: random(a.shape, a.dtype, a.size), experts)


def tokens(dtype="float64"):
  """Tokens of two rows, the second ending in padding."""
  valid = np.ones((_B, _T), bool)
  valid[1, 6:] = False
  return random((_B, _T, _D), dtype, 1), jnp.asarray(valid)


def kept_copies(experts, h, valid, most=None):
  """The expert and token of every copy that a token has room for."""
  moe = experts.moe
  logits = np.asarray(h.reshape(-1, _D) @ experts.router[...])
  chosen = np.argsort(-logits, axis=-1)[:, : moe.experts_per_token]
  room = [h.size if most is None else most] * moe.num_experts
  kept = []
  for choice in range(moe.experts_per_token):
    for n, e in enumerate(chosen[:, choice]):
      if valid.reshape(-1)[n] and room[e] > 0:
        room[e] -= 1
        kept.append((int(e), n))
  return chosen, kept


def dense_loop(experts, h, *, chosen, kept):
  """Every token by every expert, one expert at a time."""
  x = h.reshape(-1, _D)
  probs = jax.nn.softmax(x @ experts.router[...])
  if experts.moe.normalize_top_k:
    best = jnp.take_along_axis(probs, chosen, axis=1)
    probs = probs / best.sum(1, keepdims=True)
  out = jnp.zeros_like(x)
  for e in range(experts.moe.num_experts):
    mine = np.zeros(len(x))
    mine[[n for expert, n in kept if expert == e]] = 1
    gate = jax.nn.silu(x @ experts.gate[...][e])
    y = (gate * (x @ experts.up[...][e])) @ experts.down[...][e]
    out += (mine * probs[:, e])[:, None] * y
  return out.reshape(h.shape)


def layer(experts, h, valid, tape=None):
  return experts(tape or Tape(), h, jax.nn.silu, valid=valid)


def assert_close(got, want, tolerance=1e-11):
  for (path, g), w in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      g, w, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
    )


def with_gradients(function, experts, h):
  @jax.jit
  def both(experts, h):
    y, vjp = jax.vjp(function, experts, h)
    return y, vjp(random(h.shape, h.dtype, 2))

  return both(experts, h)


@pytest.mark.parametrize("normalize", [True, False])
def test_dropless_is_a_dense_loop(x64, normalize):
  moe = dataclasses.replace(_MOE, normalize_top_k=normalize)
  experts, (h, valid) = make_experts(moe), tokens()
  chosen, kept = kept_copies(experts, h, valid)
  loop = functools.partial(dense_loop, chosen=chosen, kept=kept)
  want = with_gradients(loop, experts, h)
  got = with_gradients(functools.partial(layer, valid=valid), experts, h)
  assert_close(got, want)
  assert np.abs(np.asarray(want[0])[1, 6:]).max() == 0


@pytest.mark.parametrize("factor, dropped", [(0.5, True), (_E, False)])
def test_capacity_is_a_dense_loop_that_drops(x64, factor, dropped):
  moe = dataclasses.replace(_MOE, capacity_factor=factor)
  experts, (h, valid) = make_experts(moe), tokens()
  most = moe.capacity(_B * _T)
  chosen, kept = kept_copies(experts, h, valid, most)
  loop = functools.partial(dense_loop, chosen=chosen, kept=kept)
  want = with_gradients(loop, experts, h)
  got = with_gradients(functools.partial(layer, valid=valid), experts, h)
  assert_close(got, want)
  tape = Tape()
  layer(experts, h, valid, tape)
  counts = np.asarray(tape.router.counts)
  assert tape.router.dropped == np.maximum(counts - most, 0).sum()
  assert (tape.router.dropped > 0) == dropped


@pytest.mark.fast
def test_padding_takes_no_room_and_is_in_no_sum(x64):
  moe = dataclasses.replace(_MOE, capacity_factor=0.5)
  experts, (h, valid) = make_experts(moe), tokens()
  other = jnp.where(valid[..., None], h, 7.0)
  tapes = Tape(), Tape()
  one, two = (
    layer(experts, x, valid, tape)
    for x, tape in zip((h, other), tapes, strict=True)
  )
  assert_close(one, two, 0)
  assert_close(tapes[0].router, tapes[1].router, 0)
  assert tapes[0].router.counts.sum() == 2 * valid.sum()


@pytest.mark.fast
def test_sums_are_those_of_the_tokens(x64):
  experts, (h, valid) = make_experts(_MOE), tokens()
  tape = Tape()
  layer(experts, h, valid, tape)
  logits = np.asarray(h[valid] @ experts.router[...])
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  counts = np.bincount(np.argsort(-logits)[:, :2].reshape(-1), minlength=_E)
  z = (np.log(np.exp(logits).sum(-1)) ** 2).sum()
  want = RouterSums(counts, probs.sum(0), z, 0)
  assert_close(tape.router, want)
  stacked = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 3), want)
  moe = dataclasses.replace(_MOE, balance_loss=0.3, z_loss=0.2)
  n = len(logits)
  balance = _E * (counts / (2 * n) * probs.mean(0)).sum()
  np.testing.assert_allclose(
    router_loss(moe, stacked), 3 * (0.3 * balance + 0.2 * z / n), rtol=1e-13
  )


@pytest.mark.fast
def test_rows_of_no_group_give_nothing(x64):
  x, w = random((7, 3)), random((2, 3, 4), seed=1)
  sizes = jnp.asarray([2, 3], jnp.int32)
  y, vjp = jax.vjp(lambda x, w: ragged_product(x, w, sizes), x, w)
  dx, dw = vjp(jnp.ones_like(y))
  want = np.concatenate([x[:2] @ w[0], x[2:5] @ w[1], np.zeros((2, 4))])
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-14)
  assert np.abs(dx[5:]).max() == 0
  want = np.einsum("td,f->df", x[2:5], np.ones(4))
  np.testing.assert_allclose(dw[1], want, rtol=0, atol=1e-14)


@pytest.mark.fast
@pytest.mark.parametrize("moe", [_MOE, _LOOSE])
def test_gradients_of_experts_are_not_rounded_to_bf16(moe):
  experts = make_experts(moe, "float32")
  h, valid = tokens("bfloat16")
  run = functools.partial(layer, valid=valid)
  y, (gradients, dh) = with_gradients(run, experts, h)
  assert (y.dtype, dh.dtype) == ("bfloat16", "bfloat16")
  for gradient in jax.tree.leaves(gradients):
    assert gradient.dtype == "float32"
    rounded = gradient.astype("bfloat16").astype("float32")
    assert not np.array_equal(gradient, rounded)


def make_block(**fields):
  cfg = ModelConfig(
    vocab_size=10,
    d_model=_D,
    num_layers=1,
    num_heads=2,
    d_ff=1,
    dtype="float64",
    param_dtype="float64",
    **fields,
  ).frozen()
  abstract = nnx.eval_shape(lambda: Block(cfg, None, nnx.Rngs(0)))
  return jax.tree.map(lambda s: random(s.shape, s.dtype, s.size), abstract)


@pytest.mark.parametrize("moe", [_MOE, _LOOSE])
@pytest.mark.parametrize("post_norms", [False, True])
def test_the_backward_pass_repeats_no_product_that_was_kept(
  x64, moe, post_norms
):
  moe = dataclasses.replace(moe, shared_d_ff=3)
  block = make_block(moe=moe, post_norms=post_norms)
  h, valid = tokens()
  o = random((_B, 2, 1, _T, _D // 2), seed=3)

  def backward(block, h, o, saved):
    def post(block, h, o):
      return block.post(h, o, Tape(saved), valid=valid)

    return jax.vjp(post, block, h, o)[1](jnp.ones_like(h))

  tape = Tape()
  block.post(h, o, tape, valid=valid)
  kept = {"o", "router", "gate", "up", *_PARTS[:2]}
  assert set(tape.saved) == kept | (
    {"down", _PARTS[2]} if post_norms else set()
  )
  want = jax.jit(backward)(block, h, o, {})
  assert_close(jax.jit(backward)(block, h, o, tape.saved), want, 1e-12)
  # Two products for each gradient, and those that must be done again.
  for missing in (None, *_PARTS[:2]):
    saved = {n: a for n, a in tape.saved.items() if n != missing}
    text = jax.jit(backward).lower(block, h, o, saved).as_text()
    products = text.count("stablehlo.dot_general")
    products += text.count("chlo.ragged_dot")
    assert products == 2 * 8 + (missing is not None)


@pytest.mark.fast
@pytest.mark.parametrize(
  "fields, message",
  [
    ({"num_experts": 0}, "moe.num_experts=0 must be a positive integer"),
    ({"experts_per_token": 6}, "moe.experts_per_token=6 is more than moe.num"),
    ({"d_ff": 2.0}, r"moe.d_ff=2\.0 must be a positive integer"),
    ({"shared_d_ff": -1}, "moe.shared_d_ff=-1 must be an integer, 0 or more"),
    ({"capacity_factor": 0.0}, r"moe.capacity_factor=0\.0 must be positive"),
    ({"z_loss": -1.0}, r"moe.z_loss=-1\.0 must not be negative"),
  ],
)
def test_every_impossible_field_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(_MOE, **fields)


@pytest.mark.fast
@pytest.mark.parametrize(
  "fields, message",
  [
    ({"moe": 3}, "moe=3 must be a MoE, or None"),
    ({"lora": LoRA()}, r"lora.targets has \['down', 'gate', 'up'\] with moe="),
    ({"quantization": Quantization(block=1)}, "quantization=.* with moe="),
  ],
)
def test_what_does_not_go_with_experts_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    make_block(**({"moe": _MOE} | fields))


@pytest.mark.fast
def test_adapters_go_beside_attention(x64):
  lora = LoRA(targets=("q", "o"), rank=2)
  plain = Transformer(make_block(moe=_MOE).cfg, rngs=nnx.Rngs(0))
  model = add_lora(plain, lora)
  assert not hasattr(model.blocks[0], "gate")
  shapes = {w.shape for w in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))}
  assert shapes == {(1, _D, 2), (1, 2, _D)}
  assert_close(merge_lora(model), plain, 0)
