"""Models from folders of Hugging Face, and to them.

Neither torch nor transformers is needed. Weights go from the file to their
place on the devices tensor by tensor, and back: beside the model the host
holds about one tensor (benchmarks/hugging_face.py --memory).
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Num
from tqdm import tqdm

from jaxchunk.data.tokenizers import Tokenizer
from jaxchunk.interop import safetensors_files as files
from jaxchunk.interop.configs import (
  architecture_named,
  architecture_of,
  config_from_hf,
  config_to_hf,
  text_part,
)
from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.names import EMBED, HEAD, Part, Tensor
from jaxchunk.interop.names import Path as ParamPath
from jaxchunk.interop.names import tensors as tensors_of
from jaxchunk.models.adapters import adapters_of
from jaxchunk.models.config import DType, ModelConfig
from jaxchunk.models.lora import Adapter, LoRA
from jaxchunk.models.transformer import Transformer, layer_of

Arrays = dict[str, Num[np.ndarray, "..."]]
Shardings = Callable[[str, tuple[int, ...]], Sharding]

CONFIG = "config.json"
_QUIET_SECONDS = 3.0
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
  "chat_template.jinja",
  "generation_config.json",
)
# Computed from the configuration wherever they are stored.
_COMPUTED = "rotary_emb.inv_freq"


class _Source(Protocol):
  """Tensors by name."""

  @property
  def tensors(self) -> Mapping[str, Any]:
    """What has a `shape`."""
    ...

  def read(self, name: str, index: files.Index) -> files.Array:
    """A part of a tensor."""
    ...


def load_hf(
  path: str | Path,
  *,
  dtype: DType | None = None,
  param_dtype: DType | None = None,
  context_length: int | None = None,
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
    path, dtype=dtype, param_dtype=param_dtype, context_length=context_length
  )
  fused = architecture_of(text_part(read_config(path))).fused
  reader = files.Reader(path)
  return _filled(reader, cfg.frozen(), fused, _placing(shardings), str(path))


def load_config(
  path: str | Path,
  *,
  dtype: DType | None = None,
  param_dtype: DType | None = None,
  context_length: int | None = None,
  lora: LoRA | None = None,
) -> ModelConfig:
  """The configuration of a model in the format of Hugging Face.

  Args:
    path: A folder with `config.json`.
    dtype: As in `load_hf`.
    param_dtype: As in `load_hf`.
    context_length: As in `load_hf`.
    lora: Adapters to train beside it.

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
    model: The model. Adapters are merged while it is written.
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
  fused = architecture_named(values["architectures"][0]).fused
  writable = list(_writable(model, fused, dtype))
  old = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
  if old and not overwrite:
    raise InteropError(
      f"{path} already holds {sorted(file.name for file in old)[:3]}; choose "
      "another folder, or allow it with overwrite=True"
    )
  if jax.process_index() != 0:
    # All hosts take part in gathering a tensor; one writes it.
    for tensor in writable:
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
  new = files.write(path, writable, max_shard_bytes)
  files.write_json(path / CONFIG, values)
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
    values = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InteropError(f"{file} is not JSON ({error})") from None
  if not isinstance(values, dict):
    raise InteropError(f"{file} is not a JSON object")
  return values


def to_hugging_face(model: Transformer, *, fused: bool = False) -> Arrays:
  """The parameters as `LlamaForCausalLM` and its kin name and shape them.

  Args:
    model: The model.
    fused: As `Phi3ForCausalLM` does: q, k, v in one matrix, and gate, up.

  Returns:
    Arrays on the host by name. Layers are apart and matrices `[out, in]`; a
    tied head is not there.
  """
  writable = _writable(model, fused, None)
  return {tensor.name: tensor.fetch() for tensor in writable}


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
  source = _InMemory(given)
  return _filled(source, cfg.frozen(), fused, _placing(None), "the weights")


class _InMemory:
  """Tensors in a dictionary."""

  def __init__(self, tensors: Arrays):
    self.tensors = tensors

  def read(self, name: str, index: files.Index) -> files.Array:
    return self.tensors[name][index]


def _filled(
  source: _Source, cfg: ModelConfig, fused: bool, placing: Shardings, name: str
) -> Transformer:
  """The model with parameters from a source."""
  model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model, nnx.Param)
  params = {
    path: variable.get_value() for path, variable in nnx.to_flat_state(state)
  }
  wanted = list(tensors_of(cfg, fused=fused))
  found = _match(source, wanted, cfg, name)
  _check_shapes(source, wanted, found, params)
  filled: dict[ParamPath, Array] = {}
  for tensor in tqdm(
    wanted, desc="loading", unit="tensor", delay=_QUIET_SECONDS
  ):
    start = 0
    for part in tensor.parts:
      shape = params[part.path].shape
      sharding = placing("/".join(map(str, part.path)), shape)
      layer_shape = _stored_shape(part, tensor, shape)
      array = jax.make_array_from_callback(
        layer_shape,
        _stored_sharding(part, tensor, sharding, len(shape)),
        _rows_reader(source, found[tensor.name], start, layer_shape),
      )
      start += layer_shape[0]
      old = filled.get(part.path)
      if part.layer is not None and old is None:
        old = _zeros(shape, params[part.path].dtype, sharding)()
      put = _putter(
        sharding, params[part.path].dtype, tensor.transposed, old is not None
      )
      # Dispatch must not run ahead: what waits is held by the host.
      filled[part.path] = jax.block_until_ready(put(old, array, part.layer))
  leaves = [(path, nnx.Param(filled[path])) for path in params]
  flat = nnx.FlatState(leaves, sort=False)
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _match(
  source: _Source, wanted: Sequence[Tensor], cfg: ModelConfig, where: str
) -> dict[str, str]:
  """The name in the source of each wanted tensor.

  Names begin with "model." usually, with more where the model holds more than
  text, and with nothing where the head was left out.
  """
  names = [name for name in source.tensors if name.endswith(EMBED)]
  if len(names) != 1:
    raise InteropError(
      f"{where} must have one tensor that ends in {EMBED!r}, found {names}"
    )
  prefix = names[0].removesuffix(EMBED)
  found = {}
  for tensor in wanted:
    options = [prefix + tensor.name.removeprefix("model.")]
    if tensor.name == HEAD:
      options = [HEAD, prefix.removesuffix("model.") + HEAD]
    name = next((n for n in options if n in source.tensors), None)
    if name is None:
      hint = ""
      if tensor.name == HEAD:
        hint = " (set tie_word_embeddings if the head is the embedding)"
      raise InteropError(
        f"{where} lack {options[0]!r}, which the configuration asks for{hint}"
      )
    found[tensor.name] = name
  left = set(source.tensors) - set(found.values())
  # A tied head may be stored again.
  unused = {n for n in left if not n.endswith(_COMPUTED)}
  if cfg.tie_embeddings:
    unused = {n for n in unused if not n.endswith(HEAD)}
  # Of a model with more than text, the rest is left where it is.
  elsewhere = {n for n in unused if not n.startswith(prefix)}
  if prefix not in ("", "model.") and elsewhere:
    logging.info("%s: %d tensors are not of the text", where, len(elsewhere))
    unused -= elsewhere
  if unused:
    raise InteropError(
      f"the configuration has no place for {len(unused)} of the tensors in "
      f"{where}: {sorted(unused)[:5]}"
    )
  return found


def _check_shapes(
  source: _Source,
  wanted: Sequence[Tensor],
  found: Mapping[str, str],
  params: Mapping[ParamPath, Any],
) -> None:
  for tensor in wanted:
    shapes = [
      _stored_shape(part, tensor, params[part.path].shape)
      for part in tensor.parts
    ]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    stored = tuple(source.tensors[found[tensor.name]].shape)
    if stored != shape:
      raise InteropError(
        f"{found[tensor.name]!r} has shape {stored}, the configuration {shape}"
      )


def _stored_shape(
  part: Part, tensor: Tensor, shape: tuple[int, ...]
) -> tuple[int, ...]:
  layer = shape if part.layer is None else shape[1:]
  return layer[::-1] if tensor.transposed else layer


def _rows_reader(
  source: _Source, name: str, start: int, shape: tuple[int, ...]
) -> Callable[[Any], files.Array]:
  """Reads a part of the rows that begin at `start`."""

  def read(index: files.Index) -> files.Array:
    rows, *rest = (
      slice(*s.indices(size)) for s, size in zip(index, shape, strict=True)
    )
    rows = slice(rows.start + start, rows.stop + start)
    return source.read(name, (rows, *rest))

  return read


def _placing(shardings: Sharding | Shardings | None) -> Shardings:
  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(shardings, Sharding):
    chosen = shardings
    return lambda path, shape: chosen
  return shardings


def _stored_sharding(
  part: Part, tensor: Tensor, sharding: Sharding, rank: int
) -> Sharding:
  """That of a tensor as stored, from that of its parameter."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  spec = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
  if part.layer is not None:
    spec = spec[1:]
  if tensor.transposed:
    spec = spec[::-1]
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@functools.cache
def _zeros(
  shape: tuple[int, ...], dtype: Any, sharding: Sharding
) -> Callable[[], Array]:
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _putter(
  sharding: Sharding, dtype: Any, transposed: bool, stacked: bool
) -> Callable[[Array | None, Array, Any], Array]:
  """`put(stack, tensor, layer)`, in place; without a stack the tensor alone."""

  def ours(x: Array) -> Array:
    # A copy at any rate: what comes in may be the file's own memory.
    return jnp.array(x.T if transposed else x, dtype, copy=True)

  if not stacked:
    convert = jax.jit(ours, out_shardings=sharding)
    return lambda stack, x, layer: convert(x)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
  def put(stack: Array, x: Array, layer: Any) -> Array:
    return lax.dynamic_update_index_in_dim(stack, ours(x), layer, 0)

  return put


def _writable(
  model: Transformer, fused: bool, dtype: str | None
) -> Iterator[files.Writable]:
  """The tensors of a model, fetched one by one."""
  params = {
    path: variable[...]
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  }
  adapters = adapters_of(model)
  for tensor in tensors_of(model.cfg, fused=fused):
    shapes = [
      _stored_shape(part, tensor, params[part.path].shape)
      for part in tensor.parts
    ]

    kind = dtype or params[tensor.parts[0].path].dtype.name

    def fetch(tensor: Tensor = tensor, kind: str = kind) -> files.Array:
      parts = [
        _fetched(
          params[part.path],
          part.layer,
          tensor.transposed,
          kind,
          adapters.get(part.path),
        )
        for part in tensor.parts
      ]
      return parts[0] if len(parts) == 1 else np.concatenate(parts)

    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    yield files.Writable(tensor.name, shape, kind, fetch)


def _fetched(
  param: Array,
  layer: int | None,
  transposed: bool,
  dtype: str,
  adapter: Adapter | None,
) -> files.Array:
  everywhere = None
  sharding = getattr(param, "sharding", None)
  if isinstance(sharding, NamedSharding):
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
  take = _taker(layer is not None, transposed, dtype, everywhere)
  return np.asarray(take(param, layer or 0, adapter))


@functools.cache
def _taker(
  stacked: bool, transposed: bool, dtype: str, sharding: Sharding | None
) -> Callable[[Array, Any, Adapter | None], Array]:
  @functools.partial(jax.jit, out_shardings=sharding)
  def take(param: Array, layer: Any, adapter: Adapter | None) -> Array:
    if stacked:
      param = lax.dynamic_index_in_dim(param, layer, keepdims=False)
    if adapter is not None:
      param = layer_of(adapter, layer).merged(param)
    return (param.T if transposed else param).astype(dtype)

  return take
