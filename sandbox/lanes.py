"""The trusted end of a lane: starts one fork server (`child.py`) by exec and moves bytes to and from it.

A server is started with a fixed hash seed in an otherwise empty environment, with no descriptor but its socket, in a
session of its own, before the trainer grows or touches a GPU, and is never forked from the trainer. It ends when its
socket does, so nothing survives the trainer, however that ends. Nothing a server sends is trusted beyond its form.

What it deliberately leaves out: what the bytes mean (`batch.py`) and what happens to a program
(`child.py`).
Paper: arXiv 2505.03335 has no counterpart.
"""

import json
import marshal
import os
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from sandbox.child import FRAME

# The repository goes to the end of the path: none of its files may shadow a standard module.
BOOT = "import sys; sys.path.append(sys.argv.pop(1)); import sandbox.child; sandbox.child.main()"


class Lane:
    """A fork server process and the socket to it. Jobs go down, claims come up; nothing it sends is trusted."""

    def __init__(self, seed: int, config: dict) -> None:
        self.seed, self.config, self.process, self.layers = seed, config, None, {}
        self.start()

    def start(self) -> None:
        self.socket, theirs = socket.socketpair()
        here = str(Path(__file__).resolve().parent.parent)
        command = [sys.executable, "-sSPB", "-Xutf8", "-Wignore", "-c", BOOT, here]
        environment = {"PYTHONHASHSEED": str(self.seed)}  # empty otherwise; -I and -E would ignore the seed
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters find their own library by it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        null = subprocess.DEVNULL
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), json.dumps(self.config)],
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd="/",
                stdin=null,
                stdout=null,
                start_new_session=True,  # Ctrl-C is for the trainer; the server ends when its socket does
            )
        self.busy, self.outbox, self.inbox, self.deadline = deque(), bytearray(), bytearray(), 0.0
        self.layers = {}

    def ready(self) -> int:
        """Make sure that a confined server is there; returns how many had to be started again for it."""
        for attempt in range(3):
            if self.process is None:
                self.start()
            try:
                if not self.layers:
                    self.hello()
                return attempt
            except EOFError:
                self.close()
        raise RuntimeError("the executor's server does not start: run `python executor.py --doctor`")

    def hello(self) -> None:
        """Wait until the server is confined and read what holds there. EOFError: it ended instead."""
        self.socket.settimeout(60)
        try:
            while (message := self.message()) is None:
                piece = self.socket.recv(65536)
                if not piece:
                    raise EOFError
                self.inbox += piece
        except ConnectionResetError:
            raise EOFError from None
        except TimeoutError:
            raise RuntimeError("the executor's server did not start within 60 s: is the machine overloaded?") from None
        self.layers = json.loads(message)
        self.socket.setblocking(False)

    def message(self) -> bytes | None:
        if len(self.inbox) < FRAME.size:
            return None
        end = FRAME.size + FRAME.unpack_from(self.inbox)[0]
        if len(self.inbox) < end:
            return None
        message = bytes(self.inbox[FRAME.size : end])
        del self.inbox[:end]
        return message

    def submit(self, unit, repeats: int, memory: int) -> None:
        job = marshal.dumps((unit.program, [cell.call for cell in unit.cells], repeats, unit.cpu_s, memory))
        self.outbox += FRAME.pack(len(job)) + job
        self.busy.append(unit)
        self.expect()
        self.flush()

    def expect(self) -> None:
        """Give the job in front a deadline, far beyond the server's own limits: for a server that hangs."""
        if self.busy:
            self.deadline = time.monotonic() + 60 + 120 * self.busy[0].cpu_s * len(self.busy[0].cells)

    def flush(self) -> None:
        """Send what the socket takes without blocking. That the server is gone will show when reading."""
        with suppress(OSError):
            while self.outbox:
                del self.outbox[: self.socket.send(self.outbox)]

    def transfer(self) -> bool:
        """Move bytes both ways without blocking; False when the server is gone."""
        self.flush()
        try:
            piece = self.socket.recv(1 << 20)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.inbox += piece
        return bool(piece)

    def close(self) -> int | None:
        """End the server (and, by its parent-death signal, its child); returns its exit status."""
        if self.process is None:
            return None
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.busy.clear()
        status, self.process = self.process.wait(), None
        return status


def close_lanes(lanes: list[Lane]) -> None:
    for lane in lanes:
        lane.close()
