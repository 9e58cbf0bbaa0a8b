"""Parameters from tensors of a published checkpoint, and to them, one by one.

A tensor goes from its source straight to its place on the devices, and back:
no more than one is in host memory beside the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array
from tqdm import tqdm

from jaxchunk.interop import safetensors_files as files
from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.names import EMBED, HEAD, ExpertNames, Part, Tensor
from jaxchunk.interop.names import Path as ParamPath
from jaxchunk.interop.names import tensors as tensors_of
from jaxchunk.models.adapters import (
  adapters_of,
  matrices_of,
  merged,
  model_of,
  quantized_arrays,
)
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.lora import Adapter
from jaxchunk.models.quantized import (
  Matrix,
  Quantization,
  Quantized,
  quantized,
)
from jaxchunk.models.transformer import Transformer, layer_of

Shardings = Callable[[str, tuple[int, ...]], Sharding]

_QUIET_SECONDS = 3.0
# Computed from the configuration wherever they are stored.
_COMPUTED = "rotary_emb.inv_freq"


class Source(Protocol):
  """Tensors by name."""

  @property
  def tensors(self) -> Mapping[str, Any]:
    """What has a `shape`."""
    ...

  def read(self, name: str, index: files.Index) -> files.Array:
    """A part of a tensor."""
    ...


def filled_model(
  source: Source,
  cfg: ModelConfig,
  *,
  fused: bool,
  experts: ExpertNames | None = None,
  shardings: Sharding | Shardings | None = None,
  name: str,
) -> Transformer:
  """The model with parameters from a source.

  Args:
    source: The tensors.
    cfg: The frozen configuration.
    fused: As in `names.tensors`.
    experts: Likewise.
    shardings: As in `load_hf`.
    name: What to call the source in a message.

  Raises:
    InteropError: A tensor is missing, left over or of another shape.
  """
  placing = _placing(shardings)
  plain = dataclasses.replace(cfg, quantization=None).frozen()
  model = jax.eval_shape(lambda: Transformer(plain, rngs=nnx.Rngs(0)))
  state = nnx.state(model, nnx.Param)
  params = {
    path: variable.get_value() for path, variable in nnx.to_flat_state(state)
  }
  wanted = list(tensors_of(cfg, fused=fused, experts=experts))
  found = _match(source, wanted, cfg, name)
  _check_shapes(source, wanted, found, params)
  filled: dict[ParamPath, Any] = {}
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
      stored = _Stored(
        params[part.path].dtype,
        tensor.transposed,
        cfg.quantization if part.path[-1] == "kernel" else None,
      )
      old = filled.get(part.path)
      if part.index and old is None:
        old = _zeros(shape, len(part.index), stored, sharding)()
      put = _putter(sharding, stored, old is not None)
      # Dispatch must not run ahead: what waits is held by the host.
      filled[part.path] = jax.block_until_ready(put(old, array, part.index))
  arrays: dict[ParamPath, Array] = {}
  for path, matrix in filled.items():
    if isinstance(matrix, Quantized):
      arrays |= quantized_arrays(path, matrix)
    else:
      arrays[path] = matrix
  return model_of(cfg, arrays)


def _match(
  source: Source, wanted: Sequence[Tensor], cfg: ModelConfig, where: str
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
  source: Source,
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
  own = shape[len(part.index) :]
  return own[::-1] if tensor.transposed else own


def _rows_reader(
  source: Source, name: str, start: int, shape: tuple[int, ...]
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
  spec = spec[len(part.index) :]
  if tensor.transposed:
    spec = spec[::-1]
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


class _Stored(NamedTuple):
  """How a tensor becomes a parameter."""

  dtype: Any
  transposed: bool
  quantization: Quantization | None

  def parameter(self, x: Array) -> Matrix:
    """The parameter, or one layer of it."""
    # A copy at any rate: what comes in may be the file's own memory.
    x = x.T if self.transposed else x
    return self.held(jnp.array(x, self.dtype, copy=True))

  def held(self, x: Array) -> Matrix:
    """A parameter as it is held."""
    if self.quantization is None:
      return x
    return quantized(x, self.quantization)


@functools.cache
def _zeros(
  shape: tuple[int, ...], stacked: int, stored: _Stored, sharding: Sharding
) -> Callable[[], Matrix]:
  """Room for what is stacked along the first axes."""
  own = jax.ShapeDtypeStruct(shape[stacked:], stored.dtype)
  one = jax.eval_shape(stored.held, own)

  def zeros() -> Matrix:
    return jax.tree.map(
      lambda a: jnp.zeros((*shape[:stacked], *a.shape), a.dtype), one
    )

  return jax.jit(zeros, out_shardings=sharding)


@functools.cache
def _putter(
  sharding: Sharding, stored: _Stored, stacked: bool
) -> Callable[[Matrix | None, Array, Any], Matrix]:
  """`put(stack, tensor, index)`, in place; without a stack the tensor alone."""
  if not stacked:
    convert = jax.jit(stored.parameter, out_shardings=sharding)
    return lambda stack, x, index: convert(x)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
  def put(stack: Matrix, x: Array, index: tuple[Any, ...]) -> Matrix:
    def write(old: Array, new: Array) -> Array:
      at = [jnp.asarray(n, jnp.int32) for n in (*index, *[0] * new.ndim)]
      new = new.reshape(*[1] * len(index), *new.shape)
      return lax.dynamic_update_slice(old, new, at)

    return jax.tree.map(write, stack, stored.parameter(x))

  return put


def writable(
  model: Transformer,
  *,
  fused: bool,
  experts: ExpertNames | None = None,
  dtype: str | None = None,
) -> Iterator[files.Writable]:
  """The tensors of a model, fetched one by one; adapters are merged in.

  Args:
    model: The model.
    fused: As in `names.tensors`.
    experts: Likewise.
    dtype: Of the tensors; by default that of each parameter.
  """
  params: dict[ParamPath, Matrix] = {
    path: variable[...]
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
  } | matrices_of(model)
  adapters = adapters_of(model)
  for tensor in tensors_of(model.cfg, fused=fused, experts=experts):
    shapes = [
      _stored_shape(part, tensor, params[part.path].shape)
      for part in tensor.parts
    ]

    kind = dtype or model.cfg.param_dtype

    def fetch(tensor: Tensor = tensor, kind: str = kind) -> files.Array:
      parts = [
        _fetched(
          params[part.path],
          part.index,
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
  param: Matrix,
  index: tuple[int, ...],
  transposed: bool,
  dtype: str,
  adapter: Adapter | None,
) -> files.Array:
  everywhere = None
  sharding = getattr(jax.tree.leaves(param)[0], "sharding", None)
  if isinstance(sharding, NamedSharding):
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
  take = _taker(transposed, dtype, everywhere)
  return np.asarray(take(param, index, adapter))


@functools.cache
def _taker(
  transposed: bool, dtype: str, sharding: Sharding | None
) -> Callable[[Matrix, tuple[int, ...], Adapter | None], Array]:
  @functools.partial(jax.jit, out_shardings=sharding)
  def take(
    param: Matrix, index: tuple[Any, ...], adapter: Adapter | None
  ) -> Array:
    for n in index:
      param, adapter = layer_of((param, adapter), n)
    array = merged(adapter, param, dtype)
    return array.T if transposed else array

  return take
