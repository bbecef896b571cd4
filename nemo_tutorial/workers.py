"""One function over many tasks, in processes of their own: results in order, few at a time, no waiting for the dead.

Why not multiprocessing.Pool: it waits for ever for the result of a worker that the kernel killed.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import wait

AHEAD = 2  # tasks given to a worker at a time: it begins the next while the result of the last is being used
LEAD = 4  # tasks a worker that may have been read, and not all of their results taken


class Died(Exception):
    """A worker ended without a result; says how."""


def ordered(function, tasks, count):
    """Yield function(task) for each of `tasks`, in their order, computed by `count` forked processes.

    `tasks` is read in this process, at most LEAD x `count` ahead of what has been yielded. Tasks and results should be
    small (a pipe holds 64 kB): what is large travels through files. Raises Died within a moment of a worker's death,
    and what `function` raises.
    """
    context = multiprocessing.get_context("fork")  # what the parent has loaded is shared, not loaded again
    pool = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            inherited = [*(connection for connection, _ in pool), ours]
            process = context.Process(target=_serve, args=(function, theirs, inherited), daemon=True)
            process.start()
            theirs.close()
            pool.append((ours, process))
        yield from _results(enumerate(tasks), pool)
    finally:
        for connection, process in pool:
            connection.close()
            process.kill()
            process.join()


@contextlib.contextmanager
def aside(function):
    """Run function() in a forked process that then ends, while the block runs; yields what waits for its result.

    That raises Died if the process died, and what `function` raises.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_once, args=(function, theirs, ours), daemon=True)
    process.start()
    theirs.close()
    try:
        yield lambda: _result(_receive(ours, process))
    finally:
        ours.close()
        process.kill()
        process.join()


def _results(tasks, pool):
    busy, done, wanted, given, more = [0] * len(pool), {}, 0, 0, True
    while True:
        for index in sorted(range(len(pool)), key=busy.__getitem__):
            while more and busy[index] < AHEAD and given < wanted + LEAD * len(pool):
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                _send(pool[index], task)
                busy[index] += 1
                given += 1
        if not more and wanted == given:
            return
        ready = wait([connection for connection, _ in pool] + [process.sentinel for _, process in pool])
        for index, (connection, process) in enumerate(pool):
            while busy[index] and connection.poll():
                number, *answer = _receive(connection, process)
                done[number] = _result(answer)
                busy[index] -= 1
            if process.sentinel in ready:
                raise Died(_cause(process))
        while wanted in done:
            yield done.pop(wanted)
            wanted += 1


def _send(worker, task):
    connection, process = worker
    try:
        connection.send(task)
    except OSError:
        raise Died(_cause(process)) from None


def _receive(connection, process):
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise Died(_cause(process)) from None


def _cause(process):
    process.join(5)
    code = process.exitcode
    if code == -signal.SIGKILL:
        return f"worker {process.pid} was killed (signal 9), as the kernel does when memory runs out; see `dmesg`"
    if code is not None and code < 0:
        return f"worker {process.pid} was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"worker {process.pid} ended with exit code {code}"


def _serve(function, connection, inherited):
    # Or the pipes would stay open, and this process alive, after the parent's death.
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    while True:
        try:
            number, task = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        answer = number, *_answer(function, task)
        try:
            connection.send(answer)
        except OSError:
            os._exit(0)


def _once(function, connection, other):
    other.close()  # as in _serve: or a long result would wait for a reader for ever after the parent's death
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # nobody waits any more
        connection.send(_answer(function))
    os._exit(0)


def _answer(function, *task):
    """(result, None, None), or (None, what was raised, its traceback)."""
    try:
        return function(*task), None, None
    except Exception as error:
        return None, error, traceback.format_exc()


def _result(answer):
    result, error, where = answer
    if error:
        raise error from RuntimeError(f"in a worker:\n{where}")
    return result
