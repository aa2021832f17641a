"""A command group that imports a command's module only when the command is run.

The modules pull in numpy, onnx and ONNX Runtime: a second or two that `mptqc --help` and a mistyped command should not
cost.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class LazyCommand:
    """Where a command's function is; `help` is the first line of its docstring (a test compares them)."""

    module: str
    function: str
    help: str

    def load(self, name: str) -> TyperCommand:
        """Import the function and build its command."""
        application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        application.command(name)(getattr(importlib.import_module(self.module), self.function))
        command = typer.main.get_command(application)
        assert isinstance(command, TyperCommand)
        return command


def lazy_group(commands: Mapping[str, LazyCommand]) -> type[TyperGroup]:
    """Return a group class that lists `commands` without importing them, and imports the one that is run."""

    class LazyGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(commands)

        def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
            if cmd_name not in commands:
                return None
            return TyperCommand(cmd_name, help=commands[cmd_name].help)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, command, rest = super().resolve_command(ctx, args)
            if name is None or name not in commands:
                return name, command, rest
            return name, commands[name].load(name), rest

    return LazyGroup
