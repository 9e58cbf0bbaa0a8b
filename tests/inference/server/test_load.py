"""From folders to what is served."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.inference.engine import EngineConfig
from jaxchunk.inference.server.load import load_served
from jaxchunk.interop.peft import save_peft
from jaxchunk.models.adapters import add_lora
from jaxchunk.models.lora import LoRA


@pytest.fixture(name="folder", scope="module")
def fixture_folder(tmp_path_factory):
  """A model of Hugging Face with an adapter."""
  folder = tmp_path_factory.mktemp("models") / "little"
  cfg = jc.ModelConfig(
    vocab_size=259, d_model=32, num_layers=1, num_heads=2, d_ff=32
  )
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  jc.save_hf(model, folder, tokenizer=ByteTokenizer())
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [7, 258]})
  )
  model = add_lora(model, LoRA(rank=2))
  rng = np.random.default_rng(0)
  noise = jax.tree.map(
    lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype),
    nnx.state(model, nnx.LoRAParam),
  )
  nnx.update(model, noise)
  save_peft(model, folder / "poems")
  return folder


SIZES = EngineConfig(
  max_length=64, max_sequences=1, step_tokens=1, num_pages=8, page_size=16
)


def test_a_model_is_served_with_its_adapter(folder):
  served = load_served(
    model=str(folder),
    adapters={"poems": str(folder / "poems")},
    config=SIZES,
  )
  assert served.names == ("little", "poems") and served.template is None
  assert {7, 258} <= served.engine.core._ends

  def answer(adapter):
    (found,) = served.engine.generate(
      "Once upon", temperature=0, max_tokens=12, adapter=adapter
    )
    return found.tokens

  assert answer(None) != answer("poems")


@pytest.mark.fast
@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, "name one of --workdir"),
    ({"workdir": "a", "model": "b"}, "name one of --workdir"),
    ({"model": "nowhere"}, "--model='nowhere' is no folder"),
    (
      {"model": "nowhere", "config": EngineConfig(kv_dtype="int3")},
      "kv_dtype='int3' must be",
    ),
  ],
)
def test_what_cannot_be_loaded_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    load_served(**options)
