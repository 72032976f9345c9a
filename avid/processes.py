"""A function over many tasks, in processes that may crash.

In: a function and its arguments, task by task.
Out: (task, result) as they are done. A decoder's segmentation fault costs one task, not the rest.
"""

import multiprocessing
import signal
import sys
import time
import traceback
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait
from typing import NamedTuple


class Crash(NamedTuple):
    """In the place of a result: the task ended its process, or it took too long."""

    reason: str


def outcomes(function, tasks, workers, limit_s):
    """Yield (task, function(*task)), a Crash where there is no result, as they are done in `workers`
    processes.

    A process gets limit_s seconds a task. An exception of `function` is raised here, with its traceback.
    Closing the generator ends the processes, and with SIGTERM first: what `function` has to clean up in that
    case it does in `finally`.
    """
    forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forkserver else "spawn")
    context.set_forkserver_preload(["avid.media"])  # imported once
    tasks, idle, busy = deque(tasks), {}, {}  # idle: {pipe: process}, busy: {pipe: (process, task, deadline)}
    try:
        while tasks or busy:
            while tasks and len(busy) < workers:
                pipe, process = idle.popitem() if idle else _start(context, function)
                busy[pipe] = process, tasks.popleft(), time.monotonic() + limit_s
                with suppress(BrokenPipeError):  # a process that has ended shows below
                    pipe.send(busy[pipe][1])
            for pipe in wait(list(busy), timeout=1.0):
                process, task, _ = busy[pipe]
                try:
                    result = pipe.recv()
                    idle[pipe] = process
                except (EOFError, ConnectionResetError):
                    process.join()
                    result = Crash(f"crashes the decoder: its process ended with {ending(process.exitcode)}")
                del busy[pipe]
                if isinstance(result, RuntimeError):
                    raise result
                yield task, result
            for pipe, (process, task, deadline) in list(busy.items()):
                if time.monotonic() > deadline and not pipe.poll():  # its result may wait for the caller
                    _end([process])
                    del busy[pipe]
                    yield task, Crash(f"takes the decoder too long: more than {limit_s:g} s")
    finally:
        _end([*idle.values(), *(process for process, _, _ in busy.values())])


def ending(code):
    """A process's exit code in words."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _start(context, function):
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function), daemon=True)
    process.start()
    there.close()
    return here, process


def _serve(pipe, function):
    """A worker: a task, its result, the next one, until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    # an exception: `finally` is kept, subprocess.run ends its child
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with suppress(EOFError, ConnectionError):
        while True:
            task = pipe.recv()
            try:
                result = function(*task)
            except Exception:
                result = RuntimeError(traceback.format_exc())
            pipe.send(result)


def _end(processes):
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5.0)
        if process.is_alive():  # within a decoder that does not return
            process.kill()
            process.join()
