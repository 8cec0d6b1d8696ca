"""The commands of the command line, by name."""

from softprompt.commands import catalog, generation, runs, trials
from softprompt.commands.base import Command

COMMANDS: dict[str, Command] = (
    trials.COMMANDS | generation.COMMANDS | runs.COMMANDS | catalog.COMMANDS
)
