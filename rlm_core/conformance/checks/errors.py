"""What goes wrong is one clear line, and of the right kind."""

import secrets

from rlm_core.conformance.arena import Arena, echo
from rlm_core.conformance.check import check, ensure, expect
from rlm_core.errors import ConfigError, RLMError, SandboxLost
from rlm_core.limits import MAX_CODE
from rlm_core.session import Session


@check("errors.token")
async def token(arena: Arena) -> None:
    """Without the sandbox's token nothing answers."""
    sandbox = await arena.sandbox()
    right, sandbox.token = sandbox.token, secrets.token_urlsafe(32)
    try:
        session = Session(sandbox, arena.environment.spec, echo)
    finally:
        sandbox.token = right
    try:
        await session.open()
    except SandboxLost as error:
        ensure("token" in str(error), f"the reason is not told: {error}")
    else:
        ensure(False, "a session opened with a wrong token")
    finally:
        await session.aclose()


@check("errors.code")
async def code(arena: Arena) -> None:
    """Too much code, and a syntax error, are errors of their cell; the session lives."""
    async with arena.session() as session:
        try:
            await session.execute("#" * (MAX_CODE + 1))
        except ConfigError:
            pass
        else:
            ensure(False, "too much code was accepted")
        result = await session.execute("x = (")
        expect((result.status, result.error and result.error.type), ("error", "SyntaxError"))
        expect((await session.execute("print(1)")).stdout, "1\n")


@check("errors.field")
async def field(arena: Arena) -> None:
    """A field of the policy that there is not is named."""
    try:
        arena.make(no_such_field=1)
    except RLMError as error:
        ensure("no_such_field" in str(error) and "\n" not in str(error), f"not one clear line: {error}")
    else:
        ensure(False, "it was ignored")


@check("errors.variable")
async def variable(arena: Arena) -> None:
    """Reading a variable that is not there names it."""
    async with arena.session() as session:
        try:
            await session.read_variable("nowhere")
        except ConfigError as error:
            ensure("nowhere" in str(error), f"the name is not told: {error}")
        else:
            ensure(False, "it was read")
