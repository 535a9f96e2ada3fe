"""For all tests: one thread for torch, where it is used at all; several processes share two cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
