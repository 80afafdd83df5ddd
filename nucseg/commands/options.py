"""The application that all commands register with, and the options that several of them share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from nucseg.config import ConfigError
from nucseg.paper import BEYOND, TABLES

app = typer.Typer(
    help="The nucseg command: rerun the paper, or find out which patches of your own images to outline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ProfileOption = Annotated[
    str, typer.Option(help="sample, h100, paper or another of docs/profiles.md, or a YAML file's path.")
]
DatasetOption = Annotated[str, typer.Option(help="tissue, kumar, tnbc, monuseg or a folder; empty: the profile's own.")]
RootOption = Annotated[str, typer.Option(help="Where the data lie; empty: the environment variable NUCSEG_DATA.")]
MinutesOption = Annotated[
    float, typer.Option(min=0, help="Stop after so many minutes; the next start goes on there. 0: no limit.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda; empty: cuda where there is one.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result on the same machine.")]
STRATEGY_HELP = (
    "cps, cps-standardised, cps-no-2nd, cps-no-3rd, kmeans, typiclust, probcover, k-center, random-crop or "
    "random-centre-crop."
)
TableOption = Annotated[
    list[str] | None,
    typer.Option(
        "--table", "-t", help="I to VI or 1 to 6, one or more; S: all selection strategies; B: on more budgets."
    ),
]


def chosen_tables(names: list[str] | None) -> tuple[str, ...]:
    """Turn 1 or i into I, and nothing into all six; S is the comparison beyond the paper."""
    chosen = []
    for name in re.split(r"[,\s]+", " ".join(names or TABLES)):
        roman = TABLES[int(name) - 1] if name in {"1", "2", "3", "4", "5", "6"} else name.upper()
        if roman not in (*TABLES, *BEYOND):
            raise ConfigError(f"no table {name!r}; the paper has I to VI, S compares all strategies, B their budgets")
        chosen.append(roman)
    return tuple(dict.fromkeys(chosen))
