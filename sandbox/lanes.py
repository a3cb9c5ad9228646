"""The trusted end of the lanes: starts fork servers (`child.py`) by exec, a thread waits for each while a batch runs.

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
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from sandbox.child import FRAME, HEAD, receive

# The repository goes to the end of the path: none of its files may shadow a standard module.
BOOT = "import sys; sys.path.append(sys.argv.pop(1)); import sandbox.child; sandbox.child.main()"


@dataclass(frozen=True)
class Fork:
    """One child to come, in a server of this hash seed: a program and some of its calls (`cell.call`, marshalled)."""

    seed: int
    program: str
    cells: list
    repeats: int
    cpu_s: float
    memory: int


@dataclass(frozen=True)
class Reply:
    """What a child claimed, a line `verdict TAB text` per repeat of each call; `cause`: why the next line is missing."""

    lines: list[str]
    cause: str = ""
    cpu_s: float = 0.0


class Lane:
    """A fork server and the socket to it. `starts`: how often it was started; `deaths`: how often in a row it died."""

    def __init__(self, seed: int, config: dict) -> None:
        self.seed, self.config, self.starts, self.deaths, self.busy = seed, config, 0, 0, False
        self.start()

    def start(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.inbox, self.layers, self.starts = self.socket.makefile("rb"), {}, self.starts + 1
        environment = {"PYTHONHASHSEED": str(self.seed)}  # empty otherwise; -I and -E would ignore the seed
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters find their own library by it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        here, config = str(Path(__file__).resolve().parent.parent), json.dumps(self.config)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-sSPB", "-Xutf8", "-Wignore", "-c", BOOT, here, str(theirs.fileno()), config],
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer; the server ends when its socket does
            )

    def greet(self) -> dict:
        """Wait until the server is confined; returns the layers that hold. EOFError, OSError: it ended or hangs."""
        self.socket.settimeout(self.config["hang_s"])
        self.layers = json.loads(receive(self.inbox))
        return self.layers

    def ask(self, fork: Fork) -> Reply:
        """Have one child run. A server that dies (or hangs and is killed) is started again, and the fork tried once
        more: the program may be the cause. RuntimeError: the servers of this lane keep dying."""
        attempts, lines = 0, len(fork.cells) * fork.repeats
        while self.deaths < self.config["deaths"]:
            try:
                if self.process is None:
                    self.start()
                layers = self.layers or self.greet()
                self.socket.settimeout(self.config["hang_s"] + lines * (self.config["wall_s"] + 100 * fork.cpu_s))
                calls = [cell.call for cell in fork.cells]
                job = marshal.dumps((fork.program, calls, fork.repeats, fork.cpu_s, fork.memory))
                self.socket.sendall(FRAME.pack(len(job)) + job)
                message = receive(self.inbox)
                (cpu_s,), text = HEAD.unpack_from(message), message[HEAD.size :].decode("utf-8", "replace")
                *claims, cause = text.split("\n")
                self.deaths = 0
                return Reply(claims, cause, cpu_s)
            except (EOFError, OSError, struct.error):
                status = self.close()
            if status == -signal.SIGPROF:
                return Reply(["timeout\tcompile"] * lines)
            self.deaths += 1
            attempts += status != 0  # 0: it retired because it had grown
            if attempts == 2:
                return Reply(["runtime_error\tserver_died"] * lines)
        # a broken machine must not pass for wrong programs
        raise RuntimeError("the executor's servers keep dying: run `python executor.py --doctor`")

    def close(self) -> int:
        """End the server (and, by its parent-death signal, its child); returns its exit status."""
        if self.process is None:
            return 0
        self.inbox.close()
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        status, self.process = self.process.wait(), None
        return status


def drive(lanes: Sequence[Lane], forks: Sequence[Fork], follow: Callable[[Fork, Reply], list[Fork]]) -> None:
    """Have these forks run, and those that `follow(fork, reply)` returns, which is called in the caller's thread. Any
    exception, Ctrl-C too, ends the servers that are busy."""
    seeds = {lane.seed for lane in lanes}
    free: dict[int, SimpleQueue] = {seed: SimpleQueue() for seed in seeds}
    pools = {seed: ThreadPoolExecutor(sum(lane.seed == seed for lane in lanes)) for seed in seeds}
    for lane in lanes:
        free[lane.seed].put(lane)

    def ask(fork: Fork) -> tuple[Fork, Reply]:
        lane = free[fork.seed].get()
        lane.busy = True
        try:
            return fork, lane.ask(fork)
        finally:
            lane.busy = False
            free[fork.seed].put(lane)

    done, running = SimpleQueue(), 0
    try:
        while forks or running:
            for fork in forks:
                pools[fork.seed].submit(ask, fork).add_done_callback(done.put)
            running += len(forks) - 1
            forks = follow(*done.get().result())
    finally:
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        while any(lane.busy for lane in lanes):
            for lane in lanes:
                if lane.busy and (process := lane.process) is not None:
                    process.kill()
            time.sleep(0.01)
        for pool in pools.values():
            pool.shutdown()


def close_lanes(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.close()
