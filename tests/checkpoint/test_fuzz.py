"""A short run of `make fuzz`."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent.parent / "fuzz_frames.py"


def test_mutated_frames_are_refused_or_decoded_correctly() -> None:
    command = [sys.executable, str(FUZZ), "--num", "3000", "--seed", "2", "--processes", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    for outcome in (
        "MalformedError",
        "OversizedError",
        "ChecksumError",
        "NonFiniteError",
        "decoded, correct",
    ):
        assert outcome in run.stdout, "a fuzzer that never gets that far tests little"
