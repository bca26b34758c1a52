"""The REPL: what one cell leaves for the next."""

from rlm_core.conformance.arena import Arena
from rlm_core.conformance.check import check, expect

CLASS_AND_PICKLE = """
import pickle
class Row:
    def __init__(self, n): self.n = n
rows = pickle.loads(pickle.dumps([Row(1), Row(2)]))
[type(row) is Row and row.n for row in rows]
"""


@check("state.variables")
async def variables(arena: Arena) -> None:
    """Variables, functions and imports live on from cell to cell."""
    async with arena.session() as session:
        await session.execute("import math\nx = 20\ndef double(n): return 2 * n")
        expect((await session.execute("print(double(x) + int(math.pi))")).stdout, "43\n")


@check("state.echo")
async def echo(arena: Arena) -> None:
    """The value of a last bare expression is shown, as in a REPL."""
    async with arena.session() as session:
        expect((await session.execute("x = 'a'\nx * 3")).stdout, "'aaa'\n")


@check("state.exception")
async def exception(arena: Arena) -> None:
    """Names assigned before an exception stay, and the traceback shows the cell's own line."""
    async with arena.session() as session:
        result = await session.execute("kept = 1\nkept / 0")
        expect((result.status, result.error and result.error.type), ("error", "ZeroDivisionError"))
        expect("kept / 0" in result.stderr, True, "the line in the traceback")
        expect((await session.execute("print(kept)")).stdout, "1\n")


@check("state.main")
async def main(arena: Arena) -> None:
    """Classes of a cell are those of a real __main__: they can be pickled."""
    async with arena.session() as session:
        expect((await session.execute(CLASS_AND_PICKLE)).stdout, "[1, 2]\n")


@check("state.sessions")
async def sessions(arena: Arena) -> None:
    """Two sessions of one sandbox know nothing of each other."""
    async with arena.session() as one, arena.session() as two:
        await one.execute("secret = 1")
        expect((await two.execute("'secret' in globals()")).stdout, "False\n")


@check("state.answer")
async def answer(arena: Arena) -> None:
    """FINAL, FINAL_VAR and answer['ready'] end with the answer that they were given."""
    async with arena.session() as session:
        for code in (
            "FINAL('42')",
            "n = 42\nFINAL_VAR('n')",
            "answer['content'] = 42\nanswer['ready'] = True",
        ):
            result = await session.execute(code)
            expect((result.answer_ready, result.answer), (True, "42"), code)
    async with arena.session() as session:
        result = await session.execute("FINAL_VAR('no_such_name')")
        expect(
            (result.answer_ready, result.status), (False, "error"), "FINAL_VAR of a name that is not there"
        )


@check("state.listing")
async def listing(arena: Arena) -> None:
    """Variables can be listed and read from the host, cut to a size."""
    async with arena.session() as session:
        await session.execute("text = 'x' * 1000\nnumber = 7")
        found = {each.name: each.type for each in await session.variables()}
        expect((found.get("text"), found.get("number")), ("str", "int"))
        expect(len(await session.read_variable("text", 10)), 10, "characters of a variable that is cut")
