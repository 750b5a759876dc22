"""Where a project is, as it was written, and what it is called: what a unit of systemd is made of.

A path through a link is left as it is. systemd, and each restart, follow the link to the release of that time.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

from ecdysis_async._config.options import Options
from ecdysis_async._system.launch import describe_launch, follow_link

__all__ = ["find_directory", "find_interpreter", "find_links", "find_places", "find_python_path", "name_project"]

# Directories whose names tell nothing of the project that lies in them, or above them.
_NAMELESS = re.compile(
    r"app|backend|code|current|latest|live|releases?|server|service|src|www|[\d.T_-]+|[0-9a-f]{7,40}"
)


def find_directory() -> str:
    """Return the working directory, by way of the links that led there."""
    return describe_launch((sys.executable,), None, None)[0].directory or os.getcwd()


def find_interpreter() -> str:
    """Return the interpreter, by way of the link that leads to the working directory.

    systemd refuses a path with `..` in it, as in `../venv/bin/python`.
    """
    path = follow_link(sys.executable)
    # A console script names its interpreter without links, though it was called through one.
    script = os.path.dirname(os.path.abspath(sys.argv[0]))
    if os.path.isdir(script) and os.path.samefile(script, os.path.dirname(path)):
        path = os.path.join(script, os.path.basename(path))
    normal = os.path.normpath(path)
    if normal == path or (os.path.exists(normal) and os.path.samefile(normal, path)):
        return normal
    # A link before the `..` leads elsewhere. The file itself may be a link, by which its environment is found.
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def find_python_path() -> str:
    """Return PYTHONPATH, by way of the link that leads to the working directory; "" for none."""
    return describe_launch((sys.executable,), None, None)[0].environment.get("PYTHONPATH", "")


def name_project(directory: str, target: str) -> str:
    """Return what a unit is called: after the project, its directory, or else the module that is served.

    Args:
        directory: where the service is started, by way of links.
        target: what is served.
    """
    named = (_read_name(directory), *_name_directories(directory), target.partition(":")[0].replace(".", "-"))
    cleaned = (re.sub(r"[^A-Za-z0-9_.-]+", "-", each).strip("-.") for each in named)
    return next(each for each in cleaned if each)


def _read_name(directory: str) -> str:
    """Return what pyproject.toml calls the project; "" where it says nothing."""
    try:
        with open(os.path.join(directory, "pyproject.toml"), "rb") as file:
            content = tomllib.load(file)
        name = content.get("project", {}).get("name") or content.get("tool", {}).get("poetry", {}).get("name")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, AttributeError):
        return ""
    return name if isinstance(name, str) else ""


def _name_directories(directory: str) -> list[str]:
    """Return the names of a directory and of those above it, down to the first that tells something."""
    while directory not in ("", os.sep):
        name = os.path.basename(directory)
        # A link is called after its purpose, such as `current`.
        if not (os.path.islink(directory) or _NAMELESS.fullmatch(name)):
            return [name]
        directory = os.path.dirname(directory)
    return []


def find_links(directory: str) -> list[str]:
    """Return the links next to a directory, or next to the one above it, that lead to it now.

    Who names the directory itself stays with this release when the link moves on.
    """
    if os.path.realpath(directory) != directory:
        return []
    found = []
    for parent in dict.fromkeys((os.path.dirname(directory), os.path.dirname(os.path.dirname(directory)))):
        try:
            with os.scandir(parent) as entries:
                found += [each.path for each in entries if each.is_symlink() and os.path.realpath(each) == directory]
        except OSError:
            continue
    return found


def find_places(options: Options, directory: str) -> list[str]:
    """Return where the program is: its code, its interpreter, its packages and its files."""
    package = str(Path(__file__).parents[1])
    places = [directory, options.app_dir, find_interpreter(), sys.base_prefix, package]
    files = [options.config, options.env_file, options.certfile, options.keyfile, options.ca_certs, options.log_config]
    if options.command is not None and os.sep in options.command[0]:
        files.append(options.command[0])
    return [os.path.abspath(each) for each in (*places, *find_python_path().split(os.pathsep), *files) if each]
