"""Train `swin-micro` or `groupmamba-micro`, small backbones that ship with the repository, on the CIFAR-100 pack.

    python scripts/pretrain_distilled.py swin-micro --data <folder with cifar100/>

The recipe is that of `scripts/pretraining.py`, with random crop, flip and erasing, bf16 autocast, and soft distillation: half of
the loss is the distance to what `vit-micro` (61.4 % of the test images) says of the image and its mirror image, which also tells
which classes are alike; what that gains over the labels alone was not measured. Of GroupMamba's two heads one learns the
labels and the other what the teacher says. In the first part of the schedule GroupMamba sees the images at 24 x 24 pixels, which
costs about 0.6 of the full size; it has no table of positions that would mind.

The test split is read once, after the last epoch; the last weights of the moving average are the result, so no choice
is made on it.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from cifar import accuracy, augment, normalize, read_split, taught, teach
from pretraining import Run, arguments
from timm.models.swin_transformer import WindowAttention

from vision.families.groupmamba.family import GroupMambaFamily
from vision.families.swin import Swin

FAMILIES = {"swin-micro": Swin, "groupmamba-micro": GroupMambaFamily}
MATRICES = {"swin-micro": "layers.", "groupmamba-micro": ("block", "post_network")}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in FAMILIES else "swin-micro"
    parser = arguments(__doc__, name)
    parser.add_argument("member", choices=list(FAMILIES))
    parser.add_argument("--teacher", type=float, default=0.5, help="share of the teacher in the loss")
    parser.add_argument("--small", type=int, default=24 if name == "groupmamba-micro" else 32, help="pixels, early")
    parser.add_argument("--small-epochs", type=float, default=0.6, help="share of epochs with small images")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    images, labels = (t.to(device) for t in read_split(args.data / "cifar100", "train"))
    model = FAMILIES[name].build(f"zoo:{name}", pretrained=False).to(device)
    if device.type == "cpu":
        for module in model.modules():  # for few tokens the fused product's backward takes longer than the plain ones
            if isinstance(module, WindowAttention):
                module.fused_attn = False
    start = MATRICES[name]
    run = Run(model, args, len(images) // args.batch_size, lambda n, p: n.startswith(start) and p.ndim == 2)
    said = teach(images, args.out)
    for epoch in run.epochs():
        small = epoch < args.small_epochs * args.epochs and args.small != 32
        for index in run.batches(epoch, len(images)):
            x, y = augment(normalize(images[index]), run.generator), labels[index]
            if small:
                x = F.interpolate(x, size=args.small, mode="bilinear", antialias=True)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(x)
            run.step(taught(logits, y, said[index].float(), args.teacher))
    test_images, test_labels = (t.to(device) for t in read_split(args.data / "cifar100", "test"))
    run.finish(test_accuracy=accuracy(run.averaged(), test_images, test_labels), images=len(test_labels))


if __name__ == "__main__":
    main()
