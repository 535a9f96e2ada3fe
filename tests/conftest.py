"""For all tests: one thread for torch, where it is used at all, and no deadlines: several processes share two cores."""

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("p2pcodistill", deadline=None)
settings.load_profile("p2pcodistill")
