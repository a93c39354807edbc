"""Train `vlm-micro`, the small Qwen2-VL that ships with the repository, on easy-VQA with answers as short text.

    python scripts/pretrain_vlm_micro.py --data <folder with easy_vqa/> --out runs/vlm-micro

From random weights: first the eyes alone, which learn to name colour and shape of a drawing (by two linear layers that are left
out afterwards, on the mean of its tokens; mirrored drawings too), then eyes and language together. Seven of the ten kinds of
questions (`scripts/easy_vqa_kinds.py`) are trained; three are left out, so that later training can be measured on them. Every
step draws a kind evenly, then, where the answers are yes and no, one of the two evenly, then a question. Half of the questions
are asked after a system message and answered in tags behind a thought (where the drawing is known), the others are answered
by the answer alone. In every fifth step questions with an open answer are asked with three answers to choose from, and
answered by a letter. Loss: on the answer's tokens alone, in bf16.

The vocabulary is made first: byte pairs merged by how frequent they are in all these texts. Every fifth question of the test
split is read once, at the end: the share of exact answers, greedy, to seen and left-out kinds, both ways.
"""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from easy_vqa_kinds import COLORS, LEFT_OUT, SHAPES, THINK, Row, images, rows
from PIL import Image, ImageOps
from pretraining import Run, arguments
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from multimodal.families.vlm.micro import FIRST, MICRO, micro_processor

Chat = tuple[Row, str | None, str, str]  # row, system message, question as asked, answer


def with_choices(row: Row, draw: random.Random) -> tuple[str, str]:
    """(question with three answers to choose from, letter of the right one)."""
    options = [row.answer, *draw.sample([a for a in row.pool if a != row.answer], 2)]
    draw.shuffle(options)
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABC", options, strict=True))
    return row.question + listed, "ABC"[options.index(row.answer)]


def asked(row: Row, draw: random.Random, choices: bool) -> Chat:
    """One of the ways to ask a question; with answers to choose from, if it is an open one."""
    question, answer = row.question, row.answer
    if choices and answer not in ("yes", "no"):
        question, answer = with_choices(row, draw)
    tagged = row.tagged
    if tagged is not None and draw.random() < 0.5:
        return row, THINK, question, tagged.replace(f"<answer>{row.answer}<", f"<answer>{answer}<")
    return row, None, question, answer


def merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The pairs of a byte-level vocabulary trained on texts."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + count, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(trained.to_str())["model"]["merges"]]


class Data:
    """Questions of a split as batches of the network."""

    def __init__(self, folder: Path, split: str, processor: Any) -> None:
        self.processor = processor
        self.rows = rows(folder, split)
        read = images(folder, split)
        self.index = {name: i for i, name in enumerate(read)}
        opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in read.values()]
        self.opened = opened
        self.pixels, self.grid = self.patches(opened)
        self.groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            if row.kind not in LEFT_OUT:
                self.groups[row.kind][row.answer if row.answer in ("yes", "no") else ""].append(row)

    def patches(self, opened: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Images (N) as patches (N, 64, 384) in half precision, and their grids."""
        made = self.processor.image_processor(opened, return_tensors="pt")
        return made["pixel_values"].view(len(opened), -1, made["pixel_values"].shape[-1]).half(), made["image_grid_thw"]

    def drawings(self) -> tuple[Tensor, Tensor]:
        """(places of the drawings whose colour and shape are known, their numbers (N, 2))."""
        known = {row.image: (row.color, row.shape) for row in self.rows if row.color and row.shape}
        numbers = [(COLORS.index(str(c)), SHAPES.index(str(s))) for c, s in known.values()]
        return torch.tensor([self.index[name] for name in known]), torch.tensor(numbers)

    def draw(self, count: int, draw: random.Random, choices: bool) -> list[Chat]:
        """As many chats of the seen kinds; `choices`: of open questions, with answers to choose from."""
        kinds = [k for k in sorted(self.groups) if not (choices and k.startswith("has"))]
        chats = []
        for _ in range(count):
            group = self.groups[draw.choice(kinds)]
            chats.append(asked(draw.choice(group[draw.choice(sorted(group))]), draw, choices))
        return chats

    def batch(self, chats: list[Chat], answers: bool = True) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs, labels): with answers padded on the right, labels -100 but for the answers; without, padded on the left."""
        tokenizer = self.processor.tokenizer
        pad, seen = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|image_pad|>")
        index = [self.index[row.image] for row, *_ in chats]
        sequences = []
        for (_, system, question, answer), i in zip(chats, index, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if system:
                messages.insert(0, {"role": "system", "content": system})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            tokens = int(self.grid[i].prod()) // self.processor.image_processor.merge_size**2
            prompt = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens))["input_ids"]
            sequences.append((prompt, tokenizer(answer + "<|im_end|>")["input_ids"] if answers else []))
        length = max(len(p) + len(a) for p, a in sequences)
        ids = torch.full((len(chats), length), pad)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, (p, a) in enumerate(sequences):
            where = slice(0, len(p) + len(a)) if answers else slice(length - len(p), length)
            ids[i, where], mask[i, where] = torch.tensor(p + a), 1
            if answers:
                labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": ids.eq(seen).int(),
            "pixel_values": self.pixels[index].flatten(0, 1).float(),
            "image_grid_thw": self.grid[index],
        }
        return inputs, labels


def train_eyes(model: Any, data: Data, test: Data, epochs: int, size: int = 128, lr: float = 2e-3) -> float:
    """Colour and shape of drawings, by the eyes alone; returns the share of test drawings of which both are right."""
    where, numbers = data.drawings()
    mirrored, _ = data.patches([ImageOps.mirror(image) for image in data.opened])
    eyes, width = model.model.visual, model.config.text_config.hidden_size
    heads = torch.nn.Linear(width, len(COLORS) + len(SHAPES)).to(model.device)

    def scores(pixels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        seen = eyes(pixels.flatten(0, 1).float().to(model.device), grid_thw=grid.to(model.device)).pooler_output
        found = heads(seen.float().view(len(pixels), -1, width).mean(1))
        return found[:, : len(COLORS)], found[:, len(COLORS) :]

    parameters = [*eyes.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    total = epochs * (len(where) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=0.1)
    for epoch in range(epochs):
        order, losses = torch.randperm(len(where)), []
        for start in range(0, len(where) - size + 1, size):
            chosen = order[start : start + size]
            pixels = data.pixels[where[chosen]]
            turned = torch.rand(len(chosen)) < 0.5
            pixels[turned] = mirrored[where[chosen][turned]]
            with torch.autocast(model.device.type, torch.bfloat16):
                color, shape = scores(pixels, data.grid[where[chosen]])
            goal = numbers[chosen].to(model.device)
            loss = torch.nn.functional.cross_entropy(color, goal[:, 0]) + torch.nn.functional.cross_entropy(
                shape, goal[:, 1]
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"eyes, epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
    where, numbers = test.drawings()
    with torch.no_grad():
        found = torch.stack([s.argmax(1) for s in scores(test.pixels[where], test.grid[where])], 1).cpu()
    return float(found.eq(numbers).all(1).float().mean())


@torch.no_grad()
def exact(model: Any, data: Data, chats: list[Chat], size: int = 256) -> dict[str, float]:
    """Share of exact answers by kind; of a tagged one, what stands in the answer's tags counts."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(chats), size):
        part = chats[start : start + size]
        inputs, _ = data.batch(part, answers=False)
        inputs = {k: v.to(model.device) for k, v in inputs.items()}
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts = data.processor.tokenizer.batch_decode(out, skip_special_tokens=True)
        for (row, _, _, answer), text in zip(part, texts, strict=True):
            given = text.split("<answer>")[-1].split("</answer>")[0]
            right = answer.split("<answer>")[-1].split("</answer>")[0]
            hits[row.kind].append(given.strip() == right)
    return {kind: sum(found) / len(found) for kind, found in sorted(hits.items())}


def report(scores: dict[str, float], prefix: str) -> dict[str, float]:
    """Means over the seen and the left-out kinds."""
    groups = {
        f"{prefix}_seen": [v for k, v in scores.items() if k not in LEFT_OUT],
        f"{prefix}_left_out": [v for k, v in scores.items() if k in LEFT_OUT],
    }
    return {k: round(sum(v) / len(v), 4) for k, v in groups.items()}


def main() -> None:
    parser = arguments(__doc__, "vlm-micro", epochs=4, lr=3e-3, warmup=0.5, average=0.99, batch_size=48)
    parser.add_argument("--epoch-steps", type=int, default=200)
    parser.add_argument("--eye-epochs", type=int, default=24, help="of the eyes alone, over all drawings")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = []
    for row in rows(args.data, "train"):
        _, system, question, answer = asked(row, draw, choices=draw.random() < 0.25)
        texts += [f"{system or ''}user\n{question}", f"assistant\n{answer}".replace("><", "> <")]
    pairs = merges(texts, FIRST - 256)
    (args.out / "vlm-micro.merges.txt").write_text("".join(f"{a} {b}\n" for a, b in pairs), encoding="utf-8")

    processor = micro_processor(pairs)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**MICRO)).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")
    data, test = Data(args.data, "train", processor), Data(args.data, "test", processor)
    if not (args.out / "state.safetensors").exists():
        print(f"both right of {train_eyes(model, data, test, args.eye_epochs):.4f} of the test drawings", flush=True)
    run = Run(model, args, args.epoch_steps, lambda n, p: ("layers." in n or "blocks." in n) and p.ndim == 2)
    for epoch in run.epochs():
        draw = random.Random(args.seed * 100_003 + epoch)
        for index, _ in enumerate(run.batches(epoch, args.epoch_steps * args.batch_size)):
            inputs, labels = data.batch(data.draw(args.batch_size, draw, choices=index % 5 == 4))
            inputs = {k: v.to(args.device) for k, v in inputs.items()}
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(**inputs, labels=labels.to(args.device), use_cache=False).loss
            run.step(loss)
    run.averaged()
    plain = exact(model, test, [(row, None, row.question, row.answer) for row in test.rows[::5]])
    thought = exact(model, test, [(row, THINK, row.question, row.answer) for row in test.rows[::5]])
    print({"plain": plain, "thought": thought})
    run.weights.pop("lm_head.weight", None)  # tied to the word table
    run.finish(**report(plain, "plain"), **report(thought, "thought"), questions=len(test.rows[::5]))


if __name__ == "__main__":
    main()
