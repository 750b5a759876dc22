"""A plugin of pytest: a fixture that restarts a service under load, and asserts that nothing was lost.

Write ``pytest_plugins = ["ecdysis_async.testing"]`` into conftest.py, and in a test::

    def test_nothing_is_lost(restarting_service):
        restarting_service("main:app", restarts=2)

It needs the extra ``prove`` (``pip install 'ecdysis_async[prove]'``).
"""

from __future__ import annotations

from ecdysis_async._proving.fixture import RestartingService, restarting_service
from ecdysis_async._proving.verdict import Verdict

__all__ = ["RestartingService", "Verdict", "restarting_service"]
