"""What the processes of two_processes.py have imported before they are forked: nothing is trained and no thread started here."""

from __future__ import annotations

import contextlib
import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp

torch.set_num_threads(1)

import method_models  # noqa: F401, E402
import train_parts  # noqa: F401, E402

import zoo  # noqa: E402

for name in ("vit-micro", "clip-micro"):
    with contextlib.suppress(zoo.ZooError):
        zoo.load(name, "lora", pretrained=False, device="meta")
with contextlib.suppress(ImportError):
    import accelerate  # noqa: F401
