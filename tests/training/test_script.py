import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxchunk.training import metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start():
  """Starts scripts/train.py; whatever still runs at the end is killed."""
  processes = []

  def start_script(*arguments):
    processes.append(
      subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return processes[-1]

  yield start_script
  for process in processes:
    if process.poll() is None:
      process.kill()
    process.communicate()


def wait_for_steps(workdir, process, count, seconds=120):
  deadline = time.monotonic() + seconds
  while len(list(metrics.read(workdir))) < count:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, "no steps"
    time.sleep(0.05)


def test_sigterm_saves_and_exits_with_zero(start, config_file, tmp_path):
  workdir = tmp_path / "run"
  arguments = [f"--config={config_file}", f"--workdir={workdir}"]
  process = start(
    *arguments, "--config.train.num_steps=100000", "--config.train.eval_every=0"
  )
  wait_for_steps(workdir, process, 2)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert "SIGTERM" in out
  last = [line["step"] for line in metrics.read(workdir)][-1]
  assert (workdir / "checkpoints" / str(last)).is_dir()
  assert (workdir / "report.png").exists()


MISTAKES = {
  "--config.train.learning_rat=1": "--config.train.learning_rat is not a field;"
  " did you mean --config.train.learning_rate?",
  "--config.train.clip_norm=-1": "train.clip_norm=-1.0 must be positive",
  "--config.train.optimizer=sgd": "adamw",
  "--profile_steps=3": "--profile_steps=3 must be FIRST:LAST",
}


def test_a_mistake_is_answered_in_a_line(start, config_file, tmp_path):
  arguments = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
  processes = {text: start(*arguments, text) for text in MISTAKES}
  for text, process in processes.items():
    _, err = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    assert MISTAKES[text] in err
    assert "Traceback" not in err
