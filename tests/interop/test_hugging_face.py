import jax
import numpy as np
import pytest
from flax import nnx

from jaxchunk.interop.hugging_face import from_hugging_face, to_hugging_face
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.families import gemma3, llama3, qwen2
from jaxchunk.models.transformer import Transformer

_SIZES = {
  "vocab_size": 11,
  "d_model": 8,
  "num_layers": 3,
  "num_heads": 4,
  "num_kv_heads": 2,
  "d_ff": 12,
}
_LLAMA = llama3(**_SIZES)
_FAMILIES = {
  "llama3": _LLAMA,
  # Biases; layers in two stacks with norms on both sides, and a tied head.
  "qwen2": qwen2(**_SIZES),
  "gemma3": gemma3(**_SIZES | {"num_layers": 7, "head_dim": 6}),
}


def _model(cfg: ModelConfig, seed: int) -> Transformer:
  """Random in every parameter, so that no two look alike."""
  model = Transformer(cfg, rngs=nnx.Rngs(0))
  leaves, treedef = jax.tree.flatten(model)
  rng = np.random.default_rng(seed)
  noise = [rng.standard_normal(a.shape, np.float32) for a in leaves]
  return jax.tree.unflatten(treedef, noise)


@pytest.mark.parametrize("family", _FAMILIES)
def test_there_and_back(family):
  model = _model(_FAMILIES[family], seed=1)
  back = from_hugging_face(to_hugging_face(model), model.cfg)
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(back), strict=True):
    np.testing.assert_array_equal(a, b)


def test_layers_are_apart_and_matrices_are_out_by_in():
  model = _model(_LLAMA, seed=2)
  arrays = to_hugging_face(model)
  down = np.asarray(model.blocks[0].down.kernel)
  for layer in range(3):
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    np.testing.assert_array_equal(arrays[name], down[layer].T)
  assert arrays["model.layers.0.self_attn.k_proj.weight"].shape == (4, 8)
  assert arrays["lm_head.weight"].shape == (11, 8)
  # Two norms and seven matrices a layer; embedding, last norm, head.
  assert len(arrays) == 3 * 9 + 3


def test_a_missing_weight_is_named():
  arrays = to_hugging_face(_model(_LLAMA, seed=3))
  del arrays["model.layers.2.mlp.up_proj.weight"]
  with pytest.raises(ValueError, match=r"lack 'model\.layers\.2\.mlp\.up"):
    from_hugging_face(arrays, _LLAMA)


def test_a_weight_too_many_is_named():
  arrays = to_hugging_face(_model(_LLAMA, seed=4))
  arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
  with pytest.raises(ValueError, match=r"no place .*q_proj\.bias"):
    from_hugging_face(arrays, _LLAMA)


def test_a_shape_that_does_not_fit_is_named():
  arrays = to_hugging_face(_model(_LLAMA, seed=5))
  name = "model.layers.1.mlp.gate_proj.weight"
  arrays[name] = arrays[name].T
  with pytest.raises(ValueError, match=r"gate_proj.*\(8, 12\).*\(12, 8\)"):
    from_hugging_face(arrays, _LLAMA)
