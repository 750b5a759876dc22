"""A proof as a fixture of pytest: a test says what to serve, and fails where a restart loses something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

try:
    import pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ecdysis_async.testing is a plugin of pytest, which is not installed: pip install pytest", name=error.name
    ) from error

from .plan import Plan, check_extra, mix_requests, order_steps, read_requests
from .verdict import Verdict

__all__ = ["RestartingService", "restarting_service"]


class RestartingService:
    """Runs a service of the user's own, restarts it under load, and asserts that nothing was lost."""

    def __call__(
        self,
        target: str,
        *run_options: str,
        restarts: int = 1,
        faults: bool = False,
        paths: Sequence[str] = ("/",),
        rate: float = 40.0,
        connections: int = 8,
        upload_path: str | None = None,
        websocket_path: str | None = None,
        requests: str | Path | None = None,
        between: float = 1.0,
        max_slowdown: float = 3.0,
        html: str | Path | None = None,
    ) -> Verdict:
        """Prove a service, and return the verdict if it is good. It blocks, for some seconds a restart.

        Args:
            target: what ``ecdysis run`` serves: MODULE:ATTRIBUTE.
            run_options: other options of ``ecdysis run``, such as ``"--app-dir", "src"``.
            restarts: how often it is restarted.
            faults: also try a release that is broken, kill a successor, and kill a predecessor.
            paths: what is asked for.
            rate: how many requests a second, of all kinds together.
            connections: how many are kept alive.
            upload_path: where bodies are sent; None: to the first path, where the application takes them.
            websocket_path: where WebSockets are; None: at the first path, where the application has them.
            requests: a TOML file of requests, instead of the five before it.
            between: for how many seconds the service is left alone before, between and after the restarts.
            max_slowdown: how many times slower than the first generation a later one may answer.
            html: where the verdict is written as a page, good or bad.

        Raises:
            pytest.fail.Exception: something was lost, or a restart had the wrong outcome; the text is the verdict.
            PlanError: the arguments contradict themselves, or the extra is not installed.
            ServiceFailed: the service does not start; the text has the last it has written.
        """
        check_extra()
        from . import campaign, page

        if requests is not None:
            shapes = read_requests(Path(requests).read_text(encoding="utf-8"), str(requests))
        else:
            shapes = mix_requests(
                paths,
                rate=rate,
                connections=connections,
                upload_path=upload_path,
                websocket_path=websocket_path,
            )
        steps = order_steps(restarts, broken=faults, successor=faults, predecessor=faults)
        plan = Plan(shapes, steps, target=target, run_options=run_options, between=between, max_slowdown=max_slowdown)
        verdict = campaign.prove(plan)
        if html is not None:
            Path(html).write_text(page.write(verdict, target), encoding="utf-8")
        if not verdict.is_good:
            pytest.fail(str(verdict), pytrace=False)
        return verdict


@pytest.fixture(scope="session")
def restarting_service() -> RestartingService:
    """Return what runs a service, restarts it under load, and asserts that nothing was lost."""
    return RestartingService()
