"""A configuration says what is wrong with it, and is frozen once in use."""

import copy
import dataclasses
import pickle

import pytest

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.rope import LinearScaling, Rope

pytestmark = pytest.mark.fast


def make(**fields):
  sizes = {
    "vocab_size": 50,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 64,
  }
  return ModelConfig(**(sizes | fields))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
    ({"d_ff": 64.0}, r"d_ff=64\.0 must be a positive integer"),
    ({"num_kv_heads": 0}, "num_kv_heads=0 must be a positive integer"),
    (
      {"num_kv_heads": 3},
      "num_heads=4 is not a multiple of num_kv_heads=3; choose a divisor",
    ),
    ({"d_model": 30}, "d_model=30 is not a multiple of num_heads=4; set head_"),
    ({"head_dim": -2}, "head_dim=-2 must be a positive integer"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"d_model": 28}, "head_dim=7 must be even"),
    ({"window_pattern": ()}, "window_pattern is empty"),
    (
      {"window_pattern": (4, 4, None)},
      "window_pattern has 3 entries but there are num_layers=2; shorten",
    ),
    ({"window_pattern": (0,)}, "window_pattern entry=0 must be a positive int"),
    (
      {"attention_softcap": 0.0},
      r"attention_softcap=0\.0 must be positive, or",
    ),
    ({"logit_softcap": -1.0}, r"logit_softcap=-1\.0 must be positive, or None"),
    ({"attention_scale": 0.0}, r"attention_scale=0\.0 must be positive, or"),
    ({"norm_eps": 0.0}, r"norm_eps=0\.0 must be positive"),
    ({"dropout": 1.0}, r"dropout=1\.0 must be in \[0, 1\)"),
    ({"rope": {"theta": 1e4}}, r"rope=\{'theta': 10000\.0\} must be a Rope"),
    ({"local_rope": 1e4}, r"local_rope=10000\.0 must be a Rope, or None"),
    ({"activation": "relu"}, "activation='relu' is not one of .*'silu'"),
    ({"dtype": "int8"}, "dtype='int8' is not one of .*'bfloat16'"),
    ({"param_dtype": "fp32"}, "param_dtype='fp32' is not one of .*'float32'"),
  ],
)
def test_every_impossible_field_is_named(fields, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    make(**fields).frozen()


def test_freezing_fills_in_the_defaults():
  cfg = make(window_pattern=[8, None]).frozen()
  assert (cfg.num_kv_heads, cfg.head_dim) == (4, 8)
  assert cfg.window_pattern == (8, None)
  assert cfg.score_scale == 8**-0.5
  assert [cfg.layers_of(p) for p in range(2)] == [1, 1]
  assert make(num_layers=5, window_pattern=(8, None)).layers_of(0) == 3


def test_window_layers_have_their_own_rope_where_one_is_set():
  local = Rope(theta=100.0)
  cfg = make(local_rope=local)
  assert cfg.rope_of(8) == local
  assert cfg.rope_of(None) == Rope()
  assert make().rope_of(8) == Rope()


def test_a_frozen_copy_refuses_to_change_and_does_not_follow():
  cfg = make()
  frozen = cfg.frozen()
  cfg.d_ff = 128
  assert frozen.d_ff == 64
  for name in ("d_ff", "no_such_field"):
    with pytest.raises(dataclasses.FrozenInstanceError, match=f"set {name}"):
      setattr(frozen, name, 1)
  changed = dataclasses.replace(frozen, d_ff=96)
  changed.d_ff = 32
  assert (frozen.d_ff, changed.d_ff) == (64, 32)


def test_only_a_frozen_configuration_is_hashable():
  with pytest.raises(TypeError, match="only a frozen ModelConfig is hashable"):
    hash(make())
  one = make(rope=Rope(scaling=LinearScaling(factor=2.0))).frozen()
  two = make(rope=Rope(scaling=LinearScaling(factor=2.0))).frozen()
  assert one == two
  assert hash(one) == hash(two)
  assert one != make().frozen()


@pytest.mark.parametrize(
  "duplicate",
  [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
)
def test_copies_of_a_frozen_configuration_are_frozen(duplicate):
  twin = duplicate(make().frozen())
  assert hash(twin) == hash(make().frozen())
  with pytest.raises(dataclasses.FrozenInstanceError):
    twin.d_ff = 1
