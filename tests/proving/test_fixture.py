"""The plugin of pytest, in a pytest of its own: on a service that loses nothing, and on one that does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.scenarios.run.harness import PROJECT

pytestmark = pytest.mark.main_python_only

OPTIONS = f'"--app-dir", {str(PROJECT)!r}, between=0.5, rate=50, max_slowdown=100'


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))


def test_a_service_that_loses_nothing(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["ecdysis_async.testing"]')
    pytester.makepyfile(f"""
        def test_service(restarting_service):
            verdict = restarting_service("tests.scenarios.proving.apps:good", {OPTIONS}, html="page.html")
            assert verdict.is_good and verdict.to_json()["steps"][0]["code"] == 0
    """)
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert "Nothing was lost" in (pytester.path / "page.html").read_text()


def test_a_service_that_loses_requests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(f"""
        def test_service(restarting_service):
            restarting_service("tests.scenarios.proving.apps:hasty", {OPTIONS}, connections=20)
    """)
    result = pytester.runpytest_subprocess("-p", "ecdysis_async.testing", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*verdict: this service does not restart without a loss*"])
    result.stdout.fnmatch_lines(["*idle connection closed without notice (restart 1)*"])
    # The verdict says it all.
    result.stdout.no_fnmatch_line("*fixture.py*")


def test_without_pytest_it_says_what_is_missing() -> None:
    program = "import sys; sys.modules['pytest'] = None; import ecdysis_async.testing"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ecdysis_async.testing is a plugin of pytest, which is not installed" in done.stderr
