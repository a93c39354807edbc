"""Train `vl-t5-micro`, the small model that answers questions about images and ships with the repository, on easy-VQA.

    python scripts/pretrain_vl_t5_micro.py --data <folder with easy_vqa/> --out runs/vl-t5-micro

4,000 drawings of one coloured shape, 38,575 questions with one of 13 answers. The images are seen by `vit-micro`, which stays as
it is: its last tokens, pooled to 4 x 4. The loss is that of the task "generate" (`multimodal.tasks.generate`),
optimizers and moving
average are those of `scripts/pretraining.py`.

The test split (1,000 other drawings, 9,673 questions) is read once, after the last epoch: the share of answers, as the model
writes them, that are exactly right, beside the share of the answer that is the most frequent in the train split.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import torch
from pretraining import Run, arguments
from torch import Tensor
from tqdm import tqdm

import zoo
from multimodal.tasks.generate import Generate


def prepared(model: zoo.Model, task: Generate, folder: Path, limit: int) -> tuple[list[Tensor], Tensor]:
    """The inputs of all questions, stacked, and their targets."""
    data = task.open(model, str(folder), train=True, split="train")
    data = data.select(range(limit)) if limit else data
    items = [data[i] for i in tqdm(range(len(data)), desc="questions", mininterval=10)]
    inputs = [torch.stack([item[0][column] for item in items]) for column in range(len(items[0][0]))]
    return inputs, torch.stack([target for _, target in items])


def frequent(folder: Path) -> float:
    """Share of the test questions that the most frequent answer of the train split answers (0..1)."""
    train, test = (pq.read_table(folder / f"{s}_questions.parquet")["answer"].to_pylist() for s in ("train", "test"))
    return Counter(test)[Counter(train).most_common(1)[0][0]] / len(test)


def main() -> None:
    parser = arguments(__doc__, "vl-t5-micro", epochs=6, lr=2e-3, warmup=0.5, average=0.995)
    parser.add_argument("--limit-questions", type=int, default=0, help="only the first ones, to try the script")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = zoo.load("vl-t5-micro", pretrained=False, device=args.device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    task = Generate(answer_length=3)
    inputs, targets = prepared(model, task, args.data / "easy_vqa", args.limit_questions)
    run = Run(model.backbone, args, len(targets) // args.batch_size, lambda n, p: ".layer." in n and p.ndim == 2)
    for epoch in run.epochs():
        for index in run.batches(epoch, len(targets)):
            with torch.autocast(device.type, torch.bfloat16):
                loss, _ = task.loss(model, [t[index].to(device) for t in inputs], targets[index].to(device))
            run.step(loss)
    run.averaged()
    scores = zoo.evaluate(model, str(args.data / "easy_vqa"), split="test", task=task, batch_size=256)
    run.finish(
        exact_match=round(scores["exact_match"], 4),
        most_frequent_answer=round(frequent(args.data / "easy_vqa"), 4),
        questions=len(pq.read_table(args.data / "easy_vqa" / "test_questions.parquet")),
    )


if __name__ == "__main__":
    main()
