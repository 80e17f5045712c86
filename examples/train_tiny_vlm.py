"""Train a tiny Qwen3-VL or Gemma-3 that reads numbers in pictures: some eight minutes on one core, 4 MB.

    python examples/train_tiny_vlm.py qwen3_vl OUT

writes OUT/model, a checkpoint; OUT/pictures, which it may be calibrated on; and OUT/questions, pictures that it was not
trained on with a file of questions and answers, for `popcompile evaluate --images`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random

import torch
from tiny_vlm.conversations import picture
from tiny_vlm.families import FAMILIES, Family
from tiny_vlm.training import train

#: what pictures are drawn by: those of questions, and those to calibrate on; training has seeds of its own
_ASKED, _SHOWN = "asked", "shown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--pictures", type=int, default=300, help="of each kind (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make(FAMILIES[options.family], options.out, options.pictures, options.seed)
    print(f"{options.out}: {time.process_time():.0f} s of CPU time")


def make(family: Family, out: Path, pictures: int = 300, seed: int = 0) -> None:
    """Train a model, and draw so many pictures of each kind."""
    train(family, out / "model", seed)
    write_pictures(family, out / "pictures", pictures, f"{_SHOWN} {seed}")
    write_pictures(family, out / "questions", pictures, f"{_ASKED} {seed}")


def write_pictures(family: Family, folder: Path, count: int, seed: str) -> None:
    """Pictures, and questions.jsonl with one question about each."""
    folder.mkdir(parents=True, exist_ok=True)
    random, lines = Random(seed), []
    for i in range(count):
        size = random.choice(family.sizes)
        shown = picture(random, size)
        name, (question, answer) = f"{i:04}.png", shown.turns[0]
        shown.pictures[0].image.save(folder / name)
        lines.append(json.dumps({"image": name, "question": question, "answer": answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
