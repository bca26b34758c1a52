"""`rlm image`: the images that container environments run."""

from typing import TYPE_CHECKING, Annotated

import typer

from rlm_core.cli.output import fail, say_columns
from rlm_core.errors import ConfigError, MissingExtra, RLMError

if TYPE_CHECKING:
    from rlm_environments.containers.engine import Engine

app = typer.Typer(no_args_is_help=True, help="Images of the sandbox.")


@app.command("build")
def build(
    variant: Annotated[str, typer.Argument(help="minimal, or data (numpy, pandas, scipy).")] = "minimal",
    base: Annotated[
        str | None, typer.Option(help="Image to build on; debian makes one from Debian's packages.")
    ] = None,
    package: Annotated[
        list[str] | None, typer.Option(help="A requirement for cells, e.g. numpy==2.4.6.")
    ] = None,
) -> None:
    """Build an image now; otherwise it is built when it is first used."""
    if variant not in ("minimal", "data"):
        raise ConfigError(f"no variant {variant!r}: minimal, or data; for another base use --base")
    if variant == "data" and base not in (None, "debian"):
        raise ConfigError(
            "data is built on the default base or on debian; on another, name what you need by --package"
        )
    engine = _connect()
    from rlm_environments.containers import image
    from rlm_environments.containers.progress import steps

    what = image.recipe(variant, package or [], base or image.usual_base(engine))
    with steps() as say:
        tag = image.build(engine, what, say)
    typer.echo(tag)


@app.command("ls")
def ls() -> None:
    """List the images that were built here."""
    engine = _connect()
    from rlm_environments.containers import image

    rows = [("TAG", "BASE", "PACKAGES", "SIZE", "")]
    for each in image.ls(engine):
        note = "" if each.current else "of another version"
        base = each.base.partition("@")[0]
        rows.append((each.tag, base, each.packages, f"{each.bytes / 1e6:.0f} MB", note))
    say_columns(rows)


@app.command("rm")
def rm(
    tags: Annotated[list[str] | None, typer.Argument(help="As told by rlm image ls.")] = None,
    old: Annotated[bool, typer.Option("--old", help="All that are of another version.")] = False,
) -> None:
    """Remove images."""
    if not tags and not old:
        fail(ConfigError("which? pass tags, or --old"), 2)
    engine = _connect()
    from rlm_environments.containers import image

    wanted = [*(tags or []), *(each.tag for each in image.ls(engine) if old and not each.current)]
    problems: list[RLMError] = []
    for tag in wanted:
        try:
            image.rm(engine, tag)
            typer.echo(tag)
        except RLMError as error:
            problems.append(error)
    if problems:
        fail(ConfigError("; ".join(map(str, problems))), 1)


def _connect() -> "Engine":
    try:
        from rlm_environments.containers.engine import Engine
    except ImportError:
        raise MissingExtra("rlm image", "docker") from None
    return Engine.connect()
