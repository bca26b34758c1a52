"""What the host knows of a cell that has ended."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CellError:
    """The exception of a cell, as text."""

    type: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class CellResult:
    """`stdout` and `stderr` are head and tail when more was written; the true sizes are beside them."""

    cell_id: str
    status: str
    """ok · error · interrupted · timeout · rolled_back."""
    stdout: str = ""
    stderr: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    error: CellError | None = None
    rollback: str | None = None
    """Why the process died, when it did: every variable is then as before the cell, or, where `notices` say
    so, as before earlier ones that had no checkpoint."""
    answer_ready: bool = False
    answer: str = ""
    no_checkpoint: str | None = None
    notices: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    """Name to type name."""
    seconds: float = 0.0

    @property
    def rolled_back(self) -> bool:
        return self.status == "rolled_back"


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    type: str
    repr: str
    """At most 200 characters."""
