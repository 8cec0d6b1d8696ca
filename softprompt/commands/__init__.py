"""The commands of the command line, by name."""

from softprompt.commands import catalog, runs, serve, trials
from softprompt.commands.base import Command

COMMANDS: dict[str, Command] = trials.COMMANDS | runs.COMMANDS | serve.COMMANDS | catalog.COMMANDS
