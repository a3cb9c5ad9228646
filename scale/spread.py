"""Ranks that play the same step: the work is divided, every rank gets all results.

`Ranks` is all that the processes of a run say to each other beside gradients and weights; `spread_engine` and
`SpreadExecutor` divide prompts and programs. What it leaves out: balance; item i goes to rank i modulo their number.

    ranks = Ranks(); executor = SpreadExecutor(ranks); results = ranks.spread(items, work)
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch.distributed as dist

from executor import Executor, most_lanes
from policy.engine import Engine, first_line


class RankError(ValueError):
    """What stopped one of the ranks, raised on all of them."""


class Ranks:
    """This process among those of the run, as the launcher names them; alone without one. Everything goes through
    `exchange`, in the same order on every rank: one that fails tells the others in place of what they wait for."""

    def __init__(self) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        self.rank, self.size, self.local = (int(os.environ.get(name, name != "RANK")) for name in names)

    @cached_property
    def group(self) -> dist.ProcessGroup:
        return dist.new_group(backend="gloo")  # results lie in host memory, on a machine with GPUs too

    def exchange(self, value: object, error: Exception | None = None) -> list:
        """The values of all ranks, in their order. Raises RankError on all of them where one brought an error."""
        said = [(value, first_line(error) if error else "")]
        if self.size > 1:
            mine, said = said[0], [None] * self.size
            dist.all_gather_object(said, mine, group=self.group)
        for rank, (_, cause) in enumerate(said):
            if cause:
                raise RankError(f"rank {rank}: {cause}") from error
        return [value for value, _ in said]

    def gather(self, work: Callable, *arguments) -> list:
        """work(*arguments) on every rank; the results of all, in their order. An error on one is raised on all."""
        try:
            result = work(*arguments)
        except RankError:
            raise  # the others know
        except (OSError, ValueError, RuntimeError) as error:
            return self.exchange(None, error)
        return self.exchange(result)

    def together(self, work: Callable, *arguments) -> object:
        """As `gather`, for work that every rank does for itself: returns its own result and sends none."""
        done: list = []
        self.gather(lambda: done.append(work(*arguments)))
        return done[0]

    def spread(self, items: Sequence, work: Callable[[Sequence], Sequence], copies: int = 1) -> list:
        """work(items), one result each, a share on every rank. `copies`: neighbours that do the same share."""
        parts = self.size // copies
        shares = self.gather(work, items[self.rank // copies :: parts])[::copies]
        return [shares[i % parts][i // parts] for i in range(len(items))]

    def must_agree(self, what: str, parts: Iterable[object]) -> None:
        """Raise RankError on all ranks unless these parts are the same on each; `what` names them."""
        digests = self.exchange(hashlib.sha256(repr(list(parts)).encode()).digest())
        if other := [rank for rank, found in enumerate(digests) if found != digests[0]]:
            raise RankError(f"{what} of rank {other[0]} are not those of rank 0: resume from the last checkpoint")


def spread_engine(engine: Engine, ranks: Ranks, copies: int = 1) -> Engine:
    """Divide an engine's requests over the ranks. They were numbered and seeded before (`Engine.generate`), so what is
    sampled does not depend on the number of ranks, but for rounding. `copies`: ranks that hold one engine together."""
    alone = engine._run
    engine._run = lambda requests, *how: ranks.spread(requests, lambda own: alone(own, *how), copies)
    return engine


class SpreadExecutor(Executor):
    """An executor whose jobs are divided over the ranks. All take over the verdict of the rank that ran a program: one
    that times out on a busy machine must not pull the buffers apart."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(max(2, most_lanes() // ranks.local))
        self.ranks = ranks

    def run(self, jobs, progress=None, cpu_s: float | None = None) -> list:
        return self.ranks.spread(jobs, lambda own: Executor.run(self, own, progress, cpu_s))

    def validate(self, jobs, progress=None) -> list:
        return self.ranks.spread(jobs, lambda own: Executor.validate(self, own, progress))

    def verify(self, jobs, progress=None) -> list:
        return self.ranks.spread(jobs, lambda own: Executor.verify(self, own, progress))
