"""A service under proof: how it is found, and what is said where there is none."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._proving.plan import Kind, Plan, PlanError, Shape, Step, Url
from ecdysis_async._proving.service import (
    CommandedService,
    ControlledService,
    OwnService,
    ServiceFailed,
    choose_service,
    find_url,
    find_value,
)
from tests.ports import find_free_port

pytestmark = pytest.mark.backends("asyncio")


def plan(**more: Any) -> Plan:
    return Plan((Shape(Kind.NEW),), (Step.RESTART,), **more)


def of_port(port: int) -> Url:
    return Url("http", "127.0.0.1", port)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ([], None),
        (["--bind", "a:1"], "a:1"),
        (["-x", "--bind=b:2"], "b:2"),
        (["--bind"], ""),
        (["--binder", "c"], None),
    ],
)
def test_the_value_of_an_option(options: list[str], value: str | None) -> None:
    assert find_value(options, "--bind") == value


@pytest.mark.parametrize(
    ("address", "host"),
    [("127.0.0.1:8000", "127.0.0.1"), ("0.0.0.0:8000", "127.0.0.1"), ("[::]:8000", "::1"), ("[::1]:8000", "::1")],
)
def test_where_it_listens(address: str, host: str) -> None:
    listeners = [{"kind": "unix", "address": "/x"}, {"kind": "tcp", "address": address}]
    assert find_url({"listeners": listeners}, "http", "/p") == Url("http", host, 8000, "/p")


def test_where_it_listens_for_others_only() -> None:
    with pytest.raises(PlanError, match="loopback"):
        find_url({"listeners": [{"kind": "tcp", "address": "192.0.2.1:80"}]}, "http", "/")
    with pytest.raises(ServiceFailed, match="on no TCP address"):
        find_url({"listeners": []}, "http", "/")


def test_each_plan_has_its_kind_of_service() -> None:
    commands = {"command": ("a",), "restart_command": ("b",), "url": of_port(80)}
    kinds = ({"target": "a:b"}, OwnService), ({"control": "/c"}, ControlledService), (commands, CommandedService)
    for given, kind in kinds:
        with choose_service(plan(**given)) as service:
            assert type(service) is kind


async def test_something_else_listens_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = of_port(listener.getsockname()[1])
        service = CommandedService(plan(command=("true",), restart_command=("true",), url=url), tmp_path)
        with pytest.raises(PlanError, match=r"something listens at .* already"):
            await service.start()
        await service.stop()


async def test_a_command_that_ends_at_once(tmp_path: Path) -> None:
    url = of_port(find_free_port())
    command = (sys.executable, "-c", "import sys; sys.exit('no licence')")
    service = CommandedService(plan(command=command, restart_command=("true",), url=url), tmp_path)
    with pytest.raises(ServiceFailed, match=r"(?s)status 1, and nothing listens.*no licence"):
        await service.start()
    await service.stop()


async def test_nobody_answers_at_the_control_socket(tmp_path: Path) -> None:
    service = ControlledService(str(tmp_path / "control"), None, 5.0)
    with pytest.raises(ServiceFailed, match="no service answers at its control socket"):
        await service.start()
