"""The release before this one as a fixture, and a link that names one of the two, as a deployment has it."""

from __future__ import annotations

import compileall
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]

# The last commit before the modules moved into their wings.
FORMER = "5a29be55f393a1db859ea94b56d0e583f949093b"


@pytest.fixture(scope="session")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the release before this one from the history of the repository; return where it is."""
    directory = tmp_path_factory.mktemp("former")
    command = ["git", "archive", "--format=tar", FORMER, "ecdysis_async", "benchmarks"]
    try:
        archive = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the release before is taken from the history, and there is none here: {error}")
    subprocess.run(["tar", "--extract"], cwd=directory, input=archive, check=True)
    # Once, and not in each of its processes.
    compileall.compile_dir(directory, quiet=2)
    return directory


@pytest.fixture(scope="session")
def this(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy this release, and return where the copy is: the environment of the tests is no part of it."""
    directory = tmp_path_factory.mktemp("this")
    for name in ("ecdysis_async", "benchmarks"):
        shutil.copytree(PROJECT / name, directory / name)
    return directory


class Deployment:
    """Two releases, and the link from which a service is started.

    Attributes:
        link: leads to one of the two.
    """

    def __init__(self, link: Path, former: Path, this: Path) -> None:
        self.link = link
        self._trees = {"former": former, "this": this}

    def deploy(self, release: str) -> str:
        """Let the link lead to the release "former" or "this"; return where that is."""
        draft = self.link.with_name("draft")
        draft.symlink_to(self._trees[release])
        draft.replace(self.link)
        return str(self._trees[release])


@pytest.fixture
def deployment(former: Path, this: Path, tmp_path: Path) -> Deployment:
    """Both releases, with none deployed yet."""
    return Deployment(tmp_path / "release", former, this)
