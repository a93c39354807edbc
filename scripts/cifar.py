"""CIFAR images for the scripts that train small members: reading, augmenting, a teacher, accuracy."""

from __future__ import annotations

import glob
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split as uint8 (n, 3, 32, 32), and their labels (n,)."""
    files = sorted(glob.glob(str(folder / f"{split}*.parquet")))
    if not files:
        raise SystemExit(f"no Parquet file '{split}*.parquet' in {folder}")
    table = pa.concat_tables([pq.read_table(file, columns=["image", "label"]) for file in files])
    images = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in table["image"].to_pylist()])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def normalize(images: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) -> float32, by the mean and deviation of CIFAR-100."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean.to(images.device)) / std.to(images.device)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop out of a 4-pixel reflected border, random flip, and one erased 8 x 8 square in half of the images."""
    n, _, height, width = images.shape
    device = images.device
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    top, left = (torch.randint(0, 9, (n, 1), generator=generator).to(device) for _ in range(2))
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    flip = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
    columns = torch.where(flip, columns.flip(1), columns)
    out = padded[torch.arange(n, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    out = out.permute(0, 3, 1, 2).contiguous()
    y, x = (torch.randint(0, 25, (n, 1), generator=generator).to(device) for _ in range(2))
    erase = (torch.rand(n, 1, 1, generator=generator) < 0.5).to(device)
    r = torch.arange(32, device=device)
    inside = ((r >= y) & (r < y + 8))[:, :, None] & ((r >= x) & (r < x + 8))[:, None, :] & erase
    return out.masked_fill(inside[:, None], 0.0)


@torch.no_grad()
def teach(images: Tensor, out: Path) -> Tensor:
    """What `vit-micro` says of uint8 images and of their mirror images, the mean: probabilities (n, 100), half precision.

    Computed once and kept in the folder `out`.
    """
    file = out / "teacher.safetensors"
    if not file.exists():
        import zoo

        model = zoo.load("vit-micro", device=str(images.device)).eval()
        found = []
        for part in tqdm(images.split(250), desc="teacher", mininterval=10):
            x = normalize(part)
            with torch.autocast(images.device.type, torch.bfloat16):
                both = model(torch.cat([x, x.flip(3)]))
            found.append(F.softmax(both.float(), dim=-1).view(2, len(part), -1).mean(0).half().cpu())
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"probabilities": torch.cat(found)}, file)
    return load_file(file)["probabilities"].to(images.device)


def taught(
    logits: Tensor | tuple[Tensor, Tensor], labels: Tensor, teacher: Tensor, share: float, smoothing: float = 0.1
) -> Tensor:
    """(1 - share) CE(logits, smoothed labels) + share CE(logits, teacher), a scalar.

    Of a model with two heads, the first learns the labels and the second what the teacher (n, K) says.
    """
    first, second = logits if isinstance(logits, tuple) else (logits, logits)
    own = F.cross_entropy(first.float(), labels, label_smoothing=smoothing)
    return (1 - share) * own + share * F.cross_entropy(second.float(), teacher)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy (0..1) over uint8 images."""
    hits = sum(int((model(normalize(i)).argmax(1) == t).sum()) for i, t in zip(images.split(500), labels.split(500)))
    return hits / len(labels)
