"""Recipes fit on the devices that they are for, and say with how much."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest

from jaxchunk import targets
from jaxchunk.interop.configs import config_to_hf
from jaxchunk.models.families import preset
from jaxchunk.training import fits

ROOT = Path(__file__).parents[2]
# What is compiled for: configuration, its lengths, and the device.
RECIPES = [
  ("sft_h200", "32k", "h200"),
  ("sft_h200", "128k", "h200"),
  ("sft_h200", "512k", "h200"),
  ("lora_24gb", "64k", "rtx4090"),
  ("sft_slices", "v5e", "v5e:4x4"),
  ("sft_slices", "v6e", "v6e:2x4"),
]
GIB = 2**30


@functools.cache
def module_of(name):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def stated(name, length):
  """The peak in the header, in GiB: on the device, and of the host."""
  found = re.search(
    rf"{length} +([\d.]+) GiB(?:, and ([\d.]+) GiB of host)?",
    module_of(name).__doc__,
  )
  return float(found[1]), float(found[2] or 0)


@pytest.mark.parametrize(("name", "length", "target"), RECIPES)
def test_it_fits_as_its_header_says(name, length, target, tmp_path):
  model = preset("llama3.1-8b", dtype="bfloat16", param_dtype="bfloat16")
  values = json.dumps(config_to_hf(model))
  (tmp_path / "config.json").write_text(values)
  several = len({r for r in RECIPES if r[0] == name}) > 1
  argument = f"{tmp_path},{length}" if several else str(tmp_path)
  config = module_of(name).get_config(argument)
  target = targets.target(target)
  longest = config.data.max_document_tokens
  # Shorter lanes take less: tests/chunking/test_memory.py.
  lane = fits.lane_need(config, target, longest)
  needs = [lane, fits.update_need(config, target)]
  if config.layout.layout() is not None:
    needs.append(fits.sums_need(config, target))
  assert all(need.refused is None for need in needs)
  peak = max(need.device for need in needs)
  assert peak <= fits.limit(target)
  device, host = stated(name, length)
  assert peak / GIB == pytest.approx(device, rel=0.02)
  assert lane.host / GIB == pytest.approx(host, rel=0.02, abs=0.1)
