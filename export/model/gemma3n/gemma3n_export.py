"""Gemma 3n, multimodal and text-only, as an `ExportFamily`."""

from __future__ import annotations

from gemma_edge.export.model.export_family import ExportFamily
from gemma_edge.export.model.gemma3n import gemma3n_slice, gemma3n_text
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs, unused_names
from gemma_edge.export.model.gemma3n.gemma3n_towers import ENCODERS, read_tower
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_family import GEMMA3N

GEMMA3N_EXPORT = ExportFamily(
    runtime=GEMMA3N,
    config_type=Gemma3nConfig,
    read_config=Gemma3nConfig.from_file,
    tensor_specs=tensor_specs,
    unused_names=unused_names,
    text=gemma3n_text,
    encoders=ENCODERS,
    read_tower=read_tower,
    slicing=gemma3n_slice,
    turns=("<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"),
)
