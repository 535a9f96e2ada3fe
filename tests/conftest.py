"""For all tests: one thread for torch, where it is used at all, and no deadlines: several processes share two cores."""

import os

import pytest
import zmq
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"
# The many processes that tests start need not compile the package again, each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A busy machine is no fault of a test's data.
settings.register_profile("p2pcodistill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("p2pcodistill")


@pytest.fixture(scope="session")
def zero_copy() -> None:
    """pyzmq's thread for what libzmq is handed without a copy: it starts with the first such message, and stays."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours, context.socket(zmq.PAIR) as theirs:
        ours.bind("inproc://zero-copy")
        theirs.connect("inproc://zero-copy")
        ours.send(bytes(2 * zmq.COPY_THRESHOLD), copy=False)
        theirs.recv()
