"""What the ranks of a job do together with files: each its part, all of it or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from eellm._core import Comm

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another rank failed; its own error says why."""


class Peers:
    """The ranks that work on the same files; without a communicator one process alone.

    Every method is called by all ranks, in the same order.
    """

    def __init__(self, comm: Comm | None = None) -> None:
        """comm: of all ranks that take part."""
        self._comm = comm if comm is not None and comm.size > 1 else None
        self.rank = 0 if self._comm is None else self._comm.rank
        self.size = 1 if self._comm is None else self._comm.size

    @property
    def first(self) -> bool:
        """Whether this is the rank that does what one alone can do."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values (of JSON) of all ranks, by rank; PeerError if one of them failed."""
        return [value] if self._comm is None else self._exchange({"value": value})

    def _exchange(self, mine: dict[str, Any]) -> list[Any]:
        assert self._comm is not None
        found = [json.loads(each) for each in self._comm.all_gather(json.dumps(mine).encode())]
        for rank, each in enumerate(found):
            if "error" in each:
                raise PeerError(f"rank {rank}: {each['error']}")
        return [each["value"] for each in found]

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank; where one fails all raise, that one its own error."""
        if self._comm is None:
            return work()
        try:
            result = work()
        except PeerError:
            raise
        except Exception as error:
            try:
                self._exchange({"error": f"{type(error).__name__}: {error}"})
            except PeerError:
                pass
            raise
        self._exchange({"value": None})
        return result

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` (a value of JSON) returns on the first rank, on all."""
        found: list[Any] = [None]

        def run() -> None:
            if self.first:
                found[0] = work()

        self.together(run)
        return self.gather(found[0])[0]

    def agree(self, what: str, value: str) -> None:
        """ValueError on all ranks unless they all have the same value."""
        found = self.gather(value)
        other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            raise ValueError(
                f"the ranks have different {what} (expected the same on all, got another on rank "
                f"{other} than on rank 0); start all ranks with the same command and files"
            )
