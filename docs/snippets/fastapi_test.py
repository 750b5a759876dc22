"""Tests of an application: as always, and through a deploy."""

from fastapi.testclient import TestClient
from first_app import app

pytest_plugins = ["ecdysis_async.testing"]  # in conftest.py, where there is one


def test_the_first_page():
    with TestClient(app) as client:
        assert client.get("/").json()["release"] == 1


def test_a_deploy_loses_nothing(restarting_service):
    restarting_service("first_app:app", restarts=1, paths=["/"])
