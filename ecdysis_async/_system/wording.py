"""What settings are called by those who read of them: options of the command, or arguments of `Ecdysis`."""

from __future__ import annotations

__all__ = ["is_by_command", "name_setting", "speak_of_options"]

_is_by_command = False


def speak_of_options() -> None:
    """Take note that this process is one of `ecdysis run`, whose user knows options."""
    global _is_by_command
    _is_by_command = True


def is_by_command() -> bool:
    """Say whether this process is one of `ecdysis run`."""
    return _is_by_command


def name_setting(name: str) -> str:
    """Return what a setting is called where this service was configured."""
    return f"--{name.replace('_', '-')}" if _is_by_command else name
