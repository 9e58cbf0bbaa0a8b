"""scripts/plan.py from a shell."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*flags):
  return subprocess.run(
    [sys.executable, "-W", "error", "scripts/plan.py", *flags],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
    capture_output=True,
    text=True,
    check=False,
  )


def test_it_prints_the_plan_and_writes_it(tmp_path):
  out = tmp_path / "plan.json"
  done = run(
    "--model=llama3.2-1b",
    "--lengths=2000:50,32768:1",
    "--target=v5e:2x2",
    f"--out={out}",
    "--show=3",
  )
  assert done.returncode == 0, done.stderr
  values = json.loads(out.read_text())
  best = values["best"]
  assert f"best: {best['name']}" in done.stdout
  for flag in best["flags"]:
    assert flag in done.stdout
  assert values["devices"] == 4 and best["predicted_bytes"]["lane"] > 0
  assert re.search(r"[\d,]+ candidates", done.stderr)


def test_it_ends_with_what_to_change_if_nothing_fits():
  done = run(
    "--model=llama3.1-8b",
    "--lengths=131072:1",
    "--target=v5e",
    "--trainable=lora",
  )
  assert done.returncode == 1
  assert "nothing fits into 15.28 GiB" in done.stderr
  assert "devices in place of 1" in done.stderr
  assert "Traceback" not in done.stderr


def test_what_is_unknown_is_one_line():
  done = run("--model=llama9", "--lengths=1")
  assert done.returncode == 1
  assert done.stderr.startswith("plan.py: there is no preset 'llama9'")
