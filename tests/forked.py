"""Runs the project's scripts in processes forked from one that has already imported everything. A start then
takes milliseconds.

In: a script's name and its command line. Out: a process in a group of its own, which ends as
`python script …` would end.
"""

import atexit
import importlib
import multiprocessing.forkserver
import multiprocessing.util
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["train", "eval_linear", "eval_retrieval"]  # when imported as modules, they do nothing
# what they import later: for an optimiser, pictures, classifiers, packed data
LATER = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "torchvision.io"]
LATER += ["sklearn.linear_model", "sklearn.svm", "avid.tools.figures"]
context = multiprocessing.get_context("forkserver")


def from_here():
    """Fork the processes from this one instead of from a server.

    Only for scripts that start no threads. OMP_NUM_THREADS must be 1 before torch is imported.
    """
    global context
    assert os.environ["OMP_NUM_THREADS"] == "1"
    sys.path.insert(0, str(ROOT))
    for name in SCRIPTS:
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")


def serve():
    """Start the server that the processes are forked from, unless it runs already.

    It is the one that avid.processes uses, too: whoever starts it first decides what it has imported.
    """
    if context.get_start_method() == "fork":
        return
    context.set_forkserver_preload([*SCRIPTS, *LATER])
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    multiprocessing.forkserver.ensure_running()
    os.environ.clear(), os.environ.update(before)


def ranks(function, world, *arguments):
    """Run function(rank, world, *arguments) in so many processes; an error of one of them is raised here."""
    import torch.multiprocessing  # here: see from_here

    serve()
    how = {"nprocs": world, "start_method": context.get_start_method(), "join": False}
    started = torch.multiprocessing.start_processes(function, (world, *arguments), **how)
    deadline = time.monotonic() + 300
    while not started.join(deadline - time.monotonic()):
        assert time.monotonic() < deadline, "the processes wait for each other"


def start(script, arguments, folder, log, environment=None, before=None):
    """Run a script of the project in `folder` with its output in the file `log`; returns a
    multiprocessing.Process.

    The process leads a group of its own. before: a function that the process calls first; it must be
    picklable.
    """
    serve()
    process = context.Process(
        target=_run, args=(script, [str(a) for a in arguments], folder, log, environment or {}, before)
    )
    process.start()
    while process.is_alive() and os.getpgid(process.pid) != process.pid:
        time.sleep(0.001)
    return process


def run(script, arguments, folder):
    """Run a script of the project in `folder` to its end, which must be a good one."""
    log = Path(folder) / "log"
    process = start(script, arguments, folder, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]


def _run(script, arguments, folder, log, environment, before):
    os.setpgid(0, 0)
    multiprocessing.set_start_method(None, force=True)  # start decoding processes in the default way
    os.chdir(folder)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    if before:
        before()
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(ROOT / script), *arguments]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # the interpreter also keeps the traceback until it exits
        traceback.print_exc()
        sys.last_traceback = error.__traceback__
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    multiprocessing.util._exit_function()
    sys.stdout.flush(), sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def group(leader):
    """The ids of the processes in a group, without zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):  # the process has just ended
            continue
        if int(its_group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def left(leader, seconds):
    """Wait up to so many seconds for a group to end. Returns the processes that still run; expected: none."""
    deadline = time.monotonic() + seconds
    while (found := group(leader)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
