"""What a server serves: an engine, by which names, and how it is spoken to."""

import dataclasses
import time

from jaxchunk.data.chat import ChatTemplate
from jaxchunk.data.tokenizers import Tokenizer
from jaxchunk.inference.engine import Engine
from jaxchunk.inference.server.errors import ApiError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """A model and its adapters.

  Attributes:
    engine: With them.
    name: By which requests ask for the model as it is.
    adapters: Names of those that requests may ask for instead.
    template: Of conversations; `None` is none.
    created: When the server began, in seconds of Unix.
  """

  engine: Engine
  name: str
  adapters: tuple[str, ...] = ()
  template: ChatTemplate | None = None
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))

  def __post_init__(self) -> None:
    if self.name in self.adapters:
      raise ValueError(
        f"an adapter has the model's name {self.name!r}; give another by "
        "--served_model_name"
      )

  @property
  def tokenizer(self) -> Tokenizer | None:
    """Of the engine."""
    return self.engine.tokenizer

  @property
  def names(self) -> tuple[str, ...]:
    """All that requests may ask for."""
    return self.name, *self.adapters

  def adapter(self, model: str) -> str | None:
    """The adapter that a name stands for; `None` is the model as it is.

    Raises:
      ApiError: There is nothing of that name.
    """
    if model == self.name:
      return None
    if model in self.adapters:
      return model
    raise ApiError(
      404,
      f"there is no model {model[:200]!r}; there are {list(self.names)}",
      param="model",
      code="model_not_found",
    )
