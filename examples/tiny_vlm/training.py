"""Train a tiny model in three stages: its tower reads digits, its decoder looks things up, then both answer questions.

All at once is not learned in minutes: a decoder does not learn to read before its tower sees, and looks up one of six
names after 200 steps, one of fifty not after 1,000. So it begins with few names, and more come whenever it knows these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import new_checkpoint
from .conversations import NAMES, Codes, Conversation, Document, picture, repeat
from .families import Family
from .inputs import Inputs
from .pictures import digits_in_cells

Example = Conversation | Document
#: what tokens weigh beside those of answers: a model also learns what prompts look like
_OTHERS = 0.1
#: steps between two lines of progress
_EVERY = 50
#: of the learning rate: steps that it rises, and what is left of it at the end
_RISE, _LOWEST = 40, 0.05


def train(family: Family, folder: Path, seed: int = 0, log: Callable[[str], None] = print) -> None:
    """Write a trained checkpoint to a folder. log: takes lines of progress."""
    training = Training(family, folder, seed, log)
    training.tower(1200)
    training.lists(1000)
    training.everything(1000)
    training.save()


class Training:
    """A model on its way."""

    def __init__(self, family: Family, folder: Path, seed: int, log: Callable[[str], None]) -> None:
        torch.manual_seed(seed)
        self.family, self.folder, self.random, self.log = family, folder, Random(seed), log
        self.model = new_checkpoint(family, folder).train()
        self.inputs = Inputs(family, folder)
        self._right: dict[str, list[float]] = defaultdict(list)

    def tower(self, steps: int, rows: int = 32) -> None:
        """The vision tower alone tells which digit is in each cell of a picture, or that none is."""
        head = nn.Linear(self.model.get_input_embeddings().embedding_dim, 11)
        decoder = {id(p) for p in self.model.get_decoder().parameters()}
        tower = [parameter for parameter in self.model.parameters() if id(parameter) not in decoder]
        optimizer = Optimizer([*tower, *head.parameters()], steps)
        for step in range(steps):
            size = self.random.choice(self.family.sizes)
            pictures = [picture(self.random, size).pictures[0] for _ in range(rows)]
            labels = torch.tensor([digit for p in pictures for digit in digits_in_cells(p)])
            features = self._features(self.inputs.pixels(pictures))
            logits = head(F.layer_norm(features, features.shape[-1:]))
            optimizer.step(F.cross_entropy(logits, labels))
            self._note(step, "digits in cells", (logits.argmax(-1) == labels)[labels < 10])

    def lists(self, steps: int, rows: int = 32) -> None:
        """The decoder alone: codes of ever more names, and numbers to repeat. At most `steps`, until it knows them all
        and answers questions about them.
        """
        optimizer = Optimizer(self.model.get_decoder().parameters(), rate=1e-3)
        known, recent, answered = 6, deque[float](maxlen=10), deque[float](maxlen=10)
        for step in range(steps):
            chosen, listed = self.random.random(), self.random.randint(2, min(8, known))
            chosen = chosen if known > 12 else 1.0
            codes = Codes(1 if known < 24 else self.random.randint(1, 3), listed, known)
            if chosen < 0.1:
                digits = self.random.randint(2, 6)
                self._learn(step, optimizer, "repeat", [repeat(self.random, digits) for _ in range(rows)])
            elif chosen < 0.35:
                chats = [codes.conversation(self.random, 2) for _ in range(rows)]
                answered.append(self._learn(step, optimizer, "codes", chats))
            else:
                documents = [codes.document(self.random) for _ in range(rows)]
                recent.append(self._learn(step, optimizer, f"documents, {known} names", documents))
            if known < len(NAMES) and _knows(recent, 0.9):
                known += 6
                recent.clear()
            elif known >= len(NAMES) and _knows(recent, 0.9) and _knows(answered, 0.8):
                return

    def everything(self, steps: int) -> None:
        """The whole model, of prompts that get longer."""
        optimizer = Optimizer(self.model.parameters(), steps, rate=1.5e-3)
        for step in range(steps):
            kind, examples = self._mixed(step / steps)
            self._learn(step, optimizer, kind, examples)

    def _mixed(self, progress: float) -> tuple[str, Sequence[Example]]:
        random, sizes = self.random, self.family.sizes
        chosen = random.random()
        if chosen < 0.1:
            digits = random.randint(2, 12)
            return "repeat", [repeat(random, digits) for _ in range(32)]
        if chosen < 0.35:
            size = random.choice(sizes)
            return "picture", [picture(random, size) for _ in range(32)]
        if chosen < 0.6:
            codes = Codes(random.randint(1, 3), random.randint(3, 8 + round(24 * progress)))
            return "codes", [codes.conversation(random, 4) for _ in range(24)]
        listed = random.randint(2, 4)
        codes = Codes(random.randint(1, 2), listed, pictured=random.randint(1, listed), sizes=sizes)
        if chosen < 0.75:
            return "pictured documents", [codes.document(random) for _ in range(16)]
        return "pictured codes", [codes.conversation(random, 3) for _ in range(16)]

    def save(self) -> None:
        self.model.save_pretrained(self.folder)

    def _features(self, pixels: dict[str, Tensor]) -> Tensor:
        """Of all image tokens, [tokens, hidden]."""
        found = self.model.model.get_image_features(**pixels, return_dict=True).pooler_output
        return torch.cat(list(found))

    def _learn(self, step: int, optimizer: Optimizer, kind: str, examples: Sequence[Example]) -> float:
        """One step; returns the share of answers that begin right."""
        given, learned = self.inputs.training_batch(examples)
        logits = self.model(**given, use_cache=False).logits[:, :-1]
        labels, learned = given["input_ids"][:, 1:], learned[:, 1:]
        others = given["attention_mask"][:, 1:].bool() & (labels != self.inputs.image_id) & ~learned
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        optimizer.step(loss[learned].mean() + _OTHERS * loss[others].mean())
        first = learned & ~F.pad(learned, (1, -1))
        return self._note(step, kind, (logits.argmax(-1) == labels)[first])

    def _note(self, step: int, kind: str, right: Tensor) -> float:
        share = right.float().mean().item()
        self._right[kind].append(share)
        if (step + 1) % _EVERY == 0:
            shares = ", ".join(f"{name} {statistics.mean(values):.2f}" for name, values in sorted(self._right.items()))
            self.log(f"step {step + 1}, {time.process_time():.0f} s of CPU: right of {shares}")
            self._right.clear()
        return share


def _knows(recent: deque[float], share: float) -> bool:
    """Whether of the last steps, as many as are looked at, at least this share was right."""
    return len(recent) == recent.maxlen and statistics.mean(recent) > share


class Optimizer:
    """AdamW. The learning rate rises for 40 steps and, where `steps` are given, falls along a cosine to a twentieth."""

    def __init__(self, parameters: Iterable[nn.Parameter], steps: int | None = None, rate: float = 3e-3) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)

        def factor(step: int) -> float:
            falling = 0.5 + 0.5 * math.cos(math.pi * step / steps) if steps else 1.0
            return min(1, (step + 1) / _RISE) * (_LOWEST + (1 - _LOWEST) * falling)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
