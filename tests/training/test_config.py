import dataclasses
import importlib.util
import inspect
import json
from pathlib import Path

import pytest

from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.interop.configs import config_to_hf
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.families import PRESETS
from jaxchunk.models.rope import NtkScaling, Rope
from jaxchunk.training import config as config_lib
from jaxchunk.training import flags as flags_lib
from jaxchunk.training.config import Config, ConfigError

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=str)
def test_every_config_file_is_valid_and_says_how_to_run_it(path, tmp_path):
  spec = importlib.util.spec_from_file_location("a_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  arguments = []
  if inspect.signature(module.get_config).parameters:
    with pytest.raises(ConfigError, match=rf"{path.name}:MODEL"):
      module.get_config()
    values = config_to_hf(PRESETS["smollm2-135m"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    arguments.append(str(tmp_path))
  config_lib.validate(module.get_config(*arguments))
  for word in ("Command:", "Hardware:", "Expected:", path.name):
    assert word in module.__doc__


@pytest.mark.parametrize(
  ("ending", "length", "memory"),
  [
    ("", 32_768, "device"),
    (",128k", 131_072, "device"),
    (",512k", 524_288, "host"),
    # Part of the folder's name.
    (",2", 32_768, "device"),
  ],
)
def test_a_recipe_for_several_lengths(tmp_path, ending, length, memory):
  folder = tmp_path / f"model{ending if ending == ',2' else ''}"
  folder.mkdir()
  values = config_to_hf(PRESETS["llama3.1-8b"])
  (folder / "config.json").write_text(json.dumps(values))
  path = ROOT / "configs" / "sft_h200.py"
  spec = importlib.util.spec_from_file_location("a_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(f"{tmp_path / 'model'}{ending}")
  config_lib.validate(config)
  assert config.train.init_from == str(folder)
  assert config.data.max_document_tokens == length
  assert config.train.kv_memory == memory
  assert length % config.train.chunk_size == 0


@pytest.mark.parametrize(
  ("section", "field", "value"),
  [
    ("train", "num_steps", 0),
    ("train", "num_steps", 2.5),
    ("train", "learning_rate", float("nan")),
    ("train", "learning_rate", "3e-4"),
    ("train", "clip_norm", 0.0),
    ("train", "beta2", 1.0),
    ("train", "optimizer", "sgd"),
    ("train", "schedule", "linear"),
    ("train", "strategy", "inner"),
    ("train", "implementation", "cuda"),
    ("train", "spaco_rate", 0.0),
    ("train", "spaco_rate", 1.5),
    ("train", "warmup_steps", 9),
    ("train", "final_learning_rate", -0.1),
    ("train", "max_skipped_steps", True),
    ("checkpoint", "keep_last", 0),
    ("checkpoint", "keep_every", 0),
    ("model", "num_kv_heads", 3),
    ("data", "batch_tokens", 0),
  ],
)
def test_validation_names_field_and_value(config, section, field, value):
  setattr(getattr(config, section), field, value)
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  assert field in str(error.value)
  assert str(value) in str(error.value)
  assert section in str(error.value)


@pytest.mark.parametrize(
  ("field", "value"), [("strategy", "layer_outer"), ("live_chunks", 2)]
)
def test_what_cannot_go_with_drawn_chunks(config, field, value):
  config.train.spaco_rate = 0.25
  setattr(config.train, field, value)
  with pytest.raises(ConfigError, match=f"spaco_rate=0.25.*{field}={value!r}"):
    config_lib.validate(config)


@pytest.mark.parametrize(
  ("memory", "field", "value"),
  [
    ("kv_memory", "strategy", "layer_outer"),
    ("kv_memory", "spaco_rate", 0.25),
    ("optimizer_memory", "optimizer", "adafactor"),
  ],
)
def test_what_cannot_go_with_host_memory(config, memory, field, value):
  config.train.live_chunks = 0
  setattr(config.train, memory, "host")
  config_lib.validate(config)
  setattr(config.train, field, value)
  message = f"{memory}='host' does not go with train.{field}={value!r}"
  with pytest.raises(ConfigError, match=message):
    config_lib.validate(config)


def test_a_rate_becomes_a_strategy(config):
  config.train.spaco_rate, config.train.live_chunks = 0.25, 0
  config_lib.validate(config)
  assert config_lib.strategy_of(config) == SpaCO(0.25)
  config.train.spaco_rate = None
  assert config_lib.strategy_of(config) == config.train.strategy


def test_validation_wants_a_config():
  with pytest.raises(ConfigError, match="returned dict"):
    config_lib.validate({})


def test_json_round_trip(config):
  config.model.rope = Rope(theta=5e5, scaling=NtkScaling(factor=2.0))
  config.model.window_pattern = (16, None)
  stored = config_lib.to_json(config)
  assert config_lib.from_json(Config, stored) == config
  assert config_lib.differences(stored, config) == []


def test_json_of_another_version_is_an_error(config):
  stored = config_lib.to_json(config.model) | {"mixture": 4}
  with pytest.raises(ConfigError, match="mixture"):
    config_lib.from_json(ModelConfig, stored)


def test_differences_name_fields(config):
  stored = config_lib.to_json(config)
  config.model.d_ff = 32
  config.model.dropout = 0.1
  config.train.learning_rate = 0.5
  found = config_lib.differences(stored, config)
  assert [d.field for d in found] == [
    "model.d_ff",
    "model.dropout",
    "train.learning_rate",
  ]
  assert [d.breaks_model for d in found] == [True, False, False]


def test_none_equals_what_it_means(config):
  stored = config_lib.to_json(config)
  config.model = dataclasses.replace(config.model, head_dim=None)
  assert config_lib.differences(stored, config) == []


def test_fingerprint_changes_with_any_field(config):
  before = config_lib.fingerprint(config)
  config.train.seed += 1
  assert config_lib.fingerprint(config) != before


@pytest.mark.parametrize(
  ("given", "nearest"),
  [
    ("config.train.learning_rat=1", "--config.train.learning_rate"),
    ("config.trian.learning_rate=1", "--config.train"),
    ("config.learning_rate=1", "--config.train.learning_rate"),
    ("config.model.learning_rate=1", "--config.train.learning_rate"),
    ("config.data.max_documents_tokens", "--config.data.max_document_tokens"),
  ],
)
def test_a_misspelt_field_names_the_nearest(given, nearest):
  with pytest.raises(ConfigError) as error:
    flags_lib.check_overrides(["train.py", f"--{given}"], Config)
  assert str(error.value).endswith(f"did you mean {nearest}?")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("--config.train.seed.x=1", "has no fields"),
    ("--config.model.rope.theta=1", "value that cannot be changed in part"),
    ("--config=/nowhere/config.py", "no such file"),
  ],
)
def test_other_mistakes_in_overrides(given, message):
  with pytest.raises(ConfigError, match=message):
    flags_lib.check_overrides(["train.py", given], Config)


def test_right_overrides_pass(tmp_path):
  file = tmp_path / "config.py"
  file.write_text("")
  argv = ["train.py", "--config", str(file), "--config.train.seed=3"]
  argv += ["--config.data.bos=false", "--noconfig.data.eos", "--workdir=x"]
  flags_lib.check_overrides(argv, Config)


@pytest.mark.parametrize("text", ["10", "0:3", "5:4", "a:b"])
def test_bad_profile_steps(text):
  with pytest.raises(ConfigError, match="FIRST:LAST"):
    flags_lib.profile_steps(text)


def test_profile_steps():
  assert flags_lib.profile_steps("10:12") == (10, 12)
  assert flags_lib.profile_steps(None) is None
