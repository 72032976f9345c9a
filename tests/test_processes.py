"""A task that kills its process, hangs or fails costs no other task its result."""

import multiprocessing
import os
import signal
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from avid import processes
from avid.processes import Crash


def act(kind, number):
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(3600)
    if kind == "fail":
        raise ValueError(f"no {number}")
    return 10 * number


def clean_up(path):
    open(path, "w").close()
    try:
        time.sleep(3600)
    finally:
        os.unlink(path)


def write_after(path, seconds):
    time.sleep(seconds)
    open(path, "w").close()
    return seconds


@pytest.mark.parametrize("workers", [1, 3])
def test_a_crash_is_named_and_the_other_tasks_are_done(workers):
    tasks = [("segfault" if number in (2, 5) else "", number) for number in range(9)]
    results = dict(processes.outcomes(act, tasks, workers, limit_s=60))
    assert len(results) == 9
    for (kind, number), result in results.items():
        assert isinstance(result, Crash) and "SIGSEGV" in result.reason if kind else result == 10 * number


def test_a_task_that_hangs_is_ended_and_the_other_tasks_are_done():
    results = dict(processes.outcomes(act, [("hang", 0), ("", 1), ("", 2)], 1, limit_s=3))
    assert isinstance(results["hang", 0], Crash) and "more than 3 s" in results["hang", 0].reason
    assert results["", 1] == 10 and results["", 2] == 20


def test_a_result_that_waits_for_a_busy_caller_did_not_take_too_long(tmp_path, monkeypatch):
    now_s, done = [0.0], tmp_path / "done"
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    tasks = [(str(tmp_path / "first"), 0.0), (str(done), 2.0)]
    with closing(processes.outcomes(write_after, tasks, 2, limit_s=60)) as results:
        assert next(results) == (tasks[0], 0.0)
        while not done.exists():
            time.sleep(0.1)
        time.sleep(1)  # its result is sent
        now_s[0] = 61.0
        assert list(results) == [(tasks[1], 2.0)]


def test_an_exception_is_raised_where_the_results_are_read():
    with pytest.raises(RuntimeError, match="ValueError: no 7"):
        list(processes.outcomes(act, [("fail", 7)], 1, limit_s=60))


def test_stopping_early_leaves_no_process_and_no_partial_file(tmp_path):
    half = tmp_path / "half"
    with closing(processes.outcomes(clean_up, [(str(half),)], 1, limit_s=0.2)) as results:
        assert isinstance(next(results)[1], Crash)
    assert not multiprocessing.active_children() and not half.exists()
    with closing(processes.outcomes(act, [("", 1), ("hang", 2)], 2, limit_s=60)) as results:
        assert next(results) == (("", 1), 10)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()
