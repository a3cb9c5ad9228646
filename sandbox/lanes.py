"""The trusted end of the lanes: starts fork servers (`child.py`) by exec; while a batch runs, a thread waits for each.

A server is started with a fixed hash seed in an otherwise empty environment, with no descriptor but its socket, before
the trainer grows or touches a GPU, and is never forked from the trainer. It ends when its socket does, so nothing
survives the trainer, however that ends. Nothing a server sends is trusted beyond its form.

What it deliberately leaves out: what the lines mean (`executor.py`), what happens to a program (`child.py`). Paper:
arXiv 2505.03335 has no counterpart. Usage: through `executor.Executor`.
"""

import json
import marshal
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from sandbox.child import FRAME, receive

# The repository goes to the end of the path: none of its files may shadow a standard module.
BOOT = "import sys; sys.path.append(sys.argv.pop(1)); import sandbox.child; sandbox.child.main()"


class Lane:
    """A fork server and the socket to it. `starts`: how often it was started; `deaths`: how often in a row it died."""

    def __init__(self, seed: int, config: dict) -> None:
        self.seed, self.config, self.starts, self.deaths = seed, config, 0, 0
        self.start()

    def start(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.layers, self.starts = {}, self.starts + 1
        # Empty otherwise; -I and -E would ignore the seed. Some interpreters find their own library by the path.
        environment = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
        environment["PYTHONHASHSEED"] = str(self.seed)
        here, fd, null = Path(__file__).resolve().parent.parent, theirs.fileno(), subprocess.DEVNULL
        python = [sys.executable, "-sSPB", "-Xutf8", "-Wignore", "-c", BOOT]
        command = [*python, str(here), str(fd), json.dumps(self.config)]
        with theirs:  # a session of its own: Ctrl-C is for the trainer, the server ends when its socket does
            self.process = subprocess.Popen(
                command, pass_fds=[fd], env=environment, cwd="/", stdin=null, stdout=null, start_new_session=True
            )

    def ready(self) -> dict:
        """Wait until a server is there and confined; returns the layers that hold. EOFError, OSError: it ended."""
        if self.process.poll() is not None:
            self.close()
            self.start()
        if not self.layers:
            self.socket.settimeout(self.config["hang_s"])
            self.layers = json.loads(receive(self.socket.recv))
        return self.layers

    def close(self) -> int:
        """End the server (and, by its parent-death signal, its child); returns its exit status."""
        self.socket.close()
        self.process.kill()
        return self.process.wait()


class Pool:
    """All lanes of an executor."""

    def __init__(self, count: int, config: dict) -> None:
        self.config, self.stopping, seeds = config, False, config["hash_seeds"]
        self.lanes = [Lane(seeds[i % len(seeds)], config) for i in range(max(count, len(seeds)))]
        self.free: dict[int, SimpleQueue] = {seed: SimpleQueue() for seed in seeds}
        for lane in self.lanes:
            self.free[lane.seed].put(lane)

    def ask(self, seed: int, program: str, calls: list[bytes], repeats: int, cpu_s: float, memory: int) -> tuple:
        """Have one child of a server with this seed run a program and call it: (claims of each call, CPU seconds).

        A claim is a line `verdict TAB text` for each repeat of the call. The last call may have killed the child: then
        its only claim is the cause. A server that dies (or hangs and is killed) is started again and the job tried once
        more: the program may be the reason. RuntimeError: it keeps dying, and that must not pass for a wrong program.
        """
        job, attempts = marshal.dumps((program, calls, repeats, cpu_s, memory)), 0
        patience = self.config["hang_s"] + len(calls) * repeats * (self.config["wall_s"] + 100 * cpu_s)
        lane = self.free[seed].get()
        try:
            while not self.stopping and lane.deaths < self.config["deaths"]:
                try:
                    lane.ready()
                    lane.socket.settimeout(patience)
                    lane.socket.sendall(FRAME.pack(len(job)) + job)
                    spent, *claims, cause = receive(lane.socket.recv).decode("utf-8", "replace").split("\n")
                    lane.deaths = 0
                    whole = [claims[i : i + repeats] for i in range(0, len(claims) - repeats + 1, repeats)]
                    return [*whole, [cause]][: len(calls)], float(spent)
                except (EOFError, OSError, ValueError):  # it ended, hangs, or sent what is no reply
                    status = lane.close()
                if status == -signal.SIGPROF:
                    return [["timeout\tcompile"]] * len(calls), 0.0
                lane.deaths += 1
                attempts += lane.layers != {} and status != 0  # else it never was, or had grown and retired
                if attempts == 2:
                    return [["runtime_error\tserver_died"]] * len(calls), 0.0
            raise RuntimeError("the executor's servers keep dying: run `python executor.py --doctor`")
        finally:
            self.free[seed].put(lane)

    def each(self, function: Callable, items: Sequence) -> Iterator:
        """function(item) of each item, as they get ready, in as many threads as there are lanes. Any exception, Ctrl-C
        too, ends the servers; they start again at their next use. To be closed: the caller may raise one as well."""
        left, finished, futures, self.stopping = iter(items), SimpleQueue(), [], False

        def work() -> None:
            for item in left:  # one iterator for all threads
                finished.put(function(item))

        with ThreadPoolExecutor(len(self.lanes)) as threads:
            try:
                for _ in self.lanes[: len(items)]:
                    futures.append(threads.submit(work))
                    futures[-1].add_done_callback(finished.put)
                for _ in [*items, *futures]:
                    done = finished.get()
                    if isinstance(done, Future):
                        done.result()  # a thread has nothing left, or raises here what it has raised
                    else:
                        yield done
            finally:
                self.stopping = True
                while sum(free.qsize() for free in self.free.values()) < len(self.lanes):  # the others are in use
                    for lane in self.lanes:
                        lane.process.kill()
                    time.sleep(0.01)

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
