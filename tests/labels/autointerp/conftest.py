"""Fixtures of tests of labels by language models."""

import pytest
from labeling_made import KEY, Server, plant

from saelab.labels.autointerp.endpoints import OpenAIClient


@pytest.fixture(scope="package")
def store(tmp_path_factory):
    """Feature 0 fires on hot, and negatively on cold; 1 on river; 2 on hot after very; 3 never."""
    return plant(tmp_path_factory.mktemp("store"))


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, and clients of them."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    opened = []

    def start(plan=("ok",), model="right", timeout=0.75, **options):
        server = Server(plan)
        client = OpenAIClient(model, server.url, timeout=timeout, **options)
        opened.extend([server, client])
        return server, client

    yield start
    for client in opened[1::2]:
        client.close()
    for server in opened[::2]:
        server.shutdown()
        server.server_close()
