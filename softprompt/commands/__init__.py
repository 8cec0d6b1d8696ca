"""The commands of the command line, by name."""

from softprompt.commands import catalog, engine, launch, runs, trials
from softprompt.commands.base import Command

COMMANDS: dict[str, Command] = (
    trials.COMMANDS | engine.COMMANDS | launch.COMMANDS | runs.COMMANDS | catalog.COMMANDS
)
