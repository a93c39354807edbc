"""Train `vit-micro`, the small backbone that ships with the repository, on the CIFAR-100 pack.

    python scripts/pretrain_vit_micro.py --data <folder with cifar100/> --out runs/vit-micro

The recipe is that of `scripts/pretraining.py`, with random crop and flip, mixup/cutmix in a part of the batches, label smoothing
and bf16 autocast. In the first part of the schedule half of the patches are dropped (PatchDropout, Liu et al.
2022), which halves the cost of an image and acts as augmentation; in the rest, with all patches, few batches are mixed, so that
the model ends on images as it will see them.

The test split is read once, after the last epoch; the last weights of the moving average are the result, so no choice
is made on it. The weights in the package were made by an earlier form of this script: the same recipe, other random draws.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from cifar import accuracy, augment, normalize, read_split
from pretraining import Run, arguments
from timm.data.mixup import Mixup
from timm.models.vision_transformer import VisionTransformer

ARCHITECTURE = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 100}


def main() -> None:
    parser = arguments(__doc__, "vit-micro", epochs=24)
    parser.add_argument(
        "--patch-drop-epochs", type=float, default=0.7, help="share of epochs that drop half the patches"
    )
    parser.add_argument("--mix", type=float, nargs=2, default=(0.3, 0.1), help="share of mixed batches, early and late")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    images, labels = (t.to(device) for t in read_split(args.data / "cifar100", "train"))
    model = VisionTransformer(**ARCHITECTURE, patch_drop_rate=0.5).to(device)
    if device.type == "cpu":  # for 32 to 65 tokens the fused kernel's backward takes 1.5 x the plain products' step
        for block in model.blocks:
            block.attn.fused_attn = False
    run = Run(model, args, len(images) // args.batch_size, lambda n, p: n.startswith("blocks.") and p.ndim == 2)
    mix = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.8, switch_prob=0.5, label_smoothing=0.1, num_classes=100)
    patch_drop = model.patch_drop
    for epoch in run.epochs():
        early = epoch < args.patch_drop_epochs * args.epochs
        mix.mix_prob = args.mix[0] if early else args.mix[1]
        model.patch_drop = patch_drop if early else torch.nn.Identity()
        np.random.seed(args.seed * 10_007 + epoch)  # what Mixup draws from
        for index in run.batches(epoch, len(images)):
            x, y = mix(augment(normalize(images[index]), run.generator), labels[index])
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(x)
            run.step(torch.sum(-y * F.log_softmax(logits.float(), dim=-1), dim=-1).mean())
    model.patch_drop = torch.nn.Identity()
    test_images, test_labels = (t.to(device) for t in read_split(args.data / "cifar100", "test"))
    run.finish(test_accuracy=accuracy(run.averaged(), test_images, test_labels), images=len(test_labels))


if __name__ == "__main__":
    main()
