"""`p2pcodistill frame`: what a frame says of itself, and stored chains as safetensors files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from faults import snapshot_of_files
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES, Manifest, Version, digest_chunks, sign_manifest
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.cli import main
from p2pcodistill.config import FramesConfig
from p2pcodistill.identity import Identity
