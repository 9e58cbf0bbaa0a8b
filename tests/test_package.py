"""What an import loads, and that the package is whole off-root."""

import os
import pathlib
import subprocess
import sys

import pytest

import jaxchunk

ROOT = pathlib.Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
  code = f"{statement}\nimport sys; print(*sys.modules)"
  out = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  return set(out.stdout.split())


@pytest.mark.fast
def test_kernels_load_no_flax():
  loaded = modules_after("import jaxchunk.kernels.attention.api")
  assert "jax" in loaded
  assert "flax" not in loaded


@pytest.mark.fast
def test_import_loads_no_jax():
  assert "jax" not in modules_after("import jaxchunk")


@pytest.mark.fast
def test_every_public_name_resolves():
  for name in jaxchunk.__all__:
    assert getattr(jaxchunk, name) is not None
  with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
    _ = jaxchunk.nonsense


@pytest.mark.parametrize("folder", ["kernels", "sharding"])
def test_sources_stand_where_the_layout_says(folder):
  assert (ROOT / "jaxchunk" / folder).is_symlink()
  assert not (ROOT / folder / "__init__.py").exists()
