"""Folders of weights: read and written whole, or refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxchunk as jc
from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.interop import safetensors_files
from jaxchunk.interop.errors import InteropError
from jaxchunk.models.adapters import add_lora, merge_lora, quantize_model
from jaxchunk.models.families import (
  gemma3,
  mixtral,
  olmo2,
  phi3,
  qwen2,
  qwen3_moe,
)
from jaxchunk.models.lora import LoRA
from jaxchunk.models.moe import MoE
from jaxchunk.models.quantized import Quantization

pytestmark = pytest.mark.fast

_SIZES = {
  "vocab_size": 24,
  "d_model": 16,
  "num_layers": 3,
  "num_heads": 4,
  "num_kv_heads": 2,
  "head_dim": 4,
  "d_ff": 24,
}
_CONFIGS = {
  "qwen2": qwen2(**_SIZES),
  "phi3": phi3(**_SIZES, window=8),
  "olmo2": olmo2(**_SIZES),
  "mixtral": mixtral(**_SIZES),
  "qwen3 moe": qwen3_moe(
    **_SIZES, moe=MoE(num_experts=3, experts_per_token=2, d_ff=5)
  ),
  "gemma3": gemma3(**_SIZES | {"num_layers": 7}, window=8),
}


def _model(cfg, seed=0):
  """Random in every parameter."""
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  leaves, treedef = jax.tree.flatten(model)
  rng = np.random.default_rng(seed)
  noise = [jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in leaves]
  return jax.tree.unflatten(treedef, noise)


def _assert_same_bits(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
  """A saved model in four shards."""
  model = _model(_CONFIGS["qwen2"])
  jc.save_hf(model, tmp_path / "saved", max_shard_bytes=8000)
  assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
  return tmp_path / "saved"


@pytest.mark.parametrize("name", _CONFIGS)
@pytest.mark.parametrize("shard", [10**9, 3000])
def test_there_and_back_has_the_same_bits(name, shard, tmp_path):
  model = _model(_CONFIGS[name])
  jc.save_hf(model, tmp_path, max_shard_bytes=shard)
  back = jc.load_hf(tmp_path)
  _assert_same_bits(model, back)
  assert type(back) is jc.Transformer
  # What comes out once more is the same file for file.
  jc.save_hf(back, tmp_path / "again", max_shard_bytes=shard)
  for file in tmp_path.glob("*.safetensors"):
    again = tmp_path / "again" / file.name
    assert again.read_bytes() == file.read_bytes()


def test_the_library_of_the_format_reads_what_is_written(tmp_path):
  model = _model(_CONFIGS["phi3"])
  jc.save_hf(model, tmp_path, architecture="Phi3ForCausalLM", dtype="bfloat16")
  arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  fused = arrays["model.layers.1.self_attn.qkv_proj.weight"]
  block = model.blocks[0]
  parts = [getattr(block, n).kernel[1].T for n in ("q", "k", "v")]
  want = jnp.concatenate(parts).astype(jnp.bfloat16)
  np.testing.assert_array_equal(fused, want)
  values = json.loads((tmp_path / "config.json").read_text())
  assert values["torch_dtype"] == "bfloat16"
  assert jc.load_hf(tmp_path).cfg.param_dtype == "bfloat16"


def test_an_index_lists_every_tensor(folder):
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  files = set(index["weight_map"].values())
  assert files == {file.name for file in folder.glob("*.safetensors")}
  size = 0
  for file in files:
    arrays = safetensors.numpy.load_file(folder / file)
    assert all(index["weight_map"][name] == file for name in arrays)
    size += sum(a.nbytes for a in arrays.values())
  assert index["metadata"]["total_size"] == size


def test_dtypes_are_those_asked_for(folder):
  model = jc.load_hf(folder, dtype="bfloat16", param_dtype="bfloat16")
  assert {a.dtype.name for a in jax.tree.leaves(model)} == {"bfloat16"}
  plain = jc.load_hf(folder)
  rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), plain)
  _assert_same_bits(rounded, model)


def test_parameters_go_where_they_are_wanted(folder):
  mesh = jax.make_mesh(
    (2, 2),
    ("layers", "model"),
    (jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )

  def place(path, shape):
    spec = PartitionSpec()
    if path.startswith("blocks") and path.endswith(("gate/kernel", "q/kernel")):
      spec = PartitionSpec(None, None, "model")
    elif path == "embed":
      spec = PartitionSpec("model")
    assert len(shape) >= len(spec)
    return NamedSharding(mesh, spec)

  spread = jc.load_hf(folder, shardings=place)
  kernel = spread.blocks[0].gate.kernel[...]
  assert kernel.sharding.spec == PartitionSpec(None, None, "model")
  assert kernel.addressable_shards[0].data.shape == (3, 16, 12)
  _assert_same_bits(spread, jc.load_hf(folder))
  jc.save_hf(spread, folder.parent / "spread", max_shard_bytes=8000)
  for file in folder.glob("*.safetensors"):
    again = folder.parent / "spread" / file.name
    assert again.read_bytes() == file.read_bytes()


def test_what_lies_beside_the_weights_is_kept(folder, tmp_path):
  (folder / "tokenizer.json").write_text("{}")
  (folder / "chat_template.jinja").write_text("{{ messages }}")
  values = json.loads((folder / "config.json").read_text())
  values |= {"eos_token_id": [5, 6], "transformers_version": "4.1"}
  values["architectures"] = ["Qwen2ForCausalLM"]
  (folder / "config.json").write_text(json.dumps(values))
  jc.save_hf(jc.load_hf(folder), tmp_path / "new", like=folder)
  assert (tmp_path / "new/chat_template.jinja").read_text() == "{{ messages }}"
  assert (tmp_path / "new/tokenizer.json").exists()
  new = json.loads((tmp_path / "new/config.json").read_text())
  assert new["eos_token_id"] == [5, 6]
  jc.save_hf(jc.load_hf(folder), tmp_path / "own", tokenizer=ByteTokenizer())
  own = json.loads((tmp_path / "own/config.json").read_text())
  assert own["eos_token_id"] == 258
  assert (tmp_path / "own/tokenizer_config.json").exists()


def test_weights_are_not_overwritten_unasked(folder):
  model = _model(_CONFIGS["qwen2"], seed=1)
  with pytest.raises(InteropError, match=r"already holds .*overwrite=True"):
    jc.save_hf(model, folder)
  jc.save_hf(model, folder, overwrite=True)
  assert [f.name for f in folder.glob("*.safetensors")] == ["model.safetensors"]
  _assert_same_bits(jc.load_hf(folder), model)


def test_adapters_are_merged_while_it_is_written(tmp_path):
  model = add_lora(_model(_CONFIGS["phi3"]), LoRA(rank=2, dora=True))
  moved = jax.tree.map(lambda a: a + 0.1, nnx.state(model, nnx.LoRAParam))
  nnx.update(model, moved)
  jc.save_hf(model, tmp_path, architecture="Phi3ForCausalLM")
  _assert_near(jc.load_hf(tmp_path), merge_lora(model))


def _assert_near(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_failure_leaves_no_mixed_model(folder, monkeypatch):
  write, calls = safetensors_files.write_file, []

  def full(path, tensors):
    calls.append(path)
    if len(calls) == 3:
      raise OSError("no space left")
    write(path, tensors)

  monkeypatch.setattr(safetensors_files, "write_file", full)
  with pytest.raises(OSError, match="no space left"):
    jc.save_hf(
      _model(_CONFIGS["qwen2"], seed=1),
      folder,
      overwrite=True,
      max_shard_bytes=8000,
    )
  assert len(calls) == 3
  with pytest.raises(InteropError, match=r"has no config\.json"):
    jc.load_hf(folder)
  assert not list(folder.glob(".*.safetensors"))


def test_the_published_length_is_kept(folder, tmp_path):
  values = json.loads((folder / "config.json").read_text())
  values["max_position_embeddings"] = 4096
  (folder / "config.json").write_text(json.dumps(values))
  model = jc.load_hf(folder, context_length=32)
  assert model.cfg.context_length == 32
  jc.save_hf(model, tmp_path / "new", like=folder)
  assert jc.load_hf(tmp_path / "new").cfg.context_length == 4096


def test_a_truncated_file_is_named(folder):
  file = sorted(folder.glob("*.safetensors"))[1]
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(InteropError, match=f"{file.name} is truncated or corr"):
    jc.load_hf(folder)


def test_a_corrupt_header_is_named(folder):
  file = sorted(folder.glob("*.safetensors"))[0]
  file.write_bytes(b"\xff" * 64)
  with pytest.raises(InteropError, match=f"{file.name} is truncated or corr"):
    jc.load_hf(folder)


def test_a_missing_shard_is_named(folder):
  file = sorted(folder.glob("*.safetensors"))[2]
  file.unlink()
  with pytest.raises(InteropError, match=f"{file.name} is not there, but"):
    jc.load_hf(folder)


def test_a_tensor_that_only_the_index_has_is_named(folder):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  index["weight_map"]["model.more"] = next(iter(index["weight_map"].values()))
  path.write_text(json.dumps(index))
  with pytest.raises(InteropError, match=r"in no file: \['model.more'\]"):
    jc.load_hf(folder)
  path.write_text("[]")
  with pytest.raises(InteropError, match="is not an index of tensors"):
    jc.load_hf(folder)


def test_pickles_are_not_read(tmp_path, folder):
  (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
  with pytest.raises(InteropError, match=r"has no \*\.safetensors$"):
    jc.load_hf(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(InteropError, match=r"pytorch_model.bin.*are pickles"):
    jc.load_hf(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
  with pytest.raises(InteropError, match=r"has no config\.json"):
    jc.load_hf(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(InteropError, match=r"config\.json is not JSON"):
    jc.load_hf(tmp_path)


def _rewrite(folder, change):
  """The weights in one file, after a change."""
  arrays = {}
  for file in folder.glob("*.safetensors"):
    arrays |= safetensors.numpy.load_file(file)
    file.unlink()
  (folder / "model.safetensors.index.json").unlink(missing_ok=True)
  safetensors.numpy.save_file(change(arrays), folder / "model.safetensors")


def test_missing_and_unused_tensors_are_named(folder):
  name = "model.layers.1.mlp.up_proj.weight"
  _rewrite(folder, lambda arrays: arrays | {"model.extra": np.ones(2)})
  with pytest.raises(InteropError, match=r"no place for 1 .*'model\.extra'"):
    jc.load_hf(folder)
  _rewrite(
    folder,
    lambda arrays: {
      n: a for n, a in arrays.items() if n not in (name, "model.extra")
    },
  )
  with pytest.raises(InteropError, match=r"lack 'model\.layers\.1\.mlp"):
    jc.load_hf(folder)


def test_a_missing_head_says_what_it_may_be(folder):
  _rewrite(
    folder, lambda a: {n: x for n, x in a.items() if n != "lm_head.weight"}
  )
  with pytest.raises(InteropError, match=r"lm_head.*set tie_word_embeddings"):
    jc.load_hf(folder)


def test_a_shape_of_another_configuration_is_named(folder):
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(
    json.dumps(values | {"intermediate_size": 32})
  )
  with pytest.raises(InteropError, match=r"gate_proj.*\(24, 16\).*\(32, 16\)"):
    jc.load_hf(folder)


def test_an_integer_tensor_is_refused(folder):
  _rewrite(folder, lambda a: a | {"lm_head.weight": np.ones(2, np.int8)})
  with pytest.raises(InteropError, match=r"'lm_head\.weight' has dtype I8"):
    jc.load_hf(folder)


def test_the_text_of_a_larger_model_is_found(folder):
  """Its names have more before them, and the head stands beside the text."""

  def longer(arrays):
    moved = {f"language_model.{name}": a for name, a in arrays.items()}
    return moved | {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}

  plain = jc.load_hf(folder)
  _rewrite(folder, longer)
  _assert_same_bits(jc.load_hf(folder), plain)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["phi3", "gemma3"])
def test_quantized_while_it_is_read(family, kind, tmp_path):
  """With fused matrices, window patterns, tied heads; and widened on the way
  back."""
  model = _model(_CONFIGS[family])
  jc.save_hf(model, tmp_path / "a")
  held = Quantization(kind=kind, block=8)
  loaded = jc.load_hf(tmp_path / "a", quantization=held)
  _assert_same_bits(loaded, quantize_model(model, held))
  adapted = add_lora(loaded, LoRA(rank=2))
  jc.save_hf(adapted, tmp_path / "b")
  again = jc.load_hf(tmp_path / "b")
  assert again.cfg.quantization is None
  _assert_same_bits(again, merge_lora(adapted))
