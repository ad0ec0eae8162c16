"""Writes multimodal.json: what transformers answers about two pictures and a recording, greedily.

python tests/golden/make_multimodal_golden.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.model import Model
from support.multimodal_conversation import (
    FIRST,
    SECOND,
    continued,
    transformers_answer,
    transformers_model,
    write_checkpoint,
)

GOLDEN = Path(__file__).with_name("multimodal.json")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder, "ckpt"))
        bundle = export_bundle(checkpoint, Path(folder, "out"), recipe="fp32", context=1024, verify=False)
        ours, theirs = Model.load(bundle.path), transformers_model(checkpoint)
        first, second = ours.prompt(FIRST), ours.prompt(SECOND)
        answers = {"first": transformers_answer(theirs, ours, first)}
        prompts = {"second": second, "continued": continued(first, answers["first"][0], second)}
        answers |= {name: transformers_answer(theirs, ours, p) for name, p in prompts.items()}
    golden = {
        name: {"tokens": tokens, "logits": [round(value, 5) for value in logits]}
        for name, (tokens, logits) in answers.items()
    }
    GOLDEN.write_text(json.dumps(golden) + "\n")
    print(GOLDEN, {name: len(set(tokens)) for name, (tokens, _) in answers.items()})


if __name__ == "__main__":
    main()
