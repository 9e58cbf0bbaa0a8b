"""Folders of safetensors files, read and written tensor by tensor.

The format's own library checks a file; then the file is mapped, and the host
holds no copy of its own (the library would hold two). Writing holds one
tensor. No other format is read: unpickling a file runs what is in it.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from jaxchunk.data.cache import atomic_write, write_json
from jaxchunk.interop.errors import InteropError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
}
_NAMES = {ours: theirs for theirs, ours in _DTYPES.items()}

Array = Shaped[np.ndarray, "..."]
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file.

  Attributes:
    file: The file's path.
    shape: Its shape.
    dtype: Its dtype's name here, "bfloat16".
    offset: Of its first byte in the file.
  """

  file: Path
  shape: tuple[int, ...]
  dtype: str
  offset: int


class Reader:
  """The tensors of a folder with `*.safetensors`, or of one such file.

  Attributes:
    tensors: By name.

  Raises:
    InteropError: There is no such file, one is truncated or corrupt, or a
      dtype is not known. Names the file.
  """

  def __init__(self, path: Path):
    listed = _listed(path)
    self.tensors: dict[str, Stored] = {}
    for file in sorted(set(listed.values())) or _files(path):
      for name, stored in _read_header(file).items():
        if name in self.tensors:
          other = self.tensors[name].file
          raise InteropError(f"tensor {name!r} is in {other} and in {file}")
        self.tensors[name] = stored
    if missing := sorted(set(listed) - set(self.tensors)):
      raise InteropError(
        f"{path / INDEX} lists tensors that are in no file: {missing[:5]}"
      )

  def read(self, name: str, index: Index) -> Array:
    """A part of a tensor: a view of the mapped file, read when it is used."""
    stored = self.tensors[name]
    if 0 in stored.shape:
      return np.zeros(stored.shape, jnp.dtype(stored.dtype))[index]
    try:
      mapped = np.memmap(
        stored.file,
        jnp.dtype(stored.dtype),
        mode="r",
        offset=stored.offset,
        shape=stored.shape,
      )
      return np.asarray(mapped[index])
    except (OSError, ValueError) as error:
      raise InteropError(f"{stored.file}: {name!r}: {error}") from error


def _read_header(file: Path) -> dict[str, Stored]:
  """The tensors of a file that has been checked."""
  try:
    # Lengths and offsets, against each other and the size of the file.
    with safetensors.safe_open(file, framework="numpy"):
      pass
    with file.open("rb") as raw:
      size = int.from_bytes(raw.read(8), "little")
      header = json.loads(raw.read(size))
  except FileNotFoundError:
    raise InteropError(
      f"{file} is not there, but {INDEX} lists it; download it again"
    ) from None
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise InteropError(
      f"{file} is truncated or corrupt ({error}); download it again"
    ) from error
  header.pop("__metadata__", None)
  for name, tensor in header.items():
    if tensor["dtype"] not in _DTYPES:
      raise InteropError(
        f"{file}: tensor {name!r} has dtype {tensor['dtype']}; jaxchunk reads "
        f"{sorted(_DTYPES)}"
      )
  return {
    name: Stored(
      file,
      tuple(tensor["shape"]),
      _DTYPES[tensor["dtype"]],
      8 + size + tensor["data_offsets"][0],
    )
    for name, tensor in header.items()
  }


def _listed(path: Path) -> dict[str, Path]:
  """The file of each tensor by the folder's index, if it has one."""
  index = path / INDEX
  if not index.is_file():
    return {}
  try:
    names = json.loads(index.read_text())["weight_map"]
    return {name: path / file for name, file in names.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InteropError(
      f"{index} is not an index of tensors ({error})"
    ) from None


def _files(path: Path) -> list[Path]:
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise InteropError(f"there is no folder {path}")
  if files := sorted(path.glob("*.safetensors")):
    return files
  pickles = [file.name for kind in _PICKLES for file in path.glob(kind)]
  if pickles:
    raise InteropError(
      f"{path} has no *.safetensors, only {sorted(pickles)[:3]}, which are "
      "pickles: reading one runs what is in it. Convert it with "
      "save_pretrained(..., safe_serialization=True) of transformers"
    )
  raise InteropError(f"{path} has no *.safetensors")


@dataclasses.dataclass(frozen=True)
class Writable:
  """A tensor to write.

  Attributes:
    name: Its name.
    shape: Its shape.
    dtype: Its dtype's name.
    fetch: Gives the tensor when it is its turn.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  fetch: Callable[[], Array]

  @property
  def nbytes(self) -> int:
    """Its size in bytes."""
    return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize


def write(
  folder: Path, tensors: Sequence[Writable], max_shard_bytes: int
) -> list[str]:
  """Writes `model.safetensors`, or shards of it and their index.

  The host holds one tensor at a time. The files take their names when all are
  complete, the index last.

  Args:
    folder: Exists.
    tensors: In the order of the files.
    max_shard_bytes: Largest size of a file, unless one tensor is larger.

  Returns:
    The names of the files.
  """
  shards: list[list[Writable]] = [[]]
  for tensor in tensors:
    size = sum(other.nbytes for other in shards[-1])
    if shards[-1] and size + tensor.nbytes > max_shard_bytes:
      shards.append([])
    shards[-1].append(tensor)
  if len(shards) == 1:
    write_file(folder / _SINGLE, shards[0])
    return [_SINGLE]
  weight_map: dict[str, str] = {}
  names: list[str] = []
  for number, shard in enumerate(shards, 1):
    name = f"model-{number:05}-of-{len(shards):05}.safetensors"
    names.append(name)
    weight_map |= {tensor.name: name for tensor in shard}
  try:
    for name, shard in zip(names, shards, strict=True):
      write_file(folder / f".{name}", shard)
    for name in names:
      (folder / f".{name}").replace(folder / name)
  finally:
    for name in names:
      (folder / f".{name}").unlink(missing_ok=True)
  total = sum(tensor.nbytes for tensor in tensors)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(folder / INDEX, index)
  return [*sorted(set(weight_map.values())), INDEX]


def write_file(path: Path, tensors: Sequence[Writable]) -> None:
  """Writes one file: a length, a JSON header and the bytes, end to end."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  start = 0
  for tensor in tensors:
    if tensor.dtype not in _NAMES:
      raise InteropError(
        f"{tensor.name} has dtype {tensor.dtype}; "
        f"published are {sorted(_NAMES)}"
      )
    end = start + tensor.nbytes
    header[tensor.name] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [start, end],
    }
    start = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with atomic_write(path) as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
      array = np.ascontiguousarray(tensor.fetch())
      if (array.shape, array.dtype.name) != (tensor.shape, tensor.dtype):
        raise ValueError(
          f"{tensor.name} is {array.dtype.name}{array.shape}, not "
          f"{tensor.dtype}{tensor.shape}"
        )
      file.write(array.reshape(-1).view(np.uint8).data)
