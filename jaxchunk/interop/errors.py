"""What can be wrong with a published checkpoint."""


class InteropError(ValueError):
  """Files of another library cannot be read, or a model not written as one."""
