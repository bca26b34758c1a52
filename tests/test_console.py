"""What a person sees while a run goes on."""

import io
import threading

from rich.console import Console

from rlm_core import RLM, Observer, ScriptedClient
from rlm_core.console import ConsoleObserver, ProgressObserver

ROOT = [
    "```repl\nprint('\\x1b[31mred', llm_query_batched(['a', 'b']))\n```",
    "```repl\nFINAL('the end')\n```",
]


def watched(observer: Observer) -> None:
    together = threading.Barrier(2)
    sub = ScriptedClient(lambda request: f"yes {together.wait(20)}", "sub")
    RLM(backend=ScriptedClient(ROOT), other_backends=[sub], observer=observer).completion(
        "x", root_prompt="why?"
    )


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Lines(ProgressObserver):
    """Keeps every state of the line; the terminal shows some of them."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.lines: list[str] = []

    def _show(self) -> None:
        super()._show()
        self.lines.append(self.line)


def test_the_progress_line_has_turn_cells_sub_calls_and_tokens() -> None:
    console = terminal()
    observer = Lines(console)
    watched(observer)
    assert "turn 1 of 30 · 0 cells · 2 sub-calls in flight (2 made) · 0 tokens" in observer.lines
    assert any(
        line.startswith("turn 2 of 30 · 1 cells · 0 sub-calls in flight (2 made)") for line in observer.lines
    )
    assert "turn 2 of 30" in text_of(console)


def test_the_verbose_view_has_the_turns_and_can_not_be_steered_by_output() -> None:
    console = terminal()
    watched(ConsoleObserver(console))
    shown = text_of(console)
    assert "why?" in shown and "turn 1 of 30" in shown and "FINAL('the end')" in shown and "the end" in shown
    assert "\\x1b[31mred" in shown and "\x1b[31mred" not in shown
