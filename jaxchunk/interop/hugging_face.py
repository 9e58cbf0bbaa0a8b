"""Models from folders of Hugging Face, and to them.

Neither torch nor transformers is needed. Weights go from the file to their
place on the devices tensor by tensor, and back: beside the model the host
holds about one tensor (benchmarks/hugging_face.py --memory).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Num

from jaxchunk.data.cache import read_json, write_json
from jaxchunk.data.chat import TEMPLATE
from jaxchunk.data.tokenizers import Tokenizer
from jaxchunk.interop import safetensors_files as files
from jaxchunk.interop.architectures import (
  architecture_named,
  architecture_of,
  text_part,
)
from jaxchunk.interop.configs import config_from_hf, config_to_hf
from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.weights import Shardings, filled_model, writable
from jaxchunk.models.config import DType, ModelConfig
from jaxchunk.models.lora import LoRA
from jaxchunk.models.quantized import Quantization
from jaxchunk.models.transformer import Transformer

Arrays = dict[str, Num[np.ndarray, "..."]]

CONFIG = "config.json"
# Of config.json: kept on export from the model that was loaded.
_KEPT_FIELDS = (
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "initializer_range",
  "use_cache",
)
# Beside the weights: copied on export from the model that was loaded.
_KEPT_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  TEMPLATE,
  "generation_config.json",
)


def load_hf(
  path: str | Path,
  *,
  dtype: DType | None = None,
  param_dtype: DType | None = None,
  context_length: int | None = None,
  quantization: Quantization | None = None,
  shardings: Sharding | Shardings | None = None,
) -> Transformer:
  """Loads a model in the format of Hugging Face.

  Args:
    path: A folder with `config.json` and `*.safetensors`, whole or in shards.
    dtype: Of activations; by default that in `config.json`.
    param_dtype: Of the parameters; by default that in `config.json`.
    context_length: Of the longest sequence to come, in tokens, for rotary
      embeddings that depend on it ("longrope", "dynamic"); by default the
      published one.
    quantization: Hold the matrices of the layers in four or eight bits; each
      is quantized as it is read.
    shardings: Where the parameters go: one sharding for all, or a function of
      a parameter's path ("blocks/0/q/kernel") and shape (`[L,in,out]`, layers
      stacked). By default the first device. Of many hosts, each reads what
      its own devices need.

  Returns:
    The model. Beside it the host holds about one tensor at a time.

  Raises:
    InteropError: The folder, the architecture or a tensor is not what it
      should be; names it.
  """
  path = Path(path).expanduser()
  cfg = load_config(
    path,
    dtype=dtype,
    param_dtype=param_dtype,
    context_length=context_length,
    quantization=quantization,
  )
  architecture = architecture_of(text_part(read_config(path)))
  reader = files.Reader(path)
  return filled_model(
    reader,
    cfg.frozen(),
    fused=architecture.fused,
    experts=architecture.experts,
    shardings=shardings,
    name=str(path),
  )


def load_config(
  path: str | Path,
  *,
  dtype: DType | None = None,
  param_dtype: DType | None = None,
  context_length: int | None = None,
  lora: LoRA | None = None,
  quantization: Quantization | None = None,
) -> ModelConfig:
  """The configuration of a model in the format of Hugging Face.

  Args:
    path: A folder with `config.json`.
    dtype: As in `load_hf`.
    param_dtype: As in `load_hf`.
    context_length: As in `load_hf`.
    lora: Adapters to train beside it.
    quantization: As in `load_hf`.

  Returns:
    A configuration that may still be changed.

  Raises:
    InteropError: As `load_hf`.
  """
  values = read_config(Path(path).expanduser())
  cfg = config_from_hf(values, context_length=context_length)
  cfg.dtype = dtype or cfg.dtype
  cfg.param_dtype = param_dtype or cfg.param_dtype
  cfg.lora = lora
  cfg.quantization = quantization
  return cfg


def save_hf(
  model: Transformer,
  path: str | Path,
  *,
  like: str | Path | None = None,
  architecture: str | None = None,
  tokenizer: Tokenizer | None = None,
  dtype: DType | None = None,
  max_shard_bytes: int = 5 * 10**9,
  overwrite: bool = False,
) -> None:
  """Saves a model in the format of Hugging Face.

  Args:
    model: The model. Adapters are merged while it is written, and quantized
      matrices widened.
    path: A folder, made if need be.
    like: The folder that the model was loaded from: its architecture, ids of
      special tokens, tokenizer and chat template are taken over.
    architecture: A class of transformers, "Qwen3ForCausalLM"; by default that
      of `like`, or else the first that computes the same.
    tokenizer: Saved beside the weights, in place of that of `like` with its
      chat template and settings of generation.
    dtype: Of the weights; by default that of the parameters.
    max_shard_bytes: Largest size of a file.
    overwrite: Whether weights that are there already may be replaced.

  Raises:
    InteropError: No architecture computes what the model does, or the folder
      holds weights and `overwrite` is off.
  """
  path = Path(path).expanduser()
  base: dict[str, Any] = {}
  if like is not None:
    like = Path(like).expanduser()
    base = dict(text_part(read_config(like)))
    architecture = architecture or architecture_of(base).name
  values = config_to_hf(model.cfg, architecture)
  # The length that it was loaded for may be less than it is made for.
  published = base.get("max_position_embeddings") or 0
  if published > values["max_position_embeddings"]:
    values["max_position_embeddings"] = published
  kept = {name: base[name] for name in _KEPT_FIELDS if name in base}
  if tokenizer is not None or not kept:
    # Said even where there are none: the classes have ids by default.
    kept |= {
      f"{kind}_token_id": getattr(tokenizer, f"{kind}_id", None)
      for kind in ("bos", "eos", "pad")
    }
  values |= kept | {"torch_dtype": dtype or model.cfg.param_dtype}
  written = architecture_named(values["architectures"][0])
  tensors = list(
    writable(model, fused=written.fused, experts=written.experts, dtype=dtype)
  )
  old = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
  if old and not overwrite:
    raise InteropError(
      f"{path} already holds {sorted(file.name for file in old)[:3]}; choose "
      "another folder, or allow it with overwrite=True"
    )
  if jax.process_index() != 0:
    # All hosts take part in gathering a tensor; one writes it.
    for tensor in tensors:
      tensor.fetch()
    return
  path.mkdir(parents=True, exist_ok=True)
  # Without these, what is there after a failure is no model.
  for name in (CONFIG, files.INDEX):
    (path / name).unlink(missing_ok=True)
  if like is not None and tokenizer is None:
    for name in _KEPT_FILES:
      if (like / name).is_file() and like.resolve() != path.resolve():
        shutil.copyfile(like / name, path / name)
  if tokenizer is not None:
    tokenizer.save(path)
  new = files.write(path, tensors, max_shard_bytes)
  write_json(path / CONFIG, values)
  for file in old:
    # What is left of the old weights would be taken for a part of the new.
    if file.name not in new:
      file.unlink(missing_ok=True)


def read_config(path: Path) -> dict[str, Any]:
  """The contents of a folder's `config.json`.

  Raises:
    InteropError: There is none, or it is not JSON.
  """
  file = path / CONFIG
  if not file.is_file():
    raise InteropError(
      f"{path} has no {CONFIG}; name a folder as save_pretrained of "
      "transformers writes it"
    )
  try:
    return read_json(file)
  except ValueError as error:
    raise InteropError(str(error)) from error


def to_hugging_face(model: Transformer, *, fused: bool = False) -> Arrays:
  """The parameters as `LlamaForCausalLM` and its kin name and shape them.

  Args:
    model: The model.
    fused: As `Phi3ForCausalLM` does: q, k, v in one matrix, and gate, up.

  Returns:
    Arrays on the host by name. Layers are apart and matrices `[out, in]`; a
    tied head is not there.
  """
  tensors = writable(model, fused=fused)
  return {tensor.name: tensor.fetch() for tensor in tensors}


def from_hugging_face(
  arrays: Mapping[str, Num[np.ndarray, "..."]],
  cfg: ModelConfig,
  *,
  fused: bool = False,
) -> Transformer:
  """A model of the configuration with such parameters, or their gradients.

  Args:
    arrays: By name, as `to_hugging_face` gives them.
    cfg: What they are the parameters of.
    fused: As in `to_hugging_face`.

  Returns:
    The model, its arrays in `cfg.param_dtype`.

  Raises:
    InteropError: A name is missing or left over, or a shape is not that of
      the configuration.
  """
  given = {name: np.asarray(array) for name, array in arrays.items()}
  return filled_model(
    _InMemory(given), cfg.frozen(), fused=fused, name="the weights"
  )


class _InMemory:
  """Tensors in a dictionary."""

  def __init__(self, tensors: Arrays):
    self.tensors = tensors

  def read(self, name: str, index: files.Index) -> files.Array:
    return self.tensors[name][index]
