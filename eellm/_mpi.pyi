"""The transport over Open MPI; built where setup.py finds one. Use eellm.distributed instead."""

from typing import Any

def world(host: Any, timeout: float, largest: int = 2147483647, /) -> Any:
    """The communicator of all ranks, in the capsule "eellm.comm"; starts MPI at the first call.

    timeout: seconds, > 0. largest: bytes of a message that is sent as bytes; above, as blocks.
    Raises eellm.CommError, and ImportError where the core has another version.
    """

def end() -> None:
    """Ends MPI with the other ranks; does nothing after a failure."""

def kill() -> None:
    """Ends the processes of all ranks with status 1; does not return."""

def has_failed() -> bool: ...
def is_started() -> bool:
    """Whether MPI runs in this process."""

def library() -> str:
    """How the MPI that was loaded calls itself."""
