"""One thread per run: these models are tiny, and the machine may be busy."""

import importlib

import pytest


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(importlib.import_module("sheaf.api.verify"), "_cores", lambda: 1)
