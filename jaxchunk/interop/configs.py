"""`config.json` of Hugging Face to a `ModelConfig`, and back.

What a checkpoint computes must not be guessed: an architecture, a kind of
rotary embedding or a feature that is not known here is an error that names
it. Writing is checked by reading: of the architectures, the first whose
`config.json` means the same configuration is taken.

Sources: the configuration classes of transformers 5 and the `config.json` of
the published checkpoints.
"""

import dataclasses
import math
from typing import Any

from absl import logging

from jaxchunk.interop.architectures import (
  ARCHITECTURES,
  Architecture,
  Json,
  architecture_named,
  architecture_of,
  text_part,
)
from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.ropes import read_rope, rope_fields, rope_kind
from jaxchunk.interop.windows import (
  read_windows,
  shortest_pattern,
  window_fields,
)
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.moe import MoE
from jaxchunk.models.rope import (
  DynamicNtkScaling,
  Llama3Scaling,
  LongRopeScaling,
  Rope,
  YarnScaling,
)

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
}
_SIZES = {
  "vocab_size": "vocab_size",
  "d_model": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "d_ff": "intermediate_size",
  "norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
  "context_length": "max_position_embeddings",
}
# Fields of a ModelConfig that say how it is used, not what it computes.
_USE = (
  "dtype",
  "param_dtype",
  "dropout",
  "context_length",
  "lora",
  "quantization",
)
# What may be true of an architecture and is not of our model.
_REFUSED = {
  "attention_bias": "biases on attention's output",
  "mlp_bias": "biases in the MLP",
  "use_bidirectional_attention": "attention to later tokens",
  "quantization_config": "quantized weights",
  "no_rope_layers": "layers without rotary embedding",
  "num_local_experts": "a mixture of experts",
  "num_experts": "a mixture of experts",
  "mlp_only_layers": "a model in which only some layers have experts",
}
_EXPERT_COUNTS = ("num_local_experts", "num_experts")
# Of training, of generation, of files, or read elsewhere.
_KNOWN = """
_attn_implementation _name_or_path _sliding_window_pattern architectures
attention_dropout attn_implementation auto_map bos_token_id
cache_implementation chunk_size_feed_forward decoder_sparse_step dtype
embd_pdrop eos_token_id
hidden_act hidden_activation id2label initializer_range is_encoder_decoder
label2id layer_types max_window_layers model_type moe_intermediate_size
norm_topk_prob num_experts_per_tok output_attentions
original_max_position_embeddings output_hidden_states output_router_logits
pad_token_id
partial_rotary_factor pretraining_tp problem_type resid_pdrop return_dict
rope_interleaved rope_local_base_freq rope_parameters rope_scaling rope_theta
router_aux_loss_coef sliding_window sliding_window_pattern tokenizer_class
torch_dtype transformers_version unk_token_id unsloth_fixed unsloth_version
use_cache use_sliding_window
"""


def config_from_hf(
  values: Json, *, context_length: int | None = None
) -> ModelConfig:
  """The configuration that a `config.json` means.

  Args:
    values: The contents of `config.json`.
    context_length: Of the longest sequence to come, for rotary embeddings
      that depend on it ("longrope", "dynamic"); by default the published
      `max_position_embeddings`.

  Returns:
    A configuration that may still be changed.

  Raises:
    InteropError: The architecture or a feature is not known, or a field is
      missing. Names it.
  """
  values = text_part(values)
  architecture = architecture_of(values)
  try:
    return _read(values, architecture, context_length)
  except InteropError:
    raise
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise InteropError(
      f"config.json of {architecture.name} has a field that is missing or no "
      f"number ({type(error).__name__}: {error})"
    ) from error


def _read(
  values: Json, architecture: Architecture, context_length: int | None
) -> ModelConfig:
  fields = {**architecture.defaults, **values}
  _refuse(architecture, fields)
  sizes: dict[str, Any] = {
    ours: fields.get(theirs) for ours, theirs in _SIZES.items()
  }
  for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff"):
    if sizes[name] is None:
      raise InteropError(f"config.json lacks {_SIZES[name]!r}")
  sizes["tie_embeddings"] = bool(sizes["tie_embeddings"])
  windows = read_windows(architecture.windows, fields, sizes["num_layers"])
  features: dict[str, Any] = {
    "activation": _activation(architecture, fields),
    "window_pattern": shortest_pattern(windows),
    "rope": read_rope(fields, "full_attention", context_length),
  }
  _check_rope(architecture, features["rope"])
  if architecture.experts is not None:
    features["moe"] = _read_experts(architecture, fields)
  if architecture.own_scores:
    scalar = fields["query_pre_attn_scalar"]
    features |= {
      "attention_softcap": fields["attn_logit_softcapping"],
      "logit_softcap": fields["final_logit_softcapping"],
      "attention_scale": None if scalar == sizes["head_dim"] else scalar**-0.5,
    }
  if architecture.model_type == "gemma3_text":
    local = {"rope_theta": fields["rope_local_base_freq"]}
    if "rope_parameters" in fields:
      local["rope_parameters"] = fields["rope_parameters"]
    features["local_rope"] = read_rope(
      local, "sliding_attention", context_length
    )
  dtype = values.get("dtype") or values.get("torch_dtype")
  if dtype is not None:
    features |= {"dtype": str(dtype), "param_dtype": str(dtype)}
  if context_length is not None:
    sizes["context_length"] = context_length
  cfg = dataclasses.replace(
    _family(architecture, sizes["num_layers"]), **sizes, **features
  )
  try:
    cfg.validate()
  except ValueError as error:
    raise InteropError(f"config.json asks for {error}") from error
  return cfg


def config_to_hf(
  cfg: ModelConfig, architecture: str | None = None
) -> dict[str, Any]:
  """A `config.json` that means a configuration.

  Args:
    cfg: The configuration.
    architecture: A class of transformers; by default the first that can.

  Returns:
    The contents, without ids of special tokens.

  Raises:
    InteropError: The architecture cannot express the configuration; names
      the fields.
  """
  cfg = cfg.frozen()
  wanted: tuple[Architecture, ...] = ARCHITECTURES
  if architecture is not None:
    wanted = (architecture_named(architecture),)
  misfits = {}
  for candidate in wanted:
    try:
      values = _write(cfg, candidate)
      misfit = differing_fields(config_from_hf(values).frozen(), cfg)
    except InteropError as error:
      misfit = [str(error)]
    if not misfit:
      return values
    misfits[candidate.name] = misfit
  name, misfit = min(misfits.items(), key=lambda item: len(item[1]))
  raise InteropError(
    f"no architecture of transformers computes this model: {name} differs in "
    f"{misfit}"
    if architecture is None
    else f"{name} cannot express this model's {misfit}"
  )


def _refuse(architecture: Architecture, fields: Json) -> None:
  own = _EXPERT_COUNTS if architecture.experts else ()
  for name, meaning in _REFUSED.items():
    if fields.get(name) and name not in own:
      raise InteropError(
        f"config.json has {name}={fields[name]!r}: {meaning} is not supported"
      )
  known = {*_SIZES.values(), *_REFUSED, *_KNOWN.split()}
  known |= set(architecture.defaults)
  if unknown := sorted(name for name in set(fields) - known if fields[name]):
    logging.warning("config.json has fields that jaxchunk ignores: %s", unknown)


def _read_experts(architecture: Architecture, fields: Json) -> MoE:
  if architecture.experts == "mixtral":
    return MoE(
      num_experts=fields["num_local_experts"],
      experts_per_token=fields["num_experts_per_tok"],
      d_ff=fields["intermediate_size"],
    )
  if fields["decoder_sparse_step"] != 1:
    raise InteropError(
      f"config.json has decoder_sparse_step={fields['decoder_sparse_step']}: a "
      "model in which only some layers have experts is not supported"
    )
  return MoE(
    # transformers 5 writes the first, and reads both.
    num_experts=fields.get("num_local_experts") or fields["num_experts"],
    experts_per_token=fields["num_experts_per_tok"],
    d_ff=fields["moe_intermediate_size"],
    normalize_top_k=bool(fields["norm_topk_prob"]),
  )


def _expert_fields(
  cfg: ModelConfig, architecture: Architecture
) -> dict[str, Any]:
  moe = cfg.moe
  if moe is None or architecture.experts is None:
    return {}
  values: dict[str, Any] = {
    "num_experts_per_tok": moe.experts_per_token,
  }
  if architecture.experts == "mixtral":
    return values | {
      "num_local_experts": moe.num_experts,
      "intermediate_size": moe.d_ff,
    }
  return values | {
    "num_experts": moe.num_experts,
    "moe_intermediate_size": moe.d_ff,
    "norm_topk_prob": moe.normalize_top_k,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
  }


def _check_rope(architecture: Architecture, rope: Rope) -> None:
  kind = rope_kind(rope)
  if kind not in architecture.ropes:
    raise InteropError(
      f"{architecture.name} has the rotary embedding {kind!r}; it takes "
      f"{list(architecture.ropes)}"
    )
  if rope.fraction != 1 and not architecture.partial_rope:
    raise InteropError(
      f"{architecture.name} has partial_rotary_factor={rope.fraction}, and "
      "turns whole heads"
    )


def _activation(architecture: Architecture, fields: Json) -> str:
  # Gemma 1 was published as "gelu" and means its approximation by tanh.
  if architecture.model_type == "gemma":
    act = fields.get("hidden_act", "gelu_pytorch_tanh")
    act = "gelu_pytorch_tanh" if act == "gelu" else act
  else:
    act = fields.get("hidden_activation") or fields.get("hidden_act")
  if act not in _ACTIVATIONS:
    raise InteropError(
      f"config.json has the activation {act!r}; jaxchunk knows "
      f"{sorted(_ACTIVATIONS)}"
    )
  return _ACTIVATIONS[act]


def _family(architecture: Architecture, num_layers: int) -> ModelConfig:
  """What is fixed in the family; sizes are filled in by the caller."""
  return architecture.family(
    d_model=64, num_layers=num_layers, num_heads=1, d_ff=64
  )


def _write(cfg: ModelConfig, architecture: Architecture) -> dict[str, Any]:
  """A `config.json`, not yet checked to mean the same."""
  act = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  name = "hidden_activation" if architecture.own_scores else "hidden_act"
  values: dict[str, Any] = {
    "architectures": [architecture.name],
    "model_type": architecture.model_type,
    **{theirs: getattr(cfg, ours) for ours, theirs in _SIZES.items()},
    name: act[cfg.activation],
    "torch_dtype": cfg.param_dtype,
    "attention_dropout": 0.0,
    **rope_fields(cfg.rope),
  }
  values["max_position_embeddings"] = _positions(cfg)
  values["rope_theta"] = cfg.rope.theta
  values |= _expert_fields(cfg, architecture)
  values |= window_fields(architecture.windows, _windows(cfg))
  if architecture.own_scores:
    values |= {
      "attn_logit_softcapping": cfg.attention_softcap,
      "final_logit_softcapping": cfg.logit_softcap,
      "query_pre_attn_scalar": _integer(cfg.score_scale**-2),
    }
  if architecture.model_type == "gemma3_text":
    local = cfg.local_rope or cfg.rope
    if local.scaling is not None or local.fraction != 1:
      raise InteropError(f"local_rope={local}")
    values["rope_local_base_freq"] = local.theta
  return values


def _windows(cfg: ModelConfig) -> list[int | None]:
  period = len(cfg.window_pattern)
  return [cfg.window_pattern[n % period] for n in range(cfg.num_layers)]


def _published(rope: Rope) -> Rope:
  """Without the length in use, which transformers takes from each sequence."""
  if isinstance(rope.scaling, DynamicNtkScaling | LongRopeScaling):
    scaling = dataclasses.replace(rope.scaling, length=1)
    return dataclasses.replace(rope, scaling=scaling)
  return rope


def _computed(moe: MoE | None) -> MoE | None:
  """Without what is only of training."""
  if moe is None:
    return None
  return dataclasses.replace(
    moe, capacity_factor=None, balance_loss=0.0, z_loss=0.0
  )


def _positions(cfg: ModelConfig) -> int:
  """`max_position_embeddings`; where nobody says, 8192."""
  scaling = cfg.rope.scaling
  if isinstance(scaling, DynamicNtkScaling):
    # The dynamic base grows from there.
    return scaling.original_length
  if cfg.context_length is not None:
    return cfg.context_length
  if isinstance(scaling, LongRopeScaling):
    return scaling.length
  if isinstance(scaling, YarnScaling | Llama3Scaling):
    return math.floor(scaling.original_length * scaling.factor)
  return 8192


def _integer(number: float) -> int | float:
  """An integer, if it is one but for rounding."""
  nearest = round(number)
  return nearest if math.isclose(number, nearest, rel_tol=1e-12) else number


def differing_fields(read: ModelConfig, cfg: ModelConfig) -> list[str]:
  """Fields, of the second, in which two configurations compute another thing.

  Args:
    read: A frozen configuration.
    cfg: Another.

  Returns:
    `name=value` for each; fields that say only how a model is used are not
    compared.
  """

  def same(name: str) -> bool:
    ours, theirs = getattr(cfg, name), getattr(read, name)
    if name == "attention_scale":
      return math.isclose(cfg.score_scale, read.score_scale, rel_tol=1e-12)
    if name in ("rope", "local_rope"):
      of_windows = name == "local_rope"
      windows = [w for w in cfg.window_pattern if (w is None) != of_windows]
      return all(
        _published(cfg.rope_of(w)) == _published(read.rope_of(w))
        for w in windows
      )
    if name == "window_pattern":
      return shortest_pattern(_windows(cfg)) == shortest_pattern(_windows(read))
    if name == "moe":
      return _computed(ours) == _computed(theirs)
    if name == "d_ff" and cfg.moe is not None:
      return True
    if name == "qk_norm_over" and not cfg.qk_norm:
      return True
    return bool(ours == theirs)

  return [
    f"{field.name}={getattr(cfg, field.name)!r}"
    for field in dataclasses.fields(cfg)
    if field.name not in _USE and not same(field.name)
  ]
