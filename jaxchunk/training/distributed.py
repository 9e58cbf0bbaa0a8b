"""Several processes in one run: how they meet, and what they must agree on.

`initialize` comes before anything that uses a device. Afterwards `agree`
compares facts through the key-value store of `jax.distributed`, so that a
difference is an error that names the process and the field, and a process that
does not come is one that names it, where a collective would hang.
"""

import contextlib
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed

import jaxchunk
from jaxchunk.data.corpus import Corpus
from jaxchunk.training import config as config_lib
from jaxchunk.training.attendance import Attendance
from jaxchunk.training.config import Config, ConfigError

EXIT_CODE = 75
"""Of a process that ends because of another: "try again" in sysexits.h."""

_rounds = itertools.count()
_FLAGS = ("coordinator_address", "num_processes", "process_id")


class ProcessError(RuntimeError):
  """Processes that do not fit together; names one, and what differs."""


def client() -> Any:
  """The connection to the key-value store, which jax has no public name for.

  `None` in a run of one process.
  """
  return jax_distributed.global_state.client


def count() -> int:
  """How many processes there are; touches no device, as jax's own would."""
  return jax_distributed.global_state.num_processes if client() else 1


def index() -> int:
  """The number of this process, likewise."""
  return jax_distributed.global_state.process_id if client() else 0


def leads() -> bool:
  """Whether this process writes what only one may write."""
  return index() == 0


def leader_host() -> str:
  """The host of process 0, as this one reaches it."""
  address: str = jax_distributed.global_state.coordinator_address or ""
  return address.rsplit(":", 1)[0].strip("[]")


def find_cluster(environ: Mapping[str, str]) -> str | None:
  """The cluster in which several processes were started, if jax knows it.

  jax would ask the metadata server of any machine that has libtpu, and the
  interface of Kubernetes from any pod; this looks first whether that can help.

  Args:
    environ: As `os.environ`.
  """
  slurm = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
  if all(f"SLURM_{name}" in environ for name in slurm):
    return "Slurm" if int(environ["SLURM_NTASKS"]) > 1 else None
  if (size := environ.get("OMPI_COMM_WORLD_SIZE")) is not None:
    return "Open MPI" if int(size) > 1 else None
  if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
    return "Kubernetes"
  platforms = environ.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms:
    return None
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES", ""
  )
  slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
  asks = "TPU_SKIP_MDS_QUERY" not in environ and _has_tpu()
  return "Cloud TPU" if "," in hosts or slices > 1 or asks else None


def _has_tpu() -> bool:
  """Whether this machine seems to hold TPU chips, and the library for them."""
  chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def initialize(
  workdir: str | os.PathLike[str],
  config: Config,
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of a run; alone and outside a cluster, does nothing.

  Args:
    workdir: Of the run, on a disk that all processes share.
    config: Of the run; checked before anyone is waited for.
    coordinator_address: `host:port` of process 0; by default
      `$JAX_COORDINATOR_ADDRESS`, or what the cluster says (Cloud TPU, Slurm,
      Open MPI, Kubernetes).
    num_processes: How many there are; by default as the cluster says.
    process_id: Of this one, from 0; likewise.

  Raises:
    ConfigError: A field is impossible, some of these are known and others are
      not, or the cluster cannot be asked.
  """
  config_lib.validate(config)
  address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
  given = (address, num_processes, process_id)
  cluster = find_cluster(os.environ)
  if cluster is None and all(value is None for value in given):
    return
  by_hand = None not in given
  if not by_hand and cluster is None:
    missing = [
      f"--{n}" for n, v in zip(_FLAGS, given, strict=True) if v is None
    ]
    raise ConfigError(
      f"no cluster that jax knows was found, so {', '.join(missing)} must be "
      "given too (host:port of process 0, how many, and which this one is)"
    )
  # SIGTERM is for `StopSignal`, from the beginning to the end.
  jax.config.update("jax_enable_preemption_service", False)
  options = config.processes
  patience = int(options.startup_timeout)
  with Attendance(Path(workdir), patience, leave):
    try:
      jax.distributed.initialize(
        *given,
        cluster_detection_method=_method(cluster, by_hand=by_hand),
        # Ours come first; these are for what they do not see.
        initialization_timeout=patience + 15,
        heartbeat_timeout_seconds=int(3 * options.silence_timeout),
        shutdown_timeout_seconds=15,
      )
    except (ValueError, RuntimeError) as error:
      alone = "coordinator_address should be defined" in str(error)
      if alone and cluster == "Cloud TPU":
        # One machine with chips, and no others.
        return
      raise ConfigError(
        f"the processes cannot meet ({cluster or address}): {error}; "
        f"{', '.join(f'--{name}' for name in _FLAGS)} say it by hand"
      ) from error


def _method(cluster: str | None, *, by_hand: bool) -> str | None:
  if by_hand:
    return "deactivate"
  # Version 5 left out what jax 0.10 reads.
  fifth = "OMPI_MCA_orte_hnp_uri" not in os.environ
  return "mpi4py" if cluster == "Open MPI" and fifth else None


def new_folder() -> str:
  """Where to put keys; processes that call it alike get the same names."""
  return f"jaxchunk/{next(_rounds)}"


def here() -> dict[str, Any]:
  """Where this process is, for the messages of others."""
  return {"host": socket.gethostname(), "pid": os.getpid()}


def describe(number: int, place: Mapping[str, Any]) -> str:
  """A process for a message: its number, host and id there."""
  return f"process {number} ({place['host']}, pid {place['pid']})"


def agree(topic: str, facts: Mapping[str, Any], *, timeout: float) -> None:
  """Makes sure that all processes have the same facts.

  Every process must call it, in the same order. Process 0 compares, so that
  a thousand processes do not read each other's.

  Args:
    topic: What is compared, for the message.
    facts: JSON values by name.
    timeout: Seconds until a process that did not come is an error.

  Raises:
    ProcessError: One has other facts, or did not come; names it and them.
  """
  mine = json.loads(json.dumps(dict(facts)))
  found = _collect(topic, {"facts": mine, **here()}, timeout, _difference)
  if found:
    raise ProcessError(f"{topic}: {found}; start all alike")


def check_alike(config: Config, workdir: Path) -> None:
  """Makes sure that all processes were started alike, before any compiles.

  Raises:
    ProcessError: One was not, or did not come.
  """
  if count() == 1:
    return
  facts = {
    "processes": count(),
    "jaxchunk": jaxchunk.__version__,
    "jax": jax.__version__,
    "workdir": str(workdir),
    **config_lib.flat(config),
  }
  timeout = config.processes.startup_timeout
  agree("the processes differ", facts, timeout=timeout)
  # Only now: to count devices is to wait for those of all processes.
  devices = {
    "devices": jax.local_device_count(),
    "kind": jax.local_devices()[0].device_kind,
  }
  agree("the processes' devices differ", devices, timeout=timeout)


def check_same_place(
  config: Config, corpus: Corpus, step: int, cursor: Mapping[str, Any]
) -> None:
  """Makes sure that all processes go on from one step, with the same data.

  Raises:
    ProcessError: One has others, or did not come.
  """
  if count() == 1:
    return
  lengths = hashlib.sha256(corpus.lengths.tobytes() + corpus.reasons.tobytes())
  facts = {
    "step": step,
    "documents": lengths.hexdigest()[:16],
    **{f"data.{name}": value for name, value in cursor.items()},
  }
  timeout = config.processes.startup_timeout
  agree("the processes would train on different data", facts, timeout=timeout)


def gather(topic: str, value: Any, *, timeout: float) -> list[Any]:
  """The small JSON values of all processes, by their number.

  Raises:
    ProcessError: One did not come; names it.
  """
  values: list[Any] = _collect(topic, value, timeout, list)
  return values


def _difference(answers: list[dict[str, Any]]) -> str | None:
  """The first process that differs from process 0, and in what."""
  first = answers[0]["facts"]
  for number, answer in enumerate(answers):
    facts = answer["facts"]
    for name in sorted(first.keys() | facts.keys()):
      if facts.get(name) != first.get(name):
        return (
          f"{describe(number, answer)} has {name}={facts.get(name)!r}, "
          f"{describe(0, answers[0])} has {first.get(name)!r}"
        )
  return None


def _collect(
  topic: str, value: Any, timeout: float, combine: Callable[[list[Any]], Any]
) -> Any:
  """Process 0 combines the values of all; everyone gets the result."""
  if count() == 1:
    return combine([value])
  store, folder = client(), new_folder()
  store.key_value_set(f"{folder}/{index()}", json.dumps(value))
  if not leads():
    # Process 0 gives up first, and says on whom.
    return json.loads(_get(store, f"{folder}/all", timeout + 10, topic, 0))
  deadline = time.monotonic() + timeout
  values = []
  for number in range(count()):
    rest = max(deadline - time.monotonic(), 0.1)
    text = _get(store, f"{folder}/{number}", rest, topic, number)
    values.append(json.loads(text))
  result = combine(values)
  store.key_value_set(f"{folder}/all", json.dumps(result))
  return result


def _get(store: Any, key: str, timeout: float, topic: str, number: int) -> str:
  try:
    text: str = store.blocking_key_value_get(key, int(timeout * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise ProcessError(
      f"{topic}: process {number} of {count()} did not come within "
      f"{timeout:.0f} s ({str(error).splitlines()[0][:100]}); look at its log, "
      "or raise processes.startup_timeout"
    ) from error
  return text


def leave(message: str, code: int = EXIT_CODE) -> NoReturn:
  """Ends this process at once, with a line on stderr.

  Whatever hangs in a collective, or would wait for others at the end of
  Python, stays behind.
  """
  # Directly: another thread may hold the lock of a stream.
  os.write(2, f"{as_line(message)}\n".encode())
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(code)


def fail(error: Exception) -> NoReturn:
  """Ends a script with one line on stderr; waits for no other process."""
  if count() > 1:
    leave(str(error), 1)
  sys.exit(as_line(str(error)))


def as_line(message: str) -> str:
  """A message as it is printed: behind the name of the program."""
  return f"{os.path.basename(sys.argv[0]) or 'jaxchunk'}: {message}"
