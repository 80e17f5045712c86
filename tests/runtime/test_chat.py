"""What a chat template is given: text, or parts of it where the template is a multimodal model's that takes no text."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from popcompile.runtime.conversation import encode

TEMPLATES = {
    "text": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    "parts": "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates(kind: str, tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = TEMPLATES[kind]
    ids = encode(tokenizer, [{"role": "user", "content": "the cat sat"}], raw=False)
    assert tokenizer.decode(ids[0]) == "the cat sat"
