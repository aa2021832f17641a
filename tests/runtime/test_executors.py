"""The same results wherever work runs, and lost workers do not lose it."""

import os
import signal
import time
from pathlib import Path

import pytest

from mptqc.errors import ExecutorError, RecipeError
from mptqc.runtime.executors import ATTEMPTS, Workers, open_executor


def add(shared, number):
    return shared["base"] + number


def add_but_die_once(shared, number):
    """Kill this very process the first time that number 3 is asked for."""
    mark = Path(shared["folder"]) / "died"
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shared["base"] + number


def die(shared, number):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(shared, number):
    raise ValueError(f"task {number}")


TASKS = [(number,) for number in range(8)]


@pytest.mark.parametrize("executor", ["in-process", "processes:2"])
def test_results_come_in_order(executor):
    with open_executor(executor) as place:
        assert Workers(place, {"base": 10}).map(add, TASKS) == [10 + number for (number,) in TASKS]


def test_each_object_is_its_own(tmp_path):
    with open_executor("processes:1") as place:
        one, two = Workers(place, {"base": 1}), Workers(place, {"base": 2})
        assert [one.map(add, [(0,)]), two.map(add, [(0,)]), one.map(add, [(0,)])] == [[1], [2], [1]]


def test_the_tasks_of_a_dead_process_are_repeated(tmp_path):
    with open_executor("processes:2") as place:
        shared = {"base": 10, "folder": str(tmp_path)}
        assert Workers(place, shared).map(add_but_die_once, TASKS) == [10 + number for (number,) in TASKS]
    assert (tmp_path / "died").exists()


def test_a_task_that_always_kills_its_worker_is_given_up():
    with (
        open_executor("processes:1") as place,
        pytest.raises(ExecutorError, match=f"lost with their workers {ATTEMPTS}"),
    ):
        Workers(place, {}).map(die, [(1,)])


@pytest.mark.parametrize("executor", ["in-process", "processes:1"])
def test_an_error_of_a_task_is_not_repeated_but_raised(executor):
    with open_executor(executor) as place, pytest.raises(ValueError, match="task 7"):
        Workers(place, {}).map(fail, [(7,)])


@pytest.mark.parametrize("text", ["threads", "processes:0", "processes:two", "dask://nowhere", ""])
def test_an_unknown_executor_is_refused(text):
    with (
        pytest.raises(RecipeError, match="the known ones are in-process, processes:N, dask://host:port"),
        open_executor(text),
    ):
        pass


def slow_add(shared, number):
    """Slow enough that a worker is killed in the middle of many."""
    time.sleep(0.05)
    return shared["base"] + number


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as made:
        yield made


def test_a_dask_worker_that_dies_is_replaced(cluster):
    pids = [worker.process.pid for worker in cluster.workers.values()]
    with open_executor(cluster.scheduler_address.replace("tcp", "dask")) as place:
        workers = Workers(place, {"base": 10})
        future = place.executor.submit(time.sleep, 0)
        future.result()
        tasks = [(number,) for number in range(60)]
        futures = [place.executor.submit(slow_add, {"base": 10}, number) for (number,) in tasks[:4]]
        os.kill(pids[0], signal.SIGKILL)
        assert workers.map(slow_add, tasks) == [10 + number for (number,) in tasks]
        assert [future.result() for future in futures] == [10, 11, 12, 13]


def test_a_scheduler_that_is_not_there_is_an_error():
    pytest.importorskip("distributed")
    with (
        pytest.raises(ExecutorError, match=r"no Dask scheduler answers at 127\.0\.0\.1:9"),
        open_executor("dask://127.0.0.1:9"),
    ):
        pass
