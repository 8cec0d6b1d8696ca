"""The command line of an artefact that has more to do than its trials."""

import argparse
import sys
from collections.abc import Callable, Sequence

from softprompt.errors import UserError


def run_command(name: str, run: Callable[[str], None], arguments: Sequence[str] | None) -> int:
    """Runs an artefact in the folder that `--workdir` names; returns the exit code.

    Args:
        name: of the artefact.
        run: the artefact's function of the folder of the study's trials.
        arguments: of the command line; None for this process'.
    """
    parser = argparse.ArgumentParser(prog=f"experiments.paper.{name}")
    parser.add_argument("--workdir", required=True, help="the folder of the study's trials")
    try:
        run(parser.parse_args(arguments).workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
