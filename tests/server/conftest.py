import pytest

from tests.server.serving import running


@pytest.fixture(scope="session")
def server(tiny_model):
    """Shared by tests that leave it as it was."""
    with running(tiny_model, max_queue=1024) as found:
        yield found
