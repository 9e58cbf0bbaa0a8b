"""Adapters: exact gradients by chunks, none for what is frozen, merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.models.adapters import add_lora, merge_lora
from jaxchunk.models.families import gemma2, qwen2
from jaxchunk.models.lora import LoRA

_SIZES = {
  "vocab_size": 40,
  "d_model": 16,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "d_ff": 24,
}


def _config(**fields):
  wide = {"dtype": "float64", "param_dtype": "float64"}
  return qwen2(**_SIZES | wide | fields)


def _noisy(model, kind, seed=1):
  """The model with every parameter of a kind moved at random."""
  state = nnx.state(model, kind)
  leaves, treedef = jax.tree.flatten(state)
  rng = np.random.default_rng(seed)
  noise = [0.3 * rng.normal(size=a.shape) for a in leaves]
  pairs = zip(leaves, noise, strict=True)
  leaves = [a + jnp.asarray(n, a.dtype) for a, n in pairs]
  model = nnx.clone(model)
  nnx.update(model, jax.tree.unflatten(treedef, leaves))
  return model


def _adapted(cfg, **fields):
  model = _noisy(jc.Transformer(cfg, rngs=nnx.Rngs(0)), nnx.Param)
  lora = LoRA(**{"rank": 3, "alpha": 6.0} | fields)
  return _noisy(add_lora(model, lora), nnx.LoRAParam, seed=2)


def _batch(length=30):
  ids = np.random.default_rng(3).integers(0, 40, (2, length + 1), np.int32)
  return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}


_KINDS = {
  "lora": {},
  "some matrices": {"targets": ("q", "v", "down")},
  "rank stabilized": {"rank_stabilized": True},
  "dora": {"dora": True},
}


def test_new_adapters_change_nothing():
  model = jc.Transformer(qwen2(**_SIZES), rngs=nnx.Rngs(0))
  tokens = _batch()["tokens"]
  np.testing.assert_array_equal(add_lora(model, LoRA())(tokens), model(tokens))
  dora = add_lora(model, LoRA(dora=True))
  np.testing.assert_allclose(dora(tokens), model(tokens), atol=1e-5)


@pytest.mark.parametrize("kind", _KINDS)
def test_merged_computes_the_same(kind):
  with jax.enable_x64(True):
    model = _adapted(_config(), **_KINDS[kind])
    tokens = _batch()["tokens"]
    merged = merge_lora(model)
    assert merged.cfg.lora is None
    paths = nnx.to_flat_state(nnx.state(merged)).paths
    assert not any("adapter" in path for path in paths)
    np.testing.assert_allclose(merged(tokens), model(tokens), atol=1e-12)


@pytest.mark.parametrize("kind", _KINDS)
def test_adapters_are_low_rank_sums_by_the_formula(kind):
  with jax.enable_x64(True):
    model = _adapted(_config(), **_KINDS[kind])
    lora = model.cfg.lora
    want = {True: 6.0 / 3**0.5, False: 2.0}[lora.rank_stabilized]
    assert lora.scale == pytest.approx(want)
    linear = model.blocks[0].down
    adapter, w = linear.adapter, linear.kernel[1]
    adapted = w + want * adapter.a[1] @ adapter.b[1]
    if lora.dora:
      norms = jnp.linalg.norm(adapted, axis=0, keepdims=True)
      adapted = adapted / norms * adapter.magnitude[1][None]
    got = merge_lora(model).blocks[0].down.kernel[1]
    np.testing.assert_allclose(got, adapted, rtol=1e-12)


@pytest.mark.parametrize(
  "kind, live_chunks, strategy",
  [
    ("lora", 0, "chunk_outer"),
    ("some matrices", 1, "layer_outer"),
    ("dora", 2, "chunk_outer"),
  ],
)
def test_gradients_by_chunks_are_exact(kind, live_chunks, strategy):
  with jax.enable_x64(True):
    model = _adapted(_config(), **_KINDS[kind])
    batch = _batch()
    want_loss, whole = jc.full_value_and_grad(model, batch)
    loss, grads = jc.chunked_value_and_grad(
      model,
      batch,
      chunk_size=8,
      live_chunks=live_chunks,
      strategy=strategy,
      trainable=nnx.LoRAParam,
    )
    want = dict(nnx.to_flat_state(nnx.filter_state(whole, nnx.Param)))
    got = dict(nnx.to_flat_state(grads))
    fields = 3 if model.cfg.lora.dora else 2
    assert len(got) == fields * len(model.cfg.lora.targets)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-13)
    for path, grad in got.items():
      assert path[-2] == "adapter"
      np.testing.assert_allclose(
        grad.get_value(), want[path].get_value(), rtol=1e-9, atol=1e-12
      )


def test_the_norm_of_dora_counts_as_a_constant():
  """As PEFT has it; the gradient is that of `m / stop_gradient(norm) * W'`."""
  with jax.enable_x64(True):
    model = _adapted(_config(num_layers=1), dora=True, targets=("down",))
    batch = _batch(6)

    def loss(b, frozen):
      adapter = model.blocks[0].down.adapter
      w = model.blocks[0].down.kernel[0]
      s = model.cfg.lora.scale
      norms = jnp.linalg.norm(w + s * adapter.a[0] @ frozen, axis=0)
      merged = (w + s * adapter.a[0] @ b) * (adapter.magnitude[0] / norms)[None]
      plain = merge_lora(model)
      plain.blocks[0].down.kernel[...] = merged[None]
      return jc.full_value_and_grad(plain, batch)[0]

    _, grads = jc.full_value_and_grad(model, batch)
    got = grads["blocks"][0]["down"]["adapter"]["b"].get_value()[0]
    b = model.blocks[0].down.adapter.b[0]
    step = 1e-6
    rng = np.random.default_rng(0)
    direction = jnp.asarray(rng.normal(size=b.shape))
    up, down = (loss(b + sign * step * direction, b) for sign in (1, -1))
    np.testing.assert_allclose(
      jnp.sum(got * direction), (up - down) / (2 * step), rtol=1e-6
    )


def test_frozen_matrices_cost_no_gradients():
  """Two thirds of the products: forward and to the inputs, not to weights."""
  cfg = qwen2(vocab_size=64, d_model=128, num_layers=2, num_heads=2, d_ff=512)
  model = add_lora(jc.Transformer(cfg, rngs=nnx.Rngs(0)), LoRA(rank=2))

  def flops(trainable):
    lowered = jc.lower_chunked(
      model, capacity=64, chunk_size=64, trainable=trainable
    )
    return lowered.compile().cost_analysis()["flops"]

  adapters, everything = flops(nnx.LoRAParam), flops(None)
  assert 0.6 < adapters / everything < 0.75


def test_windows_soft_caps_and_bf16_take_adapters():
  cfg = gemma2(**_SIZES, head_dim=8, window=4, param_dtype="bfloat16")
  model = _adapted(cfg)
  adapters = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
  assert {a.dtype.name for a in adapters} == {"float32"}
  _, grads = jc.chunked_value_and_grad(
    model, _batch(), chunk_size=8, trainable=nnx.LoRAParam
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert merge_lora(model).blocks[0].q.kernel.dtype == jnp.bfloat16


def test_what_cannot_be():
  with pytest.raises(ValueError, match="rank=0 must be a positive integer"):
    LoRA(rank=0)
  with pytest.raises(ValueError, match=r"alpha=-1\.0 must be positive"):
    LoRA(alpha=-1.0)
  with pytest.raises(ValueError, match=r"targets=\('query',\) must be some of"):
    LoRA(targets=("query",))
  model = jc.Transformer(qwen2(**_SIZES), rngs=nnx.Rngs(0))
  assert merge_lora(model) is model
  with pytest.raises(ValueError, match="has adapters already"):
    add_lora(add_lora(model, LoRA()), LoRA())
  with pytest.raises(ValueError, match="lora=4 must be a LoRA, or None"):
    qwen2(**_SIZES, lora=4).validate()
