"""The TPU kernel of paged attention, compiled for each generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchunk import targets
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.paged_attention.pallas_tpu import tpu_paged_forward
from jaxchunk.kernels.paged_attention.tpu.work import unsupported

SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
array = jax.ShapeDtypeStruct
# Of `_shapes`: rows with 128k keys each, in caches of gigabytes.
DECODE = {"B": 16, "S": 2**17, "layers": 1}
PREFILL = {"B": 1, "T": 256, "S": 2**17, "layers": 4}
# One layer of two, of 32k keys a row.
OTHERS = {
  "int8": {"Z": 128, "pages": jnp.int8},
  "e4m3": {"Z": 256, "pages": jnp.float8_e4m3fn},
  "e5m2, several queries": {"Z": 128, "pages": jnp.float8_e5m2, "T": 5},
  "int8 in fp32": {"Z": 128, "pages": jnp.int8, "dtype": jnp.float32},
  "fp32, wide": {"H": 256, "dtype": jnp.float32, "T": 256, "B": 2},
  "narrow": {"H": 64, "Z": 128},
  "narrow int8": {"H": 64, "Z": 256, "pages": jnp.int8, "T": 3},
  "all beside": {"Z": 128, "T": 3, "beside": True},
  "all beside, narrow": {"H": 64, "Z": 128, "T": 256, "B": 2, "beside": True},
  "short pages": {"Z": 16},
  "a large group": {"K": 1, "G": 64, "T": 32},
}


def _shapes(
  B=16,
  T=1,
  S=2**15,
  K=8,
  G=4,
  H=128,
  Z=64,
  layers=2,
  dtype=jnp.bfloat16,
  pages=None,
  beside=False,
):
  pool = B * S // Z
  kv = array((layers, K, pool, Z, H), pages or dtype)
  numbers, places = (array(kv.shape[:4], d) for d in (jnp.float32, jnp.int32))
  cache = KVPages(kv, kv)
  if pages is not None:
    cache = KVPages(kv, kv, numbers, numbers)
  if beside:
    cache = KVPages(kv, kv, positions=places, log_weights=numbers)
  view = PageView(array((B, K, S // Z), jnp.int32), array((B, K), jnp.int32))
  return array((B, K, G, T, H), dtype), cache, view, array((B, T), jnp.int32)


def attend(q, pages, view, q_positions, layer, *, window=None, softcap=None):
  options = {"window": window, "softcap": softcap}
  return tpu_paged_forward(
    q, pages, view, q_positions, layer=layer, scale=0.1, **options
  )


def _compile(name, shapes, **options):
  shapes = _shapes(**shapes)
  assert unsupported(*shapes[:3]) is None
  lowered = targets.lower_on(
    targets.tpu(name)[0],
    functools.partial(attend, **options),
    *shapes,
    array((), jnp.int32),
  )
  return lowered.compile(), shapes


def check(compiled, shapes, *, copied=0):
  """One kernel; beside it, copies of what is as small as the queries."""
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
  q = shapes[0]
  # Queries and outputs by row, positions and the lse padded to whole lanes.
  small = 8 * q.size * q.dtype.itemsize + 2**22
  assert compiled.memory_analysis().temp_size_in_bytes <= small + copied


@pytest.mark.parametrize("shapes", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", SLICES)
def test_it_compiles_and_copies_no_cache(name, shapes):
  check(*_compile(name, shapes))


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("name", ["v5e:2x2", "tpu7x:2x2x1"])
def test_every_kind_of_page_compiles(name, case):
  check(*_compile(name, OTHERS[case], window=5000, softcap=20.0))


@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2"])
def test_int8_compiles(name):
  check(*_compile(name, OTHERS["int8"]))


def test_of_short_pages_the_layers_scales_are_copied():
  # To whole lanes, of one layer of three.
  shapes = {"Z": 64, "pages": jnp.int8, "layers": 3}
  compiled, shapes = _compile("v5e:2x2", shapes)
  _, K, pool, _, _ = shapes[1].k.shape
  check(compiled, shapes, copied=2 * 4 * K * pool * 128)


def test_it_compiles_in_a_checked_shard_map():
  mesh = Mesh(np.array(targets.tpu("v5e:2x2")), ("d",))
  shapes, head = _shapes(B=4, Z=128, pages=jnp.int8), P(None, "d")
  specs = (head, head, head, P(), P())
  split = jax.shard_map(
    attend, mesh=mesh, in_specs=specs, out_specs=(head, head)
  )
  arguments = [
    jax.tree.map(
      lambda a, spec=spec: array(
        a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
      ),
      argument,
    )
    for argument, spec in zip(
      (*shapes, array((), jnp.int32)), specs, strict=True
    )
  ]
  compiled = jax.jit(split).lower(*arguments).compile()
  check(compiled, shapes)
  assert "all-" not in compiled.as_text()
