"""The architectures of transformers that are known, and what each leaves out.

Sources: the configuration classes of transformers 5.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.names import ExpertNames
from jaxchunk.interop.ropes import KINDS
from jaxchunk.interop.windows import WindowRule
from jaxchunk.models import families
from jaxchunk.models.config import ModelConfig

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """A class of transformers.

  Attributes:
    name: Of the class.
    model_type: Its `model_type`.
    family: Makes a configuration with all that is fixed in the family.
    defaults: Fields that `config.json` may leave out, and their values then.
    windows: Which layers have one.
    own_scores: Whether it has soft-caps and a scale of scores of its own.
    fused: Whether q, k, v are published as one matrix, and gate, up.
    experts: How experts are named; `None` where there are none.
    ropes: The kinds of scaled rotary embedding that it takes.
    partial_rope: Whether a part of a head may stay unrotated.
  """

  name: str
  model_type: str
  family: Callable[..., ModelConfig]
  defaults: Json
  windows: WindowRule = "none"
  own_scores: bool = False
  fused: bool = False
  experts: ExpertNames | None = None
  ropes: tuple[str, ...] = KINDS
  partial_rope: bool = False


_LLAMA = {"hidden_act": "silu", "rope_theta": 10_000.0, "rms_norm_eps": 1e-6}
_QWEN = _LLAMA | {"sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "max_position_embeddings": 8192,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "tie_word_embeddings": True,
}
_GEMMA2 = _GEMMA | {
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "sliding_window_pattern": 2,
}
# The text part of Gemma 3 is published with what differs from these only.
_GEMMA3 = _GEMMA2 | {
  "vocab_size": 262_208,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "max_position_embeddings": 131_072,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "sliding_window_pattern": 6,
  "rope_theta": 1_000_000.0,
  "rope_local_base_freq": 10_000.0,
}

# In the order in which one is looked for that can express a configuration.
ARCHITECTURES = (
  Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    family=families.llama2,
    defaults=_LLAMA,
  ),
  Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    family=families.qwen2,
    defaults=_QWEN,
    windows="upper",
  ),
  Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    family=families.qwen3,
    defaults=_QWEN | {"head_dim": 128},
    windows="upper",
  ),
  Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    family=families.mistral,
    defaults=_LLAMA | {"sliding_window": 4096},
    windows="every",
  ),
  Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    family=families.mixtral,
    defaults=_LLAMA
    | {
      "rope_theta": 1_000_000.0,
      "rms_norm_eps": 1e-5,
      "num_key_value_heads": 8,
      "num_local_experts": 8,
      "num_experts_per_tok": 2,
    },
    windows="every",
    experts="mixtral",
  ),
  Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    family=families.qwen3_moe,
    defaults=_LLAMA
    | {
      "sliding_window": 4096,
      "num_key_value_heads": 4,
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "moe_intermediate_size": 768,
      "norm_topk_prob": False,
      "decoder_sparse_step": 1,
    },
    windows="switched",
    experts="qwen3",
  ),
  Architecture(
    name="Phi3ForCausalLM",
    model_type="phi3",
    family=families.phi3,
    defaults=_LLAMA | {"rms_norm_eps": 1e-5},
    windows="every",
    fused=True,
    ropes=("default", "longrope"),
    partial_rope=True,
  ),
  Architecture(
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    family=families.olmo2,
    defaults=_LLAMA | {"rms_norm_eps": 1e-5},
  ),
  Architecture(
    name="GemmaForCausalLM",
    model_type="gemma",
    family=families.gemma,
    defaults=_GEMMA,
  ),
  Architecture(
    name="Gemma2ForCausalLM",
    model_type="gemma2",
    family=families.gemma2,
    defaults=_GEMMA2,
    windows="periodic",
    own_scores=True,
  ),
  Architecture(
    name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    family=families.gemma3,
    defaults=_GEMMA3,
    windows="periodic",
    own_scores=True,
  ),
)
_BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
# What holds more than a text model, of which the text model is read.
_HOLDERS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}


def architecture_of(values: Json) -> Architecture:
  """The architecture that a `config.json` names.

  Raises:
    InteropError: It names none, or one that is not known.
  """
  names = values.get("architectures") or []
  if len(names) != 1:
    found = [
      a for a in ARCHITECTURES if a.model_type == values.get("model_type")
    ]
    if found and not names:
      return found[0]
    raise InteropError(
      f"config.json has architectures={names}; it must name one of "
      f"{sorted(_BY_NAME)}"
    )
  return architecture_named(names[0])


def architecture_named(name: str) -> Architecture:
  """The architecture of that name.

  Raises:
    InteropError: It is not known; names the nearest.
  """
  name = _HOLDERS.get(name, name)
  if name not in _BY_NAME:
    near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.0)[0]
    raise InteropError(
      f"architecture {name!r} is not known; jaxchunk knows {sorted(_BY_NAME)} "
      f"(the nearest name is {near})"
    )
  return _BY_NAME[name]


def text_part(values: Json) -> Json:
  """The fields of the language model, of a model with more than text too."""
  text = values.get("text_config")
  if text is None:
    return values
  of_all = ("architectures", "dtype", "torch_dtype")
  ids = ("bos_token_id", "eos_token_id", "pad_token_id")
  return {
    **{n: values[n] for n in ids if n in values},
    **text,
    **{n: values[n] for n in of_all if n in values},
  }
