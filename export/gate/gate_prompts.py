"""The built-in prompts of the parity gate and of calibration.

Short, so that the reference passes over them in one reading of the weights; of several kinds, so that rare
tokens, code and other scripts take part.
"""

from __future__ import annotations

from gemma_edge.runtime.prompt.tokenizer import Tokenizer

PROMPTS = (
    "<start_of_turn>user\nExplain in two sentences why the sky is blue at noon and red at sunset."
    "<end_of_turn>\n"
    "<start_of_turn>model\nSunlight is scattered by air molecules, and blue light is scattered the most.",
    'def mean(values: list[float]) -> float:\n    """The arithmetic mean."""\n'
    "    return sum(values) / len(values)\n\n"
    '{"tool": "set_timer", "arguments": {"minutes": 12, "label": "pasta"}}\n',
    "El perro corre por la playa. Der Zug kommt um 17:42 Uhr an. "
    "東京は日本の首都です。 Москва - столица России.",
)


def prompt_ids(tokenizer: Tokenizer, limit: int) -> list[list[int]]:
    """The built-in prompts as token ids with one bos each, cut to `limit` tokens."""
    return [tokenizer.encode(text, bos=True)[:limit] for text in PROMPTS]
