"""Where independent work runs: threads of this process, other processes, or a Dask cluster.

Results do not depend on the place: every task is a pure function of its arguments and of one shared object.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, Protocol, TypeVar

from mptqc.errors import ExecutorError, RecipeError

Shared = TypeVar("Shared")
Result = TypeVar("Result")

ATTEMPTS = 4
"""How often a task is started before its loss is an error; workers may die under it."""

CONNECT_SECONDS = 10

KINDS = "in-process, processes:N, dask://host:port"


class Place(Protocol):
    """An executor and how it is given the shared object."""

    executor: Executor
    died: tuple[type[BaseException], ...]

    def share(self, shared: object) -> object:
        """What a task is given in place of the object."""

    def restart(self) -> None:
        """Make the executor work again after workers died."""

    def close(self) -> None:
        """Let it go."""


class InProcess:
    """Threads of this process, one a core; ONNX Runtime runs outside Python's lock."""

    died: tuple[type[BaseException], ...] = ()

    def __init__(self) -> None:
        self.executor: Executor = ThreadPoolExecutor(os.cpu_count())

    def share(self, shared: object) -> object:
        """The object itself."""
        return shared

    def restart(self) -> None:
        """Threads do not die."""

    def close(self) -> None:
        """End the threads."""
        self.executor.shutdown()


@dataclass(frozen=True)
class SharedFile:
    """Where the pickled object lies."""

    path: Path


class Processes:
    """Processes of this machine; the shared object is read from a file, once by each."""

    died: tuple[type[BaseException], ...] = (BrokenExecutor,)

    def __init__(self, count: int) -> None:
        self._count = count
        self._folder = TemporaryDirectory(prefix="mptqc-")
        self._files = 0
        self.executor: Executor = self._start()

    def _start(self) -> Executor:
        # Spawned, not forked: ONNX Runtime's threads do not survive a fork.
        return ProcessPoolExecutor(self._count, mp_context=get_context("spawn"))

    def share(self, shared: object) -> object:
        """Write the object to a file of its own."""
        self._files += 1
        path = Path(self._folder.name) / f"{self._files}.pickle"
        path.write_bytes(pickle.dumps(shared, protocol=pickle.HIGHEST_PROTOCOL))
        return SharedFile(path)

    def restart(self) -> None:
        """Start all processes anew: a pool that lost one takes no more work."""
        self.executor.shutdown(cancel_futures=True)
        self.executor = self._start()

    def close(self) -> None:
        """End the processes and remove the files."""
        self.executor.shutdown(cancel_futures=True)
        self._folder.cleanup()


class DaskCluster:
    """Workers of a Dask cluster, which moves the tasks of a dead worker to another by itself."""

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client, KilledWorker
        except ImportError as error:
            raise ExecutorError(
                f"--executor dask://{address} needs Dask, which is not installed: pip install 'mptqc[dask]'"
            ) from error
        try:
            self._client = Client(f"tcp://{address}", timeout=CONNECT_SECONDS)
        except OSError as error:
            raise ExecutorError(f"no Dask scheduler answers at {address}: {error}") from error
        self.died: tuple[type[BaseException], ...] = (KilledWorker, CancelledError)
        self.executor: Executor = self._client.get_executor(pure=False)

    def share(self, shared: object) -> object:
        """Send the object to every worker."""
        return self._client.scatter(shared, broadcast=True, hash=False)

    def restart(self) -> None:
        """Wait for a worker; the nanny of a dead one starts another."""
        self._client.wait_for_workers(1)

    def close(self) -> None:
        """Leave the cluster, which goes on."""
        self.executor.shutdown()
        self._client.close()


class Workers(Generic[Shared]):
    """Runs one function of (shared object, arguments…) many times; lost workers are replaced, their tasks repeated."""

    def __init__(self, place: Place, shared: Shared) -> None:
        self._place = place
        self._shared = shared
        self._sent = place.share(shared)

    def map(self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]]) -> list[Result]:
        """function(shared, *task) for each task, in order.

        Raises:
            ExecutorError: a task was lost `ATTEMPTS` times with its worker.
        """
        results: dict[int, Result] = {}
        for attempt in range(ATTEMPTS):
            missing = [number for number in range(len(tasks)) if number not in results]
            if not missing:
                break
            if attempt:
                self._place.restart()
                self._sent = self._place.share(self._shared)
            results |= self._gather(function, tasks, missing)
        if len(results) < len(tasks):
            raise ExecutorError(
                f"{len(tasks) - len(results)} of {len(tasks)} tasks were lost with their workers {ATTEMPTS} times; "
                "see the workers' logs (memory?), or use --executor in-process"
            )
        return [results[number] for number in range(len(tasks))]

    def _gather(
        self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], numbers: Sequence[int]
    ) -> dict[int, Result]:
        """Results of those that were not lost."""
        futures: dict[int, Future[Result]] = {}
        found = {}
        try:
            for number in numbers:
                futures[number] = self._place.executor.submit(_call, function, self._sent, *tasks[number])
        except self._place.died:
            pass
        for number, future in futures.items():
            try:
                found[number] = future.result()
            except self._place.died:
                continue
        return found


_READ: dict[Path, object] = {}


def _call(function: Callable[..., Result], shared: object, *arguments: Any) -> Result:
    if isinstance(shared, SharedFile):
        if shared.path not in _READ:
            _READ.clear()
            _READ[shared.path] = pickle.loads(shared.path.read_bytes())
        shared = _READ[shared.path]
    return function(shared, *arguments)


@contextmanager
def open_executor(text: str) -> Iterator[Place]:
    """The place that `--executor` names.

    Raises:
        RecipeError: it names none.
        ExecutorError: it cannot be reached.
    """
    place = _open(text)
    try:
        yield place
    finally:
        place.close()


def _open(text: str) -> Place:
    kind, _, rest = text.partition(":")
    if text == "in-process":
        return InProcess()
    if kind == "processes" and rest.isdecimal() and int(rest) > 0:
        return Processes(int(rest))
    if kind == "dask" and rest.startswith("//") and ":" in rest:
        return DaskCluster(rest[2:])
    raise RecipeError(f"unknown executor {text!r}; the known ones are {KINDS}")
