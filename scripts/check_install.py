"""Check that the installed torch and torchvision belong together.

The two are released as a pair and share compiled operators. An installer that can see a local build of one of them may
join two that do not fit; everything imports then, until the first operator is called. Better to hear it now.
"""

from __future__ import annotations

import sys


def main() -> int:
    try:
        import torch
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.99]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.6, 0.5]), 0.5)
    except Exception as error:  # any failure here has the same cure
        print(
            f"torch and torchvision do not work together here: {error}\n"
            "Install a matching pair, for example: pip install --upgrade --force-reinstall torch torchvision",
            file=sys.stderr,
        )
        return 1
    if kept.tolist() != [0]:
        print(f"torchvision.ops.nms gave {kept.tolist()}, expected [0]", file=sys.stderr)
        return 1
    print(f"torch {torch.__version__} and torchvision {torchvision.__version__} work together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
