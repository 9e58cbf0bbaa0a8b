"""Rotary embeddings against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.models.rope import (
  LinearScaling,
  Llama3Scaling,
  NtkScaling,
  Rope,
  YarnScaling,
  frequencies,
  rope_tables,
  rotate,
)

pytestmark = pytest.mark.fast

_H = 64
_PLAIN = 1e4 ** -(np.arange(_H // 2) * 2 / _H)


def scaled(scaling):
  return frequencies(_H, Rope(theta=1e4, scaling=scaling))


def test_plain_frequencies_are_powers_of_the_base():
  freqs, factor = scaled(None)
  np.testing.assert_allclose(freqs, _PLAIN, rtol=1e-15)
  assert factor == 1


def test_linear_scaling_divides_positions():
  freqs, factor = scaled(LinearScaling(factor=4.0))
  np.testing.assert_allclose(freqs * 4, _PLAIN, rtol=1e-15)
  assert factor == 1


def test_ntk_scaling_raises_the_base():
  freqs, factor = scaled(NtkScaling(factor=8.0))
  base = 1e4 * 8 ** (_H / (_H - 2))
  want = [base ** -(2 * c / _H) for c in range(_H // 2)]
  np.testing.assert_allclose(freqs, want, rtol=1e-14)
  # That base is the one which leaves the fastest channel as it was and
  # divides the slowest by the factor.
  assert freqs[0] == 1
  assert freqs[-1] == pytest.approx(_PLAIN[-1] / 8, rel=1e-14)
  assert factor == 1


def test_llama3_scaling_divides_long_wavelengths_only():
  freqs, factor = scaled(Llama3Scaling(factor=8.0, original_length=1024))
  wavelength = 2 * math.pi / _PLAIN
  short, long = wavelength < 1024 / 4, wavelength > 1024
  np.testing.assert_allclose(freqs[short], _PLAIN[short], rtol=1e-15)
  np.testing.assert_allclose(freqs[long], _PLAIN[long] / 8, rtol=1e-15)
  between = ~short & ~long
  assert between.any()
  smooth = (1024 / wavelength[between] - 1) / 3
  want = ((1 - smooth) / 8 + smooth) * _PLAIN[between]
  np.testing.assert_allclose(freqs[between], want, rtol=1e-14)
  assert factor == 1


def test_yarn_scaling_keeps_fast_channels_and_divides_slow_ones():
  scaling = YarnScaling(factor=16.0, original_length=4096)
  freqs, factor = scaled(scaling)
  turns = 4096 * _PLAIN / (2 * math.pi)
  # One channel to spare on both sides: the borders are rounded outwards.
  fast = np.flatnonzero(turns > 32)[:-1]
  slow = np.flatnonzero(turns < 1)[1:]
  np.testing.assert_allclose(freqs[fast], _PLAIN[fast], rtol=1e-15)
  np.testing.assert_allclose(freqs[slow], _PLAIN[slow] / 16, rtol=1e-15)
  assert (np.diff(freqs / _PLAIN) <= 1e-15).all()
  assert factor == pytest.approx(0.1 * math.log(16) + 1)


def test_yarn_attention_factor_may_be_given():
  scaling = YarnScaling(factor=16.0, original_length=64, attention_factor=1.25)
  assert scaled(scaling)[1] == 1.25
  assert scaled(YarnScaling(factor=0.5, original_length=64))[1] == 1
  positions = jnp.arange(3)[None]
  rope = Rope(scaling=scaling)
  cos, sin = rope_tables(positions, _H, rope, jnp.dtype("float32"))
  np.testing.assert_allclose(cos**2 + sin**2, 1.25**2, rtol=1e-6)


def test_tables_are_in_at_least_fp32(x64):
  positions = jnp.arange(3, dtype=jnp.int32)[None]
  for dtype, wide in (("bfloat16", "float32"), ("float64", "float64")):
    tables = rope_tables(positions, _H, Rope(), jnp.dtype(dtype))
    assert [t.dtype for t in tables] == [wide, wide]
    assert [t.shape for t in tables] == [(1, 3, _H // 2)] * 2


def test_rotation_is_a_complex_product(x64):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 5, _H))
  positions = rng.integers(0, 1000, (2, 5))
  dtype = jnp.dtype("float64")
  tables = rope_tables(jnp.asarray(positions), _H, Rope(theta=1e4), dtype)
  got = np.asarray(rotate(jnp.asarray(x), tables))
  turn = np.exp(1j * positions[:, None, :, None] * _PLAIN)
  want = (x[..., : _H // 2] + 1j * x[..., _H // 2 :]) * turn
  np.testing.assert_allclose(got[..., : _H // 2], want.real, atol=1e-12)
  np.testing.assert_allclose(got[..., _H // 2 :], want.imag, atol=1e-12)


def test_scores_depend_on_the_distance_alone(x64):
  rng = np.random.default_rng(0)
  q, k = jnp.asarray(rng.standard_normal((2, 1, 1, _H)))

  def score(q_position, k_position):
    rope = Rope(scaling=YarnScaling(factor=4.0, original_length=64))
    tables = [
      rope_tables(jnp.asarray([[p]]), _H, rope, jnp.dtype("float64"))
      for p in (q_position, k_position)
    ]
    return float(
      jnp.vdot(rotate(q[None], tables[0]), rotate(k[None], tables[1]))
    )

  assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-11)
  assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_ropes_are_keys_of_a_pytree():
  ropes = [Rope(), Rope(theta=2.0), Rope(scaling=LinearScaling(factor=2.0))]
  tables = {rope: jnp.full((1,), float(i)) for i, rope in enumerate(ropes)}
  doubled = jax.jit(lambda t: jax.tree.map(lambda a: 2 * a, t))(tables)
  assert [float(doubled[rope][0]) for rope in ropes] == [0, 2, 4]


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"theta": 1.0}, "theta=1.0 must be more than 1"),
    ({"scaling": LinearScaling(factor=0.0)}, "factor=0.0 must be positive"),
    (
      {"scaling": YarnScaling(factor=2.0, original_length=0)},
      "original_length=0 must be positive",
    ),
    (
      {"scaling": Llama3Scaling(factor=8.0, low_freq_factor=4.0)},
      "low_freq_factor=4.0 must be less than high_freq_factor=4.0",
    ),
    (
      {"scaling": YarnScaling(factor=2.0, original_length=8, beta_slow=64.0)},
      "beta_slow=64.0 must be less than beta_fast=32.0",
    ),
  ],
)
def test_impossible_ropes_are_refused(fields, message):
  with pytest.raises(ValueError, match=f"rope {message}"):
    Rope(**fields)
