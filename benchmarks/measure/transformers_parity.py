"""How equal the reference and an fp32 bundle are to transformers, on small random models.

    python -m gemma_edge.benchmarks.measure.transformers_parity results.jsonl

Each model is saved by transformers and read back by the real loading code: logits of prompts longer than the
window, and 64 greedy tokens with several sizes of prefill chunks. Needs torch and transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from gemma_edge.benchmarks.records.environment import environment, now
from gemma_edge.benchmarks.records.record import Record, TableRow
from gemma_edge.benchmarks.records.results_file import append_record
from gemma_edge.devices.script import progress, run_script
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.emit.reference.reference_text import evaluate
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.errors import ParityError, UsageError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.sampling import Sampling

PROMPT_TOKENS, NEW_TOKENS = 90, 64
CHUNKS = (1, 7, 32, 90)
# The synthetic model has sharing, sparsity, per-layer widths and a short window; what else varies:
VARIANTS: dict[str, dict[str, Any]] = {
    "sharing, sparsity, per-layer FFN, short window": {},
    "no sharing": {"num_kv_shared_layers": 0},
    "one KV head, three AltUp streams": {
        "num_key_value_heads": 1,
        "altup_num_inputs": 3,
        "altup_active_idx": 1,
    },
    "biases, untied head, other softcap and epsilon": {
        "attention_bias": True,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 12.0,
        "rms_norm_eps": 1e-4,
    },
    "all layers global": {"layer_types": ["full_attention"] * 12},
}


def measure(folder: Path, changes: dict[str, Any]) -> dict[str, float]:
    """Largest logit errors, and whether greedy tokens agree (1.0 or 0.0), of one variant."""
    import torch
    from transformers import Gemma3nForCausalLM

    checkpoint_path = folder / "checkpoint"
    synthesize(checkpoint_path, "tiny", config=changes, multimodal_layout=False, progress=False)
    model: Any = Gemma3nForCausalLM.from_pretrained(
        checkpoint_path, dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config.eos_token_id = None  # every token of the 64 counts
    with Checkpoint.open(checkpoint_path) as checkpoint:
        ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, PROMPT_TOKENS)
        with torch.no_grad():
            expected = model(torch.tensor(ids)[None]).logits[0].numpy()
            generated = model.generate(torch.tensor(ids)[None], max_new_tokens=NEW_TOKENS, do_sample=False)
            tokens = generated[0, PROMPT_TOKENS:].tolist()
        reference = float(np.abs(evaluate(checkpoint, [ids.tolist()])[0] - expected).max())
    bundle_error, equal = 0.0, True
    for chunk in CHUNKS:
        bundle = export_bundle(
            checkpoint_path, folder / "bundle", recipe="fp32", context=256, chunk=chunk
        ).path
        ours = Model.load(bundle)
        parts = [ids[i : i + chunk] for i in range(0, PROMPT_TOKENS, chunk)]
        logits = np.concatenate(
            [ours.decoder.forward(ours.embeddings.lookup(p), ours.per_layer.lookup(p), len(p)) for p in parts]
        )
        bundle_error = max(bundle_error, float(np.abs(logits - expected).max()))
        ours.reset()
        stream = ours.stream_tokens(
            ids.tolist(), sampling=Sampling(temperature=0.0), max_tokens=NEW_TOKENS, end_ids=frozenset()
        )
        equal = equal and list(stream) == tokens
    return {"reference_error": reference, "bundle_error": bundle_error, "greedy_equal": float(equal)}


def main() -> int:
    if len(sys.argv) > 2:
        raise UsageError("expected at most one argument, a JSONL file to append the record to")
    try:
        import transformers
    except ImportError:
        raise UsageError('this needs transformers: pip install -c constraints.txt ".[all,dev]"') from None
    results = {}
    for name, changes in VARIANTS.items():
        with temporary_folder("parity") as folder:
            results[name] = measure(folder, changes)
        progress(f"{name}: " + ", ".join(f"{key} {value:.2g}" for key, value in results[name].items()))
    reference, bundle = (
        max(each[key] for each in results.values()) for key in ("reference_error", "bundle_error")
    )
    equal, count = all(each["greedy_equal"] for each in results.values()), len(results)
    record = Record(
        kind="parity",
        name="parity",
        model=f"{count} small random models",
        recipe="fp32",
        time=now(),
        environment=environment(),
        metrics={
            "reference_error": reference,
            "bundle_error": bundle,
            "greedy_equal": equal,
            "transformers": transformers.__version__,
        },
        raw=results,
        readme=(
            TableRow(
                f"reference against transformers, {count} small random models, max logit error",
                "≤ 1e-4",
                f"{reference:.1e}",
            ),
            TableRow(
                f"fp32 bundle against transformers; {NEW_TOKENS} greedy tokens, prefill chunks {CHUNKS}",
                "≤ 1e-3; identical tokens",
                f"{bundle:.1e}; {'identical' if equal else 'NOT identical'}",
            ),
        ),
    )
    if len(sys.argv) == 2:
        append_record(Path(sys.argv[1]), record)
    return 0 if equal else ParityError.exit_code


if __name__ == "__main__":
    sys.exit(run_script(main))
