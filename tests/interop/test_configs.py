"""`config.json` means what it says, or is refused by name."""

import dataclasses

import pytest

from jaxchunk.interop.configs import config_from_hf, config_to_hf
from jaxchunk.interop.errors import InteropError
from jaxchunk.models.families import (
  PRESETS,
  gemma,
  gemma2,
  llama2,
  mistral,
  mixtral,
)
from jaxchunk.models.moe import MoE
from jaxchunk.models.rope import (
  DynamicNtkScaling,
  LinearScaling,
  Llama3Scaling,
  LongRopeScaling,
  NtkScaling,
  Rope,
  YarnScaling,
)

pytestmark = pytest.mark.fast

_SIZES = {
  "vocab_size": 64,
  "d_model": 32,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "d_ff": 48,
}


def _llama(**fields):
  """As it was published before there were `rope_parameters`."""
  values = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
  }
  return values | fields


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_model_there_and_back(name):
  cfg = PRESETS[name]
  values = config_to_hf(cfg)
  back = config_from_hf(values).frozen()
  assert dataclasses.replace(back, context_length=None).frozen() == cfg
  assert values["num_hidden_layers"] == cfg.num_layers


@pytest.mark.parametrize(
  "scaling",
  [
    LinearScaling(factor=4.0),
    Llama3Scaling(factor=8.0, original_length=1024),
    YarnScaling(factor=4.0, original_length=1024, beta_fast=8.0),
    YarnScaling(
      factor=4.0, original_length=1024, attention_factor=1.5, truncate=False
    ),
    DynamicNtkScaling(factor=2.0, original_length=1024, length=4096),
    LongRopeScaling(
      short_factors=(1.0, 1.0, 1.5, 2.0),
      long_factors=(1.0, 2.0, 4.0, 8.0),
      original_length=1024,
      length=4096,
      attention_factor=1.25,
    ),
  ],
)
def test_every_rotary_embedding_there_and_back(scaling):
  cfg = llama2(**_SIZES, rope=Rope(theta=1e5, scaling=scaling))
  back = config_from_hf(config_to_hf(cfg), context_length=4096)
  assert back.rope == cfg.rope


def test_the_first_architecture_that_computes_the_same_is_written():
  assert config_to_hf(llama2(**_SIZES))["architectures"] == ["LlamaForCausalLM"]
  windows = mistral(**_SIZES, window=16)
  assert config_to_hf(windows)["architectures"] == ["MistralForCausalLM"]
  # Asked for by name.
  values = config_to_hf(llama2(**_SIZES), "Phi3ForCausalLM")
  assert values["model_type"] == "phi3"


def test_what_no_architecture_computes_is_named():
  cfg = llama2(**_SIZES, logit_softcap=30.0)
  with pytest.raises(InteropError, match=r"no architecture.*logit_softcap=30"):
    config_to_hf(cfg)
  cfg = llama2(**_SIZES, rope=Rope(scaling=NtkScaling(factor=2.0)))
  with pytest.raises(InteropError, match=r"NtkScaling.*no name there"):
    config_to_hf(cfg)
  cfg = llama2(**_SIZES | {"num_layers": 3}, window_pattern=(4, 8, None))
  with pytest.raises(InteropError, match=r"several sizes: \[4, 8\]"):
    config_to_hf(cfg, "Qwen2ForCausalLM")


def test_an_architecture_cannot_express_the_features_of_another():
  cfg = gemma2(**_SIZES, head_dim=8)
  with pytest.raises(InteropError, match=r"cannot express .*post_norms=True"):
    config_to_hf(cfg, "LlamaForCausalLM")


def test_phi3_takes_few_rotary_embeddings():
  cfg = llama2(**_SIZES, rope=Rope(scaling=LinearScaling(factor=2.0)))
  with pytest.raises(InteropError, match=r"'linear'; it takes \['default'"):
    config_to_hf(cfg, "Phi3ForCausalLM")


def test_old_and_new_rotary_fields_are_the_same():
  scaling = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  old = _llama(rope_theta=5e5, rope_scaling=scaling)
  new = _llama(rope_parameters=scaling | {"rope_theta": 5e5})
  assert config_from_hf(old) == config_from_hf(new)
  assert config_from_hf(old).rope.theta == 5e5


def test_a_first_phi3_has_longrope_under_its_old_names():
  for kind in ("su", "yarn"):
    cfg = config_from_hf(
      _llama(
        architectures=["Phi3ForCausalLM"],
        rope_scaling={
          "type": kind,
          "short_factor": [1, 1, 1, 1],
          "long_factor": [1, 2, 3, 4],
        },
        original_max_position_embeddings=1024,
      )
    )
    assert isinstance(cfg.rope.scaling, LongRopeScaling)
    assert cfg.rope.scaling.factors == (1, 2, 3, 4)
    # sqrt(1 + ln(4096 / 1024) / ln(1024))
    assert cfg.rope.scaling.attention_factor == pytest.approx(1.2**0.5)


def test_the_context_length_decides_where_the_embedding_depends_on_it():
  values = _llama(
    architectures=["Phi3ForCausalLM"],
    rope_scaling={
      "type": "longrope",
      "short_factor": [1, 1, 1, 1],
      "long_factor": [1, 2, 3, 4],
    },
    original_max_position_embeddings=1024,
  )
  short = config_from_hf(values, context_length=1024)
  assert short.rope.scaling.factors == (1, 1, 1, 1)
  assert short.context_length == 1024
  dynamic = _llama(rope_scaling={"type": "dynamic", "factor": 2.0})
  assert config_from_hf(dynamic).rope.scaling.length == 4096
  longer = config_from_hf(dynamic, context_length=8192).rope.scaling
  assert longer == DynamicNtkScaling(
    factor=2.0, original_length=4096, length=8192
  )


def test_the_text_of_a_gemma_that_sees_is_read():
  values = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "text_config": {
      "model_type": "gemma3_text",
      "hidden_size": 2560,
      "intermediate_size": 10240,
      "num_hidden_layers": 34,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
  }
  cfg = config_from_hf(values)
  assert (cfg.dtype, cfg.context_length) == ("bfloat16", 131_072)
  uses = {"dtype": "float32", "param_dtype": "float32", "context_length": None}
  plain = dataclasses.replace(cfg, **uses, attention_scale=None).frozen()
  assert plain == PRESETS["gemma3-4b"]


def test_windows_of_qwen_begin_at_a_layer_if_they_are_used():
  fields = {"sliding_window": 128, "max_window_layers": 1}
  values = _llama(architectures=["Qwen2ForCausalLM"], **fields)
  assert config_from_hf(values).window_pattern == (None,)
  values["use_sliding_window"] = True
  assert config_from_hf(values).window_pattern == (None, 128)


def test_no_window_is_no_window():
  values = _llama(architectures=["MistralForCausalLM"], sliding_window=None)
  assert config_from_hf(values).window_pattern == (None,)
  del values["sliding_window"]
  assert config_from_hf(values).window_pattern == (4096,)


def test_a_first_gemma_means_the_approximated_gelu():
  values = config_to_hf(gemma(**_SIZES, head_dim=8)) | {"hidden_act": "gelu"}
  assert config_from_hf(values).activation == "gelu_tanh"


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"architectures": ["LLamaForCausalLM"]}, "nearest name is LlamaForCaus"),
    ({"architectures": []}, None),
    ({"architectures": ["A", "B"]}, r"architectures=\['A', 'B'\]"),
    ({"attention_bias": True}, "attention_bias=True: biases on attention's"),
    ({"mlp_bias": True}, "biases in the MLP is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantized weights is not supp"),
    ({"num_local_experts": 8}, "a mixture of experts is not supported"),
    ({"hidden_act": "relu2"}, "the activation 'relu2'; jaxchunk knows"),
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of"),
    ({"rope_scaling": {"type": "mrope"}}, "rotary embedding 'mrope'; jaxch"),
    ({"rope_scaling": {"type": "linear"}}, "'linear' of config.json lacks 'f"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor=-1.0 must be"),
    ({"partial_rotary_factor": 0.5}, "LlamaForCausalLM.*turns whole heads"),
    ({"rope_theta": 0.5}, "rope theta=0.5 must be more than 1"),
    ({"torch_dtype": "int8"}, "dtype='int8' is not one of"),
  ],
)
def test_what_is_not_known_is_refused_by_name(fields, message):
  values = _llama(**fields)
  if message is None:
    assert config_from_hf(values).num_layers == 2  # by its model_type
    return
  with pytest.raises(InteropError, match=message):
    config_from_hf(values)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: a model in which only"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step=2: a model in which on"),
    ({"num_experts_per_tok": 200}, "moe.experts_per_token=200 is more than mo"),
  ],
)
def test_experts_of_other_kinds_are_refused_by_name(fields, message):
  values = _llama(architectures=["Qwen3MoeForCausalLM"], **fields)
  with pytest.raises(InteropError, match=message):
    config_from_hf(values)


def test_experts_are_those_published():
  values = _llama(architectures=["Qwen3MoeForCausalLM"], num_experts=12)
  want = MoE(
    num_experts=12, experts_per_token=8, d_ff=768, normalize_top_k=False
  )
  assert config_from_hf(values).moe == want
  # As transformers 5 writes it.
  values = values | {"num_local_experts": 16, "norm_topk_prob": True}
  want = dataclasses.replace(want, num_experts=16, normalize_top_k=True)
  assert config_from_hf(values).moe == want
  values = _llama(architectures=["MixtralForCausalLM"])
  assert config_from_hf(values).moe == MoE(
    num_experts=8, experts_per_token=2, d_ff=values["intermediate_size"]
  )


def test_losses_of_routers_are_of_training_alone_and_shared_experts_are_not():
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=8, balance_loss=0.1)
  cfg = mixtral(**_SIZES, moe=moe)
  values = config_to_hf(cfg)
  assert values["architectures"] == ["MixtralForCausalLM"]
  assert values["intermediate_size"] == 8
  cfg.moe = dataclasses.replace(moe, shared_d_ff=3)
  with pytest.raises(InteropError, match="shared_d_ff=3"):
    config_to_hf(cfg)


def test_a_type_of_layer_that_is_not_known_is_named():
  values = _llama(
    architectures=["Qwen3ForCausalLM"],
    use_sliding_window=True,
    layer_types=["full_attention", "linear_attention"],
  )
  with pytest.raises(InteropError, match="linear_attention"):
    config_from_hf(values)


@pytest.mark.parametrize(
  "architecture, fields",
  [
    ("LlamaForCausalLM", {"rms_norm_eps": None}),
    ("LlamaForCausalLM", {"rope_scaling": "linear"}),
    ("Gemma2ForCausalLM", {"query_pre_attn_scalar": None}),
    ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}),
    ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}),
  ],
)
def test_fields_of_no_sense_are_errors_of_this_library(architecture, fields):
  with pytest.raises(InteropError, match=r"config\.json"):
    config_from_hf(_llama(architectures=[architecture], **fields))


def test_fields_that_are_ignored_are_logged(caplog):
  config_from_hf(_llama(a_new_feature=3, bos_token_id=1))
  assert "ignores: ['a_new_feature']" in caplog.text
