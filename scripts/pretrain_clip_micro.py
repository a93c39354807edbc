"""Train `clip-micro`, the small image-text model that ships with the repository, on CIFAR-100 and the Flickr8k sample.

    python scripts/pretrain_clip_micro.py --data <folder with cifar100/ and flickr8k_1000/> --out runs/clip-micro

The image tower begins as `vit-micro`; the text tower and the projections are new. Each batch holds images of CIFAR-100, with
captions made of the names of their classes, and some photographs of Flickr8k at 32 x 32 pixels with what people wrote of them. A
caption of CIFAR-100 may also name the kind of thing: the coarse class, or what `KINDS` says ("a tiger, a kind of big cat"), so
that the text tower learns some words that are no class. The loss is that of the task "contrast"
(`multimodal.tasks.contrast`), with one
caption for all images of a class in a batch; in all epochs but the last, half of the patches are dropped (Li et al., "Scaling
Language-Image Pre-training via Masking", 2023). Optimizers and moving average are those of `scripts/pretraining.py`.

Zero-shot accuracy on the test split of CIFAR-10, whose classes are not those of CIFAR-100, and recall on the test split of the
Flickr8k sample are measured once, after the last epoch.
"""

from __future__ import annotations

import glob
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from cifar import accuracy, augment, normalize, read_split
from open_clip.transformer import PatchDropout
from PIL import Image
from pretraining import Run, arguments
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from multimodal.families.clip.micro import load_vit
from multimodal.tasks.contrast import Contrast
from multimodal.tasks.zero_shot import zero_shot_classifier

VIT = Path(__file__).resolve().parent.parent / "vision" / "weights" / "vit-micro.safetensors"
TEMPLATES = (
    "a photo of a {}.",
    "a small photo of a {}.",
    "a blurry picture of the {}.",
    "a picture of one {}.",
    "the {}.",
    "{}",
)
WITH_KIND = ("a photo of a {}, a kind of {}.", "a {}. it is a {}.", "{1}: a {0}.", "a photo of a {1}.")
KINDS = {
    "lion": "big cat",
    "tiger": "big cat",
    "leopard": "big cat",
    "wolf": "wild dog",
    "fox": "wild dog",
    "bear": "furry animal",
    "cattle": "farm animal, like a horse",
    "camel": "animal to ride, like a horse",
    "elephant": "large animal",
    "kangaroo": "wild animal, like a deer",
    "bus": "motor vehicle, like an automobile",
    "pickup_truck": "truck, an automobile",
    "streetcar": "vehicle on rails",
    "tractor": "farm vehicle, like a truck",
    "tank": "military vehicle",
    "rocket": "aircraft, it flies like an airplane",
    "lizard": "reptile",
    "turtle": "reptile",
    "dolphin": "animal in the sea",
    "whale": "animal in the sea",
    "sea": "water where ships sail",
    "mouse": "rodent",
    "hamster": "rodent, a pet",
    "rabbit": "pet",
    "boy": "person, a child",
    "girl": "person, a child",
    "man": "person",
    "woman": "person",
    "baby": "person, a child",
}


def class_captions(folder: Path) -> list[list[str]]:
    """The captions of each class of CIFAR-100."""
    names = json.loads((folder / "classes.json").read_text())
    table = pq.read_table(sorted(glob.glob(str(folder / "train*.parquet")))[0], columns=["label", "coarse_label"])
    coarse = dict(zip(table["label"].to_pylist(), table["coarse_label"].to_pylist()))
    found = []
    for label, name in enumerate(names["fine"]):
        kind = KINDS.get(name, names["coarse"][coarse[label]].rstrip("12").replace("_", " ").strip())
        name = name.replace("_", " ")
        found.append([t.format(name) for t in TEMPLATES] + [t.format(name, kind) for t in WITH_KIND])
    return found


def read_photographs(folder: Path, split: str) -> tuple[Tensor, list[list[str]]]:
    """uint8 (n, 3, 40, 40), the square in the middle of each, and its captions."""
    table = pa.concat_tables([pq.read_table(f) for f in sorted(glob.glob(str(folder / f"{split}*.parquet")))])
    found = []
    for data in table["image"].to_pylist():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((40, 40), Image.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return torch.stack(found), table["captions"].to_pylist()


def photographed(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (n, 3, 40, 40) -> a random crop of each, some mirrored, normalised, (n, 3, 32, 32)."""
    crops = []
    for image in images:
        top, left, flip = torch.randint(0, 9, (3,), generator=generator).tolist()
        crop = image[:, top : top + 32, left : left + 32]
        crops.append(crop.flip(2) if flip % 2 else crop)
    return normalize(torch.stack(crops))


def encode_text(clip: Any, ids: Tensor) -> Tensor:
    """open_clip's `encode_text` without the padding behind the longest text of the batch: (n, L) -> (n, d)."""
    length = int((ids != 0).sum(dim=1).max())
    ids = ids[:, :length]
    x = clip.token_embedding(ids) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    return x[torch.arange(len(ids)), ids.argmax(dim=1)] @ clip.text_projection


def contrast(clip: Any, images: Tensor, texts: Tensor, same: Tensor) -> Tensor:
    """The loss of the task "contrast" where each group has one text: images (B, d), texts (M, d), `same` (B, M)."""
    images, texts = (F.normalize(e.float(), dim=-1) for e in (images, texts))
    scores, goal = clip.logit_scale.exp() * images @ texts.T, same.float()
    to_text, to_image = (
        F.cross_entropy(scores, goal),
        F.cross_entropy(scores.T, goal.T / goal.T.sum(dim=1, keepdim=True)),
    )
    return (to_text + to_image) / 2


def main() -> None:
    parser = arguments(__doc__, "clip-micro", epochs=4, lr=1e-3, warmup=0.2)
    parser.add_argument("--photographs", type=int, default=16, help="of Flickr8k in each batch, beside --batch-size")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    images, labels = (t.to(device) for t in read_split(args.data / "cifar100", "train"))
    photographs, texts = read_photographs(args.data / "flickr8k_1000", "train")
    model = zoo.load("clip-micro", pretrained=False, device=args.device)
    clip = model.backbone
    load_vit(clip.visual, {k: v.float() for k, v in load_file(VIT).items() if not k.startswith("head.")})
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokenize = model.family.tokenize
    captions = [tokenize(c) for c in class_captions(args.data / "cifar100")]
    written = [tokenize(t, True) for t in texts]
    run = Run(clip, args, len(images) // args.batch_size, lambda n, p: "resblocks." in n and p.ndim == 2)
    # for 65 tokens on a CPU the fused product's backward takes longer than the plain ones
    product = SDPBackend.MATH if device.type == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    for epoch in run.epochs():
        clip.visual.patch_dropout = PatchDropout(0.5) if epoch < args.epochs - 1 else torch.nn.Identity()
        for index in run.batches(epoch, len(images)):
            which = torch.randperm(len(photographs), generator=run.generator)[: args.photographs]
            groups = torch.cat([labels[index].cpu(), 100 + which])
            named = groups.unique()  # one caption of each
            ids = [(captions[g] if g < 100 else written[g - 100]) for g in named.tolist()]
            ids = [c[torch.randint(len(c), (), generator=run.generator)] for c in ids]
            x = augment(normalize(images[index]), run.generator)
            x = torch.cat([x, photographed(photographs[which], run.generator).to(device)])
            with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(product):
                embedded = clip.encode_image(x), encode_text(clip, torch.stack(ids).to(device))
            run.step(contrast(clip, *embedded, (groups[:, None] == named[None, :]).to(device)))
            with torch.no_grad():
                clip.logit_scale.clamp_(max=4.6)  # as CLIP's authors: scores of at most 100
    clip.visual.patch_dropout = torch.nn.Identity()
    run.averaged()
    final = {}
    for name in ("cifar10", "cifar100"):
        inputs, targets = (t.to(device) for t in read_split(args.data / name, "test"))
        classes = json.loads((args.data / name / "classes.json").read_text())
        classes = [c.replace("_", " ") for c in (classes["fine"] if isinstance(classes, dict) else classes)]
        head = zero_shot_classifier(model, classes, TEMPLATES[:4])
        final[f"zero_shot_{name}"] = accuracy(lambda x, head=head: head(model.features(x)), inputs, targets)
    report = zoo.evaluate(model, str(args.data / "flickr8k_1000"), split="test", task=Contrast(truncate=True))
    final |= {k: round(float(v), 4) for k, v in report.items() if k.startswith(("image_to", "text_to"))}
    run.finish(**final, images=10000)


if __name__ == "__main__":
    main()
