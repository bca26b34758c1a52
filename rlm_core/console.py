"""What a person sees of a run: its turns in full (verbose), or one line of progress."""

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

from rlm_core.cell import CellResult
from rlm_core.feedback import show
from rlm_core.observer import Observer
from rlm_core.parsing import without_thinking
from rlm_core.text import one_line, printable, shorten
from rlm_core.types import RLMChatCompletion, RLMIteration

SHOWN_CHARS = 2_000


class ConsoleObserver(Observer):
    """Each turn: the reply, each block and what came of it."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._turn = ""

    def run_started(self, question: str, run_id: str) -> None:
        self._print(f"run {run_id}: {one_line(question or 'the request is in the context', 200)}", "bold")

    def turn_started(self, turn: int, turns: int) -> None:
        self._turn = f"turn {turn} of {turns}"

    def cell_started(self, code: str) -> None:
        self._console.print(Panel(Syntax(shorten(printable(code), SHOWN_CHARS), "python"), title=self._turn))

    def cell_ended(self, result: CellResult) -> None:
        style = {"ok": "dim", "rolled_back": "red"}.get(result.status, "yellow")
        self._print(shorten(show(result), SHOWN_CHARS), style)

    def turn_ended(self, iteration: RLMIteration, turn: int, tokens: int) -> None:
        if not iteration.code_blocks:
            self._print(shorten(without_thinking(iteration.response), SHOWN_CHARS), "")
        calls = sum(len(block.result.rlm_calls) for block in iteration.code_blocks)
        self._print(
            f"{self._turn}: {iteration.iteration_time:.2f} s, {calls} sub-calls, {tokens:,} tokens", "cyan"
        )

    def run_ended(self, completion: RLMChatCompletion) -> None:
        text = Text(printable(shorten(completion.response, SHOWN_CHARS)))
        title = f"{completion.status} · {completion.iterations} turns · {completion.execution_time:.1f} s"
        self._console.print(
            Panel(text, title=title, style="green" if completion.status == "answered" else "yellow")
        )

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(printable(text)), style=style)


class ProgressObserver(Observer):
    """One line that says where the run is; gone when it has ended."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, transient=True, auto_refresh=console.is_terminal)
        self._turn = "starting"
        self._cells = self._in_flight = self._calls = self._tokens = 0

    def run_started(self, question: str, run_id: str) -> None:
        self._live.start()
        self._show()

    def turn_started(self, turn: int, turns: int) -> None:
        self._turn = f"turn {turn} of {turns}"
        self._show()

    def cell_ended(self, result: CellResult) -> None:
        self._cells += 1
        self._show()

    def calls_changed(self, in_flight: int, made: int) -> None:
        self._in_flight, self._calls = in_flight, made
        self._show()

    def turn_ended(self, iteration: RLMIteration, turn: int, tokens: int) -> None:
        self._tokens = tokens
        self._show()

    def run_ended(self, completion: RLMChatCompletion) -> None:
        self._live.stop()

    def run_failed(self, error: BaseException) -> None:
        self._live.stop()

    @property
    def line(self) -> str:
        """What is shown; the terminal is brought up to date four times a second."""
        return (
            f"{self._turn} · {self._cells} cells · {self._in_flight} sub-calls in flight "
            f"({self._calls} made) · {self._tokens:,} tokens"
        )

    def _show(self) -> None:
        self._live.update(Text(self.line, style="dim"))
