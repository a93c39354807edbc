"""VideoPainter on real videos at a small size: is the background of masked clips kept, with the encoder and without?

    python benchmarks/videopainter.py base OUT             # the autoencoder, and a small CogVideoX (image-to-video) on DAVIS
    python benchmarks/videopainter.py encoder OUT          # VideoPainter's encoder on it, three seeds, and the numbers
    python benchmarks/videopainter.py long OUT             # 160 frames in windows, and the pictures

The three sequences of `davis_sample` at 40 x 72; the last 25 frames of each are kept out of all training. The autoencoder is
linear: 16 principal components of patches of 4 frames x 4 x 4 pixels of the frames of training, the first frame four times.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from multimodal.data.masks import jitter
from multimodal.families.diffusion.inpainting import inpainting
from multimodal.metrics.regions import compare, psnr
from multimodal.tasks.diffuse import Diffuse
from multimodal.tasks.inpaint import Inpaint
from multimodal.tasks.latents import decode, encode
from zoo.disk import write_file

HEIGHT, WIDTH, FRAMES, HELD_OUT, CHANNELS, RATIO = 40, 72, 25, 25, 16, 4
SEQUENCES = ("bmx-trees", "tennis", "schoolgirls")
SMALL: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "num_layers": 4,
    "in_channels": 2 * CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 128,
    "text_embed_dim": 16,
    "max_text_seq_length": 4,
    "sample_width": WIDTH // RATIO,
    "sample_height": HEIGHT // RATIO,
    "sample_frames": FRAMES,
    "use_learned_positional_embeddings": False,
}


def sequences(data: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Videos (n, 3, 40, 72) in [-1, 1] and masks (n, 1, 40, 72), 1 where an object is, of the three sequences."""
    import pyarrow.parquet as pq

    found: dict[str, tuple[Tensor, Tensor]] = {}
    size, box = (WIDTH, HEIGHT), Image.Resampling.BOX
    for name in SEQUENCES:
        table = pq.read_table(Path(data).expanduser() / "davis_sample" / f"{name}.parquet")
        own = sorted(table.to_pylist(), key=lambda r: r["frame"])
        frames = [np.asarray(Image.open(io.BytesIO(r["image"])).convert("RGB").resize(size, box)) for r in own]
        masks = [np.asarray(Image.open(io.BytesIO(r["mask"])).convert("L").resize(size, box)) for r in own]
        video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
        found[name] = video, (torch.from_numpy(np.stack(masks))[:, None] > 0).float()
    return found


class Linear(nn.Module):
    """An autoencoder of clips (B, 3, 1 + 4 n, H, W) by principal components, called as those of diffusers are."""

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        """mean (192,), basis (192, 16): latents are (patch - mean) basis / |basis|^2 of each column."""
        super().__init__()
        self.fold = nn.Conv3d(3, basis.shape[1], RATIO, RATIO)
        self.spread = nn.ConvTranspose3d(basis.shape[1], 3, RATIO, RATIO)
        weight = basis.T.reshape(-1, 3, RATIO, RATIO, RATIO)
        with torch.no_grad():
            self.spread.weight.copy_(weight)
            self.spread.bias.zero_()  # type: ignore[union-attr]
            self.fold.weight.copy_(weight / basis.square().sum(0).view(-1, 1, 1, 1, 1))
            self.fold.bias.copy_(-(self.fold.weight.flatten(1) @ mean))  # type: ignore[union-attr]
        self.register_buffer("mean", mean.reshape(1, 3, RATIO, RATIO, RATIO))
        self.config = SimpleNamespace(scaling_factor=1.0, temporal_compression_ratio=RATIO, spatial_ratio=RATIO)
        self.dtype = torch.float32

    def encode(self, clip: Tensor) -> Any:
        """(B, 3, 1 + 4 n, H, W) -> latents (B, 16, 1 + n, H / 4, W / 4)."""
        latents = self.fold(torch.cat([clip[:, :, :1]] * (RATIO - 1) + [clip], dim=2))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents, sample=lambda generator=None: latents))

    def decode(self, latents: Tensor) -> Any:
        """The reverse."""
        clip = self.spread(latents)
        return SimpleNamespace(sample=(clip + self.mean.repeat(1, 1, *latents.shape[2:]))[:, :, RATIO - 1 :])

    @classmethod
    def fitted(cls, videos: list[Tensor]) -> Linear:
        """Of frames (n, 3, H, W); the components' scale is half way to one variance for all."""
        found = []
        for video in videos:
            clip = torch.cat([video[:1]] * (RATIO - 1) + [video])
            clip = clip[: len(clip) // RATIO * RATIO]
            cut = clip.unfold(0, RATIO, RATIO).unfold(2, RATIO, RATIO).unfold(3, RATIO, RATIO)  # (t, 3, h, w, 4, 4, 4)
            found.append(cut.permute(0, 2, 3, 1, 4, 5, 6).flatten(3).flatten(0, 2))
        patches = torch.cat(found)
        mean = patches.mean(0)
        _, values, rows = torch.linalg.svd(patches - mean, full_matrices=False)
        spread = (values[:CHANNELS] / len(patches) ** 0.5).sqrt()
        return cls(mean, rows[:CHANNELS].T * spread * spread.square().mean().sqrt())


def text_of(name: str) -> Tensor:
    """(4, 16): there is no text encoder; each sequence has random vectors of its own."""
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(SEQUENCES.index(name)))


def train_base(data: str, out: Path, steps: int) -> None:
    """The small transformer on all stretches of 25 frames of the training part, and their mirror images."""
    torch.manual_seed(0)
    videos = {name: v[:-HELD_OUT] for name, (v, _) in sequences(data).items()}
    vae = Linear.fitted(list(videos.values()))
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, out / "vae.safetensors")
    model = zoo.load("cogvideox-5b-i2v", "full", pretrained=False, **SMALL)
    parameters = list(model.parameters_to_train().values())
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    task, begun, losses = Diffuse(vae=vae), time.time(), []
    model.train()
    for step in range(steps):
        name = SEQUENCES[step % 3]
        video = videos[name]
        starts = [int(torch.randint(len(video) - FRAMES + 1, ()))]
        clips = torch.stack([video[t : t + FRAMES] for t in starts])
        clips = clips.flip(-1) if step % 2 else clips
        loss, _ = task.loss(model, (clips, text_of(name)[None]), None)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"base {step + 1}: loss {np.mean(losses[-100:]):.4f}, {time.time() - begun:.0f} s", flush=True)
    plain: Any = model.merge()
    plain.save_pretrained(out / "transformer")


def parts_of(data: str, out: Path) -> tuple[Linear, dict[str, tuple[Tensor, Tensor]]]:
    """The autoencoder, and all videos with their masks."""
    state = load_file(out / "vae.safetensors")
    vae = Linear(torch.zeros(192), torch.ones(192, CHANNELS))
    vae.load_state_dict(state)
    return vae, sequences(data)


def train_encoder(data: str, out: Path, steps: int, seed: int) -> Any:
    """The encoder on masked stretches of the training part: the objects' own masks or others', half of them varied."""
    torch.manual_seed(seed)
    vae, all_of = parts_of(data, out)
    model = zoo.load(f"diffusers:{out / 'transformer'}", zoo.adapter("videopainter", blocks=2))
    parameters = list(model.parameters_to_train().values())
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    task, begun, losses = Inpaint(vae=vae), time.time(), []
    model.train()
    for step in range(steps):
        name, other = SEQUENCES[step % 3], SEQUENCES[int(torch.randint(3, ()))]
        video, masks = all_of[name][0][:-HELD_OUT], all_of[other][1][:-HELD_OUT]
        at, there = (int(torch.randint(len(t) - FRAMES + 1, ())) for t in (video, masks))
        clip, mask = video[at : at + FRAMES], masks[there : there + FRAMES]
        mask = jitter(mask) if torch.rand(()) < 0.5 else mask
        if torch.rand(()) < 0.5:
            clip, mask = clip.flip(-1), mask.flip(-1)
        loss, _ = task.loss(model, (clip[None], mask[None], text_of(name)[None]), None)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(
                f"encoder {seed} {step + 1}: loss {np.mean(losses[-100:]):.4f}, {time.time() - begun:.0f} s", flush=True
            )
    model.save_adapter(out / f"encoder-{seed}", "videopainter")
    return model


def measure(model: Any, data: str, out: Path, **options: Any) -> dict[str, float]:
    """Means over the three clips that were kept out, of the regions' numbers, 10 steps."""
    vae, all_of = parts_of(data, out)
    pipe = inpainting(model, vae)
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, list[float]] = {}
    for name, (video, mask) in all_of.items():
        clip, hole = video[-FRAMES:], mask[-FRAMES:].clone()
        hole[0] = 0
        made = pipe(clip, hole, (text_of(name)[None],), guidance=1.0, steps=10, output_type="pt", **options).frames[0]
        for key, value in compare(made, clip / 2 + 0.5, hole).items():
            found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def encoders(data: str, out: Path, steps: int, seeds: int) -> None:
    """Train, measure with and without, and write `numbers.json`."""
    import json

    vae, all_of = parts_of(data, out)
    rows: dict[str, Any] = {}
    with torch.no_grad():
        for name, (video, _) in all_of.items():
            clip = video[-FRAMES:]
            again = decode(vae, encode(vae, clip[None].transpose(1, 2), False, True), True)[0].transpose(0, 1)
            rows[f"autoencoder {name}"] = psnr((again / 2 + 0.5).clamp(0, 1), clip / 2 + 0.5)
    for seed in range(seeds):
        model = train_encoder(data, out, steps, seed).eval()
        for replace in (False, True):
            rows[f"with, replace {replace}, seed {seed}"] = measure(model, data, out, replace=replace, seed=seed)
        with model.disable():
            rows[f"without, seed {seed}"] = measure(model, data, out, replace=False, seed=seed)
        write_file(out / "numbers.json", json.dumps(rows, indent=1).encode())
        print(json.dumps(rows, indent=1), flush=True)


def long(data: str, out: Path) -> None:
    """160 frames (a sequence, and back), ten windows; changes between frames at the seams and elsewhere; strips of frames."""
    vae, all_of = parts_of(data, out)
    model = zoo.load(f"diffusers:{out / 'transformer'}", adapter=out / "encoder-0")
    pipe = inpainting(model.eval(), vae)
    pipe.set_progress_bar_config(disable=True)
    video, mask = all_of["bmx-trees"]
    video, mask = (torch.cat([t, t.flip(0)]) for t in (video, mask.clone()))
    mask[0] = 0
    text = (text_of("bmx-trees")[None],)
    made = pipe(video, mask, text, guidance=1.0, steps=10, stride=16, output_type="pt").frames[0]
    change = (made[1:] - made[:-1]).abs().mean(dim=(1, 2, 3))
    own = ((video[1:] - video[:-1]) / 2).abs().mean(dim=(1, 2, 3))
    starts = list(range(16, 160 - FRAMES + 16, 16))
    seams = [t - 1 for t in starts if t < len(made)]
    others = [t for t in range(len(change)) if t not in seams]
    for what, values in (("made", change), ("original", own)):
        print(
            f"{what}: change between frames at seams {values[seams].mean():.4f}, elsewhere {values[others].mean():.4f}"
        )
    print("frames", len(made), compare(made, video / 2 + 0.5, mask))
    strip(out / "long.png", [video[::16] / 2 + 0.5, (video * (1 - mask) - mask)[::16] / 2 + 0.5, made[::16]])
    rows = []
    for name, (whole, masks) in all_of.items():
        clip, hole = whole[-FRAMES:], masks[-FRAMES:].clone()
        hole[0] = 0
        options: dict[str, Any] = {"guidance": 1.0, "steps": 10, "output_type": "pt", "replace": False}
        told = (text_of(name)[None],)
        with model.disable():
            without = pipe(clip, hole, told, **options).frames[0]
        shown = pipe(clip, hole, told, **options).frames[0]
        rows += [t[::4] for t in (clip / 2 + 0.5, (clip * (1 - hole) - hole) / 2 + 0.5, without, shown)]
    strip(out / "held_out.png", rows)


def strip(file: Path, rows: list[Tensor]) -> None:
    """Rows of frames, each (n, 3, H, W) in [0, 1], as one picture, twice as large."""
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(0, 1)
    image = Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(file)


def main() -> None:
    """The phases, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("base", "encoder", "long"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="data", help="the folder that holds davis_sample")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.phase == "base":
        train_base(args.data, args.out, args.steps or 4000)
    elif args.phase == "encoder":
        encoders(args.data, args.out, args.steps or 400, args.seeds)
    else:
        long(args.data, args.out)


if __name__ == "__main__":
    main()
