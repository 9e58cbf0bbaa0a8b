"""From a folder of Hugging Face through a run to another, by the scripts."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.data.chat import CHATML
from jaxchunk.interop.hugging_face import load_config
from jaxchunk.interop.peft import load_peft
from jaxchunk.models.adapters import merge_lora
from jaxchunk.models.lora import LoRA
from jaxchunk.training import loop, report
from jaxchunk.training.export import export_run

_ROOT = Path(jc.__file__).parents[1]


@pytest.fixture(name="run")
def fixture_run(config, tmp_path, monkeypatch):
  """Two steps of adapters beside published weights."""
  monkeypatch.setattr(report, "draw", lambda workdir: None)
  base = tmp_path / "base"
  jc.save_hf(jc.Transformer(config.model, rngs=nnx.Rngs(7)), base)
  (base / "chat_template.jinja").write_text(CHATML)
  config.model = load_config(base, lora=LoRA(rank=2))
  config.train.init_from = str(base)
  config.train.num_steps, config.train.eval_every = 2, 0
  loop.train(config, tmp_path / "run")
  return tmp_path / "run"


def test_a_run_is_exported_merged_or_as_adapters(run, tmp_path):
  said = export_run(run, tmp_path / "merged")
  assert said == f"Model of step 2: {tmp_path / 'merged'}"
  export_run(run, tmp_path / "adapters", adapters=True)
  # The tokenizer is the run's, not that of the folder it began with.
  assert (tmp_path / "merged/tokenizer_config.json").exists()
  assert not (tmp_path / "merged/chat_template.jinja").exists()
  base, merged = (jc.load_hf(tmp_path / name) for name in ("base", "merged"))
  adapted = load_peft(base, tmp_path / "adapters")
  tokens = np.arange(20, dtype=np.int32)[None]
  np.testing.assert_allclose(merged(tokens), adapted(tokens), atol=2e-5)
  again = merge_lora(adapted).blocks[0].q.kernel
  np.testing.assert_array_equal(merged.blocks[0].q.kernel, again)
  assert np.abs(merged(tokens) - base(tokens)).max() > 0
  values = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
  assert values["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize(
  "script, arguments, message",
  [
    ("train.py", ["--config=configs/lora.py"], "name the model's folder: --"),
    ("train.py", ["--config=configs/sft.py:/nowhere"], "has no config.json"),
    ("export.py", ["--output=x"], "has no folder 'checkpoints'"),
  ],
)
def test_what_is_wrong_is_said_in_a_line(script, arguments, message, tmp_path):
  ended = subprocess.run(
    [sys.executable, f"scripts/{script}", f"--workdir={tmp_path}", *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 1
  line = ended.stderr.strip().splitlines()[-1]
  assert line.startswith(f"{script}: ") and message in line
