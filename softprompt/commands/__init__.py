"""The commands of the command line, by name."""

from softprompt.commands import catalog, engine, generation, launch, runs, serve, trials
from softprompt.commands.base import Command

_MODULES = (trials, engine, launch, runs, generation, serve, catalog)

COMMANDS: dict[str, Command] = {
    name: command for module in _MODULES for name, command in module.COMMANDS.items()
}
