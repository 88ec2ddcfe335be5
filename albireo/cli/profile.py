"""`albireo profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument(
    "results",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="RESULT.json...",
)
@click.option("--name", default="measured", show_default=True, help="What the profile is called.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: standard output]")
def profile(results: tuple[Path, ...], name: str, output: Path | None) -> None:
    """Fit a profile for `albireo simulate` to measured steps.

    RESULT.json: what `albireo bench step --json` printed, for two input lengths or more, and what
    `albireo bench prefill --json` did.
    """
    import msgspec

    from albireo.simulate.fit import fit_profile
    from albireo.simulate.profile import ProfileError

    try:
        made = fit_profile(name, [_result(path) for path in results])
        text = msgspec.json.format(msgspec.json.encode(made), indent=2).decode()
        if output is not None:
            output.write_text(text + "\n")
    except (ProfileError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if output is None:
        click.echo(text)


def _result(path: Path) -> Any:
    """What a file holds.  Raises OSError, and ClickException for what is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise click.ClickException(
            f"{path} is no JSON, as `bench step --json` and `bench prefill --json` print: {error}"
        ) from None
