import pytest

from jaxchunk.models.config import ModelConfig
from jaxchunk.planner.candidates import Request
from jaxchunk.planner.devices import machine
from jaxchunk.planner.lengths import lengths_of
from jaxchunk.training.config import TrainConfig


@pytest.fixture(scope="session")
def make_request():
  """Makes requests of a small model in bf16."""

  def make(
    target="h200", lengths=(2000, 2000, 8000, 65536), train=None, **fields
  ) -> Request:
    model = ModelConfig(
      vocab_size=32768,
      d_model=1024,
      num_layers=8,
      num_heads=8,
      num_kv_heads=4,
      head_dim=128,
      d_ff=4096,
      dtype="bfloat16",
      param_dtype="bfloat16",
      **fields.pop("model", {}),
    ).frozen()
    return Request(
      model,
      lengths_of(lengths),
      machine(target),
      TrainConfig(**(train or {})),
      **fields,
    )

  return make
