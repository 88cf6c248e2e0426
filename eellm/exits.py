"""An early exit: where it is, and what its head is made of."""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

from eellm.errors import check_integer, check_one_of, invalid

MAX_EXITS = 64
MAX_LAYERS = 4096
HEADS: dict[str, tuple[str | None, str | None]] = {  # branch and norm of each shorthand
    "embedding": (None, None),
    "norm": (None, "own"),
    "mlp": ("mlp", "own"),
    "block": ("block", "own"),
}
OUTPUTS = {"own": -1, "embedding": -2, "final": -3}
_UNSET: Any = type("Unset", (), {"__repr__": lambda self: "unset"})()


@dataclass(frozen=True)
class ExitConfig:
    """An early exit: `[branch] -> [norm] -> output matrix` behind a layer (1 is the first).

    position: "after" or "before" the layer. branch: None, "mlp" (parallel to the layer's own MLP)
    or "block" (a whole layer). norm: None, "own" or "final" (the model's last norm). output: the
    output matrix: "own", "embedding", "final" or the index of another exit; None takes the
    embedding in a model with tied embeddings, else the final matrix. head is shorthand:
    "embedding", "norm", "mlp" or "block"; single fields override it.
    """

    layer: int
    position: str = "after"
    branch: str | None = _UNSET
    norm: str | None = _UNSET
    output: str | int | None = None
    head: InitVar[str | None] = None

    def __post_init__(self, head: str | None) -> None:
        """Resolves the shorthand and checks every field."""
        if head is not None:
            check_one_of("head of an early exit", head, tuple(HEADS))
        branch, norm = HEADS[head or "norm"]
        if self.branch is not _UNSET:
            branch = None if self.branch == "none" else self.branch
        if self.norm is not _UNSET:
            norm = None if self.norm == "none" else self.norm
        object.__setattr__(self, "branch", branch)
        object.__setattr__(self, "norm", norm)
        check_integer("layer of an early exit", self.layer, 1, MAX_LAYERS)
        where = f"of the early exit at layer {self.layer}"
        check_one_of(f"position {where}", self.position, ("after", "before"))
        check_one_of(f"branch {where}", self.branch, (None, "mlp", "block"))
        check_one_of(f"norm {where}", self.norm, (None, "own", "final"))
        if isinstance(self.output, int) and not isinstance(self.output, bool):
            check_integer(f"output {where}", self.output, 0, MAX_EXITS - 1)
        elif self.output is not None:
            check_one_of(f"output {where}", self.output, tuple(OUTPUTS))
        if self.branch == "mlp" and self.position == "before":
            raise invalid(
                f"position {where} is invalid",
                "after: an MLP branch is parallel to its layer's own MLP",
                self.position,
                "use branch block or none, or position after",
            )

    @property
    def depth(self) -> int:
        """Half layers that a token has passed when it takes the exit."""
        if self.branch == "mlp":
            return 2 * self.layer - 1
        return 2 * self.layer - 2 if self.position == "before" else 2 * self.layer

    def to_dict(self) -> dict[str, Any]:
        """The exit as it stands in config.json."""
        return {
            "layer": self.layer,
            "position": self.position,
            "branch": self.branch,
            "norm": self.norm,
            "output": self.output,
        }

    def to_core(self) -> dict[str, Any]:
        """The fields of struct ee_exit_config (csrc/model/config.h)."""
        output = self.output
        return {
            "layer": self.layer,
            "before": self.position == "before",
            "branch": self.branch or "none",
            "norm": self.norm or "none",
            "output": output if isinstance(output, int) else OUTPUTS[str(output)],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExitConfig":
        """An exit from config.json or TOML: `layer`, then any of the fields or `head`."""
        if not isinstance(values, Mapping):
            raise invalid("an early exit is not a table", "a table with the key layer", values)
        known = ("layer", "position", "branch", "norm", "output", "head")
        for key in values:
            if key not in known:
                raise invalid("unknown key of an early exit", f"one of {', '.join(known)}", key)
        if "layer" not in values:
            raise invalid("layer of an early exit is missing", "its layer", dict(values))
        return cls(**values)
