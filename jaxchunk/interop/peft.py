"""Adapters in the format of PEFT: `adapter_config.json` and safetensors.

Neither torch nor PEFT is needed.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxchunk.data.cache import read_json, write_json
from jaxchunk.interop import safetensors_files as files
from jaxchunk.interop.architectures import architecture_of, text_part
from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.hugging_face import CONFIG, read_config
from jaxchunk.interop.names import LINEARS
from jaxchunk.models.adapters import add_lora, flat_arrays, model_of
from jaxchunk.models.lora import LoRA
from jaxchunk.models.transformer import Transformer

_ADAPTERS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers"
_NAME = re.compile(
  r"base_model\.model\.(?:.*\.)?layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\."
  r"(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_FIELDS = {"lora_A.weight": "a", "lora_B.weight": "b"}
# Fields of adapter_config.json that are read, or change nothing here. Any other
# that is set means something that is not computed here.
_KNOWN = """
auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
eva_config exclude_modules inference_mode init_lora_weights layers_pattern
lora_alpha lora_dropout megatron_core peft_type peft_version qalora_group_size
r revision runtime_config target_modules task_type use_dora use_rslora
"""
# Other ways to begin, such as "pissa", change the matrices beside the adapters.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
# Our name of a matrix by that of its module: "q" by "q_proj".
_MODULES = {name.split(".")[-1]: ours[0] for ours, name in LINEARS.items()}


def save_peft(model: Transformer, path: str | Path, *, base: str = "") -> None:
  """Saves a model's adapters for PEFT.

  Args:
    model: With adapters.
    path: A folder, made if need be; adapters in it are replaced.
    base: Name or path of the model that they were trained beside.

  Raises:
    InteropError: The model has no adapters, or `base` is a folder of an
      architecture that publishes several of the matrices as one.
  """
  lora = model.cfg.lora
  if lora is None:
    raise InteropError(
      "the model has no adapters to save for PEFT; save_hf saves whole models"
    )
  if base and (Path(base).expanduser() / CONFIG).is_file():
    architecture = architecture_of(
      text_part(read_config(Path(base).expanduser()))
    )
    if architecture.fused:
      raise InteropError(
        f"{architecture.name} has q, k, v in one matrix, and gate, up: "
        "adapters of each cannot be written for PEFT. Save the merged model "
        "with save_hf"
      )
  path = Path(path).expanduser()
  path.mkdir(parents=True, exist_ok=True)
  arrays = flat_arrays(nnx.state(model, nnx.LoRAParam))
  modules = {ours[0]: name for ours, name in LINEARS.items()}
  writable = []
  period = len(model.blocks)
  for (_, position, name, _, kind), stack in sorted(arrays.items()):
    suffix = {"a": "lora_A.weight", "b": "lora_B.weight"}.get(
      kind, "lora_magnitude_vector"
    )
    for layer, array in enumerate(np.asarray(stack)):
      number = layer * period + position
      tensor = f"{_PREFIX}.{number}.{modules[name]}.{suffix}"
      fetch = functools.partial(np.transpose, array)
      shape = array.shape[::-1]
      writable.append(files.Writable(tensor, shape, array.dtype.name, fetch))
  values = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "lora_dropout": 0.0,
    "target_modules": [modules[n].split(".")[-1] for n in lora.targets],
    "use_rslora": lora.rank_stabilized,
    "use_dora": lora.dora,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  files.write_file(path / _WEIGHTS, writable)
  write_json(path / _ADAPTERS, values)


def load_peft(model: Transformer, path: str | Path) -> Transformer:
  """The model with the adapters that a folder of PEFT holds.

  Args:
    model: What they were trained beside, without adapters.
    path: A folder with `adapter_config.json` and
      `adapter_model.safetensors`.

  Returns:
    The model with adapters, in fp32.

  Raises:
    InteropError: They are of a kind that is not known here, or do not fit the
      model. Names what.
  """
  path = Path(path).expanduser()
  values = _read_config(path)
  if model.cfg.lora is not None:
    raise InteropError("the model has adapters already; merge_lora first")
  reader = files.Reader(path / _WEIGHTS)
  stored = {name: _parse(name) for name in reader.tensors}
  found = {module for _, module, _ in stored.values()}
  try:
    lora = LoRA(
      rank=values["r"],
      alpha=float(values["lora_alpha"]),
      targets=tuple(name for name in _MODULES.values() if name in found),
      rank_stabilized=bool(values.get("use_rslora")),
      dora=bool(values.get("use_dora")),
    )
  except (TypeError, ValueError) as error:
    raise InteropError(f"{path / _ADAPTERS}: {error}") from error
  empty = jax.eval_shape(lambda: add_lora(model, lora))
  arrays = flat_arrays(nnx.state(model))
  shapes = {
    location: variable.get_value()
    for location, variable in nnx.to_flat_state(nnx.state(empty, nnx.LoRAParam))
  }
  stacks = {
    location: np.zeros(leaf.shape, leaf.dtype)
    for location, leaf in shapes.items()
  }
  filled = {location: 0 for location in shapes}
  period = len(model.blocks)
  for name, (number, module, kind) in stored.items():
    layer, position = divmod(number, period)
    location = ("blocks", position, module, "adapter", kind)
    array = reader.read(name, (slice(None),) * len(reader.tensors[name].shape))
    array = array.reshape(-1) if kind == "magnitude" else array.T
    stack = stacks[location]
    if layer >= len(stack) or array.shape != stack.shape[1:]:
      raise InteropError(
        f"{path / _WEIGHTS}: {name!r} of shape {array.shape[::-1]} does not "
        f"fit the model's {stack.shape[:0:-1]}, {model.cfg.num_layers} layers"
      )
    stack[layer] = array
    filled[location] += 1
  if lacking := [p for p in shapes if filled[p] != len(stacks[p])]:
    raise InteropError(
      f"{path / _WEIGHTS} lacks adapters of some layers: "
      f"{['/'.join(map(str, p)) for p in lacking][:3]}"
    )
  arrays |= {p: jnp.asarray(stack) for p, stack in stacks.items()}
  return model_of(empty.cfg, arrays)


def _read_config(path: Path) -> Mapping[str, Any]:
  file = path / _ADAPTERS
  if not file.is_file():
    raise InteropError(
      f"{path} has no {_ADAPTERS}; name a folder as save_pretrained of PEFT "
      "writes it"
    )
  try:
    values = read_json(file)
  except ValueError as error:
    raise InteropError(str(error)) from error
  kind = values.get("peft_type")
  if kind != "LORA":
    raise InteropError(f"{file} has peft_type={kind!r}; jaxchunk reads 'LORA'")
  for name, value in values.items():
    if value and name not in _KNOWN.split():
      raise InteropError(f"{file} has {name}={value!r}: not supported")
  for name, known in (("bias", (None, "none")), ("init_lora_weights", _INITS)):
    if values.get(name) not in known:
      raise InteropError(f"{file} has {name}={values[name]!r}: not supported")
  for name in ("r", "lora_alpha"):
    if name not in values:
      raise InteropError(f"{file} lacks {name!r}")
  return dict(values)


def _parse(name: str) -> tuple[int, str, str]:
  """Layer, our matrix and field of a tensor."""
  match = _NAME.fullmatch(name)
  if match is None or match[2] not in _MODULES:
    raise InteropError(
      f"adapter tensor {name!r} is of no matrix that jaxchunk has: "
      f"{list(_MODULES)}"
    )
  kind = _FIELDS.get(match[3], "magnitude")
  return int(match[1]), _MODULES[match[2]], kind
