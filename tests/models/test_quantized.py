"""Matrices in four and eight bits: the nearest codes, and what uses them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.models.adapters import (
  add_lora,
  matrices_of,
  merge_lora,
  model_of,
  quantize_model,
)
from jaxchunk.models.families import qwen2
from jaxchunk.models.lora import LoRA
from jaxchunk.models.quantized import _NF4, Quantization, quantized

_HELD = [Quantization(kind="nf4", block=8), Quantization(kind="int8", block=8)]
_IDS = [q.kind for q in _HELD]


def _config(**fields):
  sizes = {
    "vocab_size": 40,
    "d_model": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 24,
    "window_pattern": (8, None),
  }
  wide = {"dtype": "float64", "param_dtype": "float64"}
  return qwen2(**sizes | wide | fields)


def _batch(length=30):
  ids = np.random.default_rng(3).integers(0, 40, (2, length + 1), np.int32)
  return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}


def _noisy(model, seed=2):
  """The model with adapters moved at random."""
  rng = np.random.default_rng(seed)
  state = jax.tree.map(
    lambda a: a + 0.3 * jnp.asarray(rng.normal(size=a.shape), a.dtype),
    nnx.state(model, nnx.LoRAParam),
  )
  model = nnx.clone(model)
  nnx.update(model, state)
  return model


def _plain(model):
  """The same model with its matrices as arrays."""
  dtype = model.cfg.param_dtype
  cfg = dataclasses.replace(model.cfg, quantization=None).frozen()
  arrays = {
    path: variable.get_value()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  for path, matrix in matrices_of(model).items():
    arrays[path] = matrix.widened(dtype)
  return model_of(cfg, arrays)


@pytest.mark.fast
@pytest.mark.parametrize("kind, steps", [("nf4", 1), ("int8", 127)])
def test_codes_are_the_nearest(kind, steps):
  kernel = np.random.default_rng(0).normal(size=(2, 24, 5)).astype(np.float32)
  kernel[0, :8, 0] = 0
  held = quantized(jnp.asarray(kernel), Quantization(kind=kind, block=8))
  values = np.asarray(_NF4 if kind == "nf4" else np.arange(-127, 128))
  blocks = kernel.reshape(2, 3, 8, 5)
  largest = np.abs(blocks).max(2) / steps
  scales = np.asarray(held.scales, np.float32)
  np.testing.assert_allclose(scales, largest, rtol=2**-8)
  choices = values.astype(np.float32) * scales[:, :, None, :, None]
  best = np.abs(choices - blocks[..., None]).min(-1)
  got = np.asarray(held.widened("float32"))
  errors = np.abs(got - kernel).reshape(blocks.shape)
  np.testing.assert_allclose(errors, best, atol=1e-6)


@pytest.mark.fast
def test_codes_are_those_of_bitsandbytes_and_qwix():
  qwix = pytest.importorskip("qwix")
  kernel = jax.random.normal(jax.random.key(0), (256, 64))
  held = quantized(kernel, Quantization())
  theirs = qwix.quantize(
    kernel,
    "nf4",
    channelwise_axes=(1,),
    tiled_axes={0: 64},
    scale_dtype=jnp.bfloat16,
  )
  np.testing.assert_array_equal(held.scales, theirs.scale)
  # Here for the scale in bf16, there for that before it was rounded.
  differ = np.asarray(held.codes) != np.asarray(theirs.qvalue)
  assert differ.mean() < 0.01
  again = qwix.QArray(held.codes, held.scales, None, "nf4")
  np.testing.assert_allclose(
    held.widened("bfloat16").astype("float32"),
    qwix.dequantize(again).astype("float32"),
    rtol=2**-7,
  )


@pytest.mark.parametrize("held", _HELD, ids=_IDS)
@pytest.mark.parametrize("dora", [False, True])
def test_computes_what_the_widened_matrices_do(held, dora):
  with jax.enable_x64(True):
    base = jc.Transformer(_config(), rngs=nnx.Rngs(0))
    lora = LoRA(rank=3, alpha=6.0, targets=("q", "v", "down"), dora=dora)
    model = _noisy(add_lora(quantize_model(base, held), lora))
    tokens = _batch()["tokens"]
    want = _plain(model)(tokens)
    np.testing.assert_allclose(model(tokens), want, atol=1e-12)
    merged = merge_lora(model)
    assert merged.cfg.quantization is None
    np.testing.assert_allclose(merged(tokens), want, atol=1e-12)


@pytest.mark.parametrize(
  "held, live_chunks, strategy",
  [(_HELD[0], 1, "chunk_outer"), (_HELD[1], 1, "layer_outer")],
  ids=_IDS,
)
def test_gradients_of_adapters_by_chunks_are_exact(held, live_chunks, strategy):
  with jax.enable_x64(True):
    base = jc.Transformer(_config(), rngs=nnx.Rngs(0))
    lora = LoRA(rank=3, alpha=6.0)
    model = _noisy(add_lora(quantize_model(base, held), lora))
    batch = _batch()
    want_loss, whole = jc.full_value_and_grad(
      _plain(model), batch, trainable=nnx.LoRAParam
    )
    loss, grads = jc.chunked_value_and_grad(
      model,
      batch,
      chunk_size=8,
      live_chunks=live_chunks,
      strategy=strategy,
      trainable=nnx.LoRAParam,
    )
    np.testing.assert_allclose(loss, want_loss, rtol=1e-12)
    want = dict(nnx.to_flat_state(whole))
    assert set(want) == set(nnx.to_flat_state(grads).paths)
    for path, grad in nnx.to_flat_state(grads):
      np.testing.assert_allclose(
        grad.get_value(), want[path].get_value(), rtol=1e-9, atol=1e-12
      )


def test_a_new_model_is_that_of_the_configuration():
  cfg = _config(quantization=_HELD[0], dtype="float32", param_dtype="float32")
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  plain = dataclasses.replace(cfg, quantization=None)
  other = quantize_model(jc.Transformer(plain, rngs=nnx.Rngs(0)), _HELD[0])
  ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, other))
  assert set(ours) == set(theirs)
  kernel = ("blocks", 0, "q", "kernel")
  assert ours[(*kernel, "codes")].get_value().dtype == jnp.uint4
  assert ours[(*kernel, "codes")].get_value().shape == (2, 16, 16)
  assert ours[(*kernel, "scales")].get_value().shape == (2, 2, 16)
  np.testing.assert_array_equal(
    ours[(*kernel, "codes")].get_value(), theirs[(*kernel, "codes")].get_value()
  )


@pytest.mark.fast
def test_bad_quantization_is_refused():
  with pytest.raises(ValueError, match="kind='int3'"):
    Quantization(kind="int3")
  with pytest.raises(ValueError, match="block=0"):
    Quantization(block=0)
  with pytest.raises(ValueError, match="d_ff=24 is not a multiple"):
    _config(quantization=Quantization(block=16)).frozen()
  with pytest.raises(ValueError, match="must be a Quantization"):
    _config(quantization="nf4").frozen()
  cfg = _config(quantization=_HELD[0], dtype="float32", param_dtype="float32")
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="quantized"):
    quantize_model(model, _HELD[0])
  with pytest.raises(ValueError, match="cannot be trained"):
    jc.chunked_value_and_grad(model, _batch(), chunk_size=8)
