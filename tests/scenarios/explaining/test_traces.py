"""Restarts as traces of OpenTelemetry: one tree over all processes, seen through the SDK's own exporters."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.run.harness import PROJECT, by_tcp, get, running

pytestmark = pytest.mark.main_python_only

Span = dict[str, Any]

APP = """
import ecdysis_async

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""

# The application has a provider of its own, and restarts itself within a span of its own.
MAIN = """
import os, sys
import anyio
import ecdysis_async
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

def write(span):
    text = span.to_json(indent=None)
    with open("spans", "a") as file:
        file.write(text + "\\n")
    return ""

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=open(os.devnull, "w"), formatter=write)))
trace.set_tracer_provider(provider)

async def main():
    async with ecdysis_async.Ecdysis(probation=0.1, traces=True) as ecdysis:
        await ecdysis.ready()
        if ecdysis.generation == 1:
            with trace.get_tracer("admin").start_as_current_span("deploy"):
                await ecdysis.restart("settled")
        else:
            await ecdysis.settled.wait()
            ecdysis.stop()
        await ecdysis.finished()

RUN
"""

# A worker with a provider of its own, whose admin endpoint restarts the service within a span, and tells its spans.
ADMIN = """
import ecdysis_async
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    with trace.get_tracer("admin").start_as_current_span("deploy"):
        await ecdysis_async.current().restart("settled")
    body = " ".join(span.to_json(indent=None) for span in exporter.get_finished_spans()).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""


def parse(text: str) -> list[Span]:
    """Return the spans that exporters have written one behind the other, among other lines."""
    spans, decoder, at = [], json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            span, at = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
        else:
            spans.append(span)
    return [span for span in spans if "context" in span]


def name_path(span: Span, spans: list[Span]) -> list[str]:
    """Return the names from the root of a span's tree to the span."""
    parent = next((each for each in spans if each["context"]["span_id"] == span["parent_id"]), None)
    return [*(name_path(parent, spans) if parent is not None else []), span["name"]]


def test_an_anchor_its_workers_and_theirs_are_one_tree(tmp_path: Path) -> None:
    (tmp_path / "release.py").write_text(APP)

    async def test() -> list[str]:
        variables: dict[str, Any] = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "50"}
        variables["OTEL_RESOURCE_ATTRIBUTES"] = "service.name=shop,service.instance.id=mine"
        async with running(tmp_path, "release:app", "--port", "0", "--workers", "2", "--traces", **variables) as run:
            port = await run.find_port()
            code, output = await run.restart("--until", "drained")
            assert code == 0, output
            assert await get(by_tcp(port)) == "ok"
        return run.lines

    spans = parse("\n".join(asyncio.run(test())))
    (root,) = [span for span in spans if span["name"] == "ecdysis.restart"]
    tree = [span for span in spans if span["context"]["trace_id"] == root["context"]["trace_id"]]
    paths = sorted(" ".join(name.removeprefix("ecdysis.") for name in name_path(span, tree)) for span in tree)
    handoff = [
        "restart handoff",
        "restart handoff commit",
        "restart handoff drain",
        "restart handoff initialise",
        "restart handoff pause",
        "restart handoff probation",
        "restart handoff start",
        "restart handoff successor",
        "restart handoff successor imports",
        "restart handoff successor start_up",
        "restart handoff successor start_up lifespan start-up",
        "restart handoff successor start_up load release:app",
    ]
    assert paths == sorted(["restart", *handoff, *handoff])
    assert (root["attributes"]["ecdysis.outcome"], root["status"]["status_code"]) == ("settled", "UNSET")
    resources = [span["resource"]["attributes"] for span in tree if span["name"] == "ecdysis.successor"]
    assert {each["service.name"] for each in resources} == {"shop"}
    assert len({each["service.instance.id"] for each in resources} - {"mine"}) == 2
    assert sorted((each["ecdysis.slot"], each["ecdysis.generation"]) for each in resources) == [("0", "2"), ("1", "2")]


def test_the_admin_endpoint_of_a_worker_is_linked_from_the_span_of_its_anchor(tmp_path: Path) -> None:
    """The worker's spans come from the SDK's exporter in its memory, those of the anchor from one on its stdout."""
    (tmp_path / "release.py").write_text(ADMIN)

    async def test() -> tuple[str, list[str]]:
        variables: dict[str, Any] = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "50"}
        async with running(tmp_path, "release:app", "--port", "0", "--traces", **variables) as run:
            told = await get(by_tcp(await run.find_port()))
        return told, run.lines

    told, lines = asyncio.run(test())
    worker = {span["name"]: span for span in parse(told)}
    [root] = [span for span in parse("\n".join(lines)) if span["name"] == "ecdysis.restart"]
    deploy, handoff = worker["deploy"], worker["ecdysis.handoff"]
    assert (root["parent_id"], deploy["parent_id"]) == (None, None)
    assert [link["context"] for link in root["links"]] == [deploy["context"]]
    assert root["attributes"]["process.pid"] != handoff["attributes"]["process.pid"]
    # What the worker does of the restart belongs to the anchor's tree, and not to the caller's.
    assert (handoff["context"]["trace_id"], handoff["parent_id"]) == (
        root["context"]["trace_id"],
        root["context"]["span_id"],
    )


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_the_caller_is_linked_and_a_plain_successor_follows(loop: str, tmp_path: Path) -> None:
    run = "import trio; trio.run(main)" if loop == "trio" else f"ecdysis_async.run(main, loop={loop!r})"
    (tmp_path / "program.py").write_text(MAIN.replace("RUN", run))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PWD": str(tmp_path)}
    command = [sys.executable, "program.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    # Its output is open until the last process has ended.
    spans = parse((tmp_path / "spans").read_text())
    by_name = {span["name"]: span for span in spans}
    root, deploy, successor = by_name["ecdysis.restart"], by_name["deploy"], by_name["ecdysis.successor"]
    assert root["parent_id"] is None
    assert [link["context"]["span_id"] for link in root["links"]] == [deploy["context"]["span_id"]]
    assert (successor["context"]["trace_id"], successor["parent_id"]) == (
        root["context"]["trace_id"],
        root["context"]["span_id"],
    )
    assert successor["resource"]["attributes"]["ecdysis.generation"] == "2"
    assert root["start_time"] <= successor["start_time"] <= successor["end_time"] <= root["end_time"]


def test_a_failure_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "release.py").write_text(APP)

    async def test() -> list[str]:
        variables: dict[str, Any] = {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "50"}
        async with running(tmp_path, "release:app", "--port", "0", "--traces", **variables) as run:
            await run.find_port()
            (tmp_path / "release.py").write_text("import no_such_module")
            code, output = await run.restart()
            assert code == 1, output
        return run.lines

    (root,) = [span for span in parse("\n".join(asyncio.run(test()))) if span["name"] == "ecdysis.restart"]
    assert root["status"]["status_code"] == "ERROR"
    assert "No module named 'no_such_module'" in root["status"]["description"]
    assert root["attributes"]["ecdysis.failed_phase"] == "initialise"
