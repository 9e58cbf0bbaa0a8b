"""Adapters of PEFT compute the same here, and ours there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.peft import load_peft, save_peft
from jaxchunk.models.adapters import add_lora
from jaxchunk.models.families import llama2
from jaxchunk.models.lora import LoRA

_SIZES = {
  "vocab_size": 40,
  "d_model": 16,
  "num_layers": 3,
  "num_heads": 4,
  "num_kv_heads": 2,
  "d_ff": 24,
}
_KINDS = {
  "lora": LoRA(rank=3, alpha=6.0),
  "attention": LoRA(rank=3, alpha=6.0, targets=("q", "o")),
  "stabilized": LoRA(rank=4, alpha=6.0, rank_stabilized=True),
  "dora": LoRA(rank=3, alpha=6.0, dora=True),
}


def _model(lora=None, seed=0):
  model = jc.Transformer(llama2(**_SIZES), rngs=nnx.Rngs(seed))
  if lora is None:
    return model
  model = add_lora(model, lora)
  rng = np.random.default_rng(seed)
  noise = jax.tree.map(
    lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype),
    nnx.state(model, nnx.LoRAParam),
  )
  nnx.update(model, noise)
  return model


@pytest.mark.fast
@pytest.mark.parametrize("kind", _KINDS)
def test_there_and_back_has_the_same_bits(kind, tmp_path):
  model = _model(_KINDS[kind])
  save_peft(model, tmp_path, base="some/base")
  back = load_peft(_model(), tmp_path)
  assert back.cfg == model.cfg
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(back), strict=True):
    np.testing.assert_array_equal(a, b)


# PEFT uses names that transformers is about to drop.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", _KINDS)
def test_peft_computes_the_same(kind, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  import torch
  import transformers

  tokens = np.random.default_rng(1).integers(0, 40, (2, 20))

  def logits(model):
    with torch.no_grad():
      return model(torch.from_numpy(tokens).long()).logits.numpy()

  ours = _model(_KINDS[kind])
  jc.save_hf(_model(), tmp_path / "base")
  save_peft(ours, tmp_path / "adapters")
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
  theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
  want = np.asarray(ours(tokens.astype(np.int32)))
  assert np.abs(logits(theirs) - want).max() <= 2e-5 * np.ptp(want)
  # What PEFT saves is read.
  theirs.save_pretrained(tmp_path / "theirs")
  back = load_peft(jc.load_hf(tmp_path / "base"), tmp_path / "theirs")
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(back), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.fast
@pytest.mark.parametrize(
  "fields, message",
  [
    ({"peft_type": "IA3"}, "peft_type='IA3'; jaxchunk reads 'LORA'"),
    ({"bias": "all"}, "bias='all': not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*: not supported"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.*: not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': not supp"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=.*: not supp"),
    ({"r": None}, "rank=None must be a positive integer"),
  ],
)
def test_what_is_not_known_is_refused_by_name(fields, message, tmp_path):
  save_peft(_model(_KINDS["lora"]), tmp_path)
  file = tmp_path / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))
  with pytest.raises(InteropError, match=message):
    load_peft(_model(), tmp_path)


@pytest.mark.fast
def test_adapters_beside_fused_matrices_are_refused(tmp_path):
  jc.save_hf(_model(), tmp_path / "base", architecture="Phi3ForCausalLM")
  with pytest.raises(InteropError, match=r"Phi3ForCausalLM has q, k, v in one"):
    save_peft(
      _model(_KINDS["lora"]), tmp_path / "out", base=str(tmp_path / "base")
    )


@pytest.mark.fast
def test_adapters_of_another_model_are_named(tmp_path):
  save_peft(_model(_KINDS["attention"]), tmp_path)
  other = llama2(**_SIZES | {"d_model": 32, "head_dim": 4})
  with pytest.raises(InteropError, match=r"does not fit the model's \(32, 3\)"):
    load_peft(jc.Transformer(other, rngs=nnx.Rngs(0)), tmp_path)
  deeper = llama2(**_SIZES | {"num_layers": 4})
  with pytest.raises(InteropError, match="lacks adapters of some layers"):
    load_peft(jc.Transformer(deeper, rngs=nnx.Rngs(0)), tmp_path)
  with pytest.raises(InteropError, match="no adapters to save"):
    save_peft(_model(), tmp_path)
  with pytest.raises(InteropError, match=r"has no adapter_config\.json"):
    load_peft(_model(), tmp_path / "elsewhere")
