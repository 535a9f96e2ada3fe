"""Stands in for a training script: rank 0 hands `berlin`'s node a frame of random bytes, once, and waits to be stopped."""

import hashlib
import os
import random
import sys
import threading
from pathlib import Path

from p2pcodistill.config import GroupSpec
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.group.link import RankLink
from p2pcodistill.group.link_messages import FrameReady, StopRequested

die_with_parent()
spec = GroupSpec.model_validate_json(Path(os.environ["P2PCODISTILL_GROUP"]).read_text())
site, num_bytes = sys.argv[1], int(sys.argv[2])
stop = threading.Event()
link = RankLink(
    spec.link_address, spec.link_token, lambda m: stop.set() if isinstance(m, StopRequested) else None
)
link.connect(30)
done = spec.training_folder / "published"
if site == "berlin" and not done.exists():
    staged, path = spec.outbox_folder / "1.tmp", spec.outbox_folder / "1.frame"
    staged.write_bytes(random.Random(1).randbytes(num_bytes))
    staged.rename(path)
    done.touch()
    link.send(FrameReady(str(path), 1, None, "raw", hashlib.sha256(b"schema").digest(), num_bytes))
stop.wait()
link.close(5)
