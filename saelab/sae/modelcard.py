"""The model card (README.md) of an SAE on the Hugging Face Hub."""

import json
from pathlib import Path
from typing import Any

from saelab.sae.coder import Coder
from saelab.stores.names import shareable
from saelab.stores.results import Result

LOADERS = {
    "saelab": ("import saelab as sl", 'sae = sl.SAE.from_pretrained("{repo}")'),
    "saelens": ("from sae_lens import SAE", 'sae = SAE.from_pretrained("{repo}", ".")'),
    "sparsify": ("from sparsify import SparseCoder", 'sae = SparseCoder.load_from_hub("{repo}")'),
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary",
        'sae, config = load_dictionary(folder, device="cpu")  # where the files of {repo} are',
    ),
}


def write_card(sae: Coder, repo_id: str, format: str, evaluation: Result | None) -> str:
    """Markdown of the model card, with the Hub's header: what the SAE is, its training data, how to load it, and its
    metrics.

    Args:
        sae: the SAE; its provenance, where it has one, gives model, hook point and text.
        repo_id: 'owner/name' on the Hub.
        format: library whose files are uploaded; chooses the loading example.
        evaluation: result of `evaluate`, shown as a table; None leaves that section out.
    """
    origin: Any = getattr(sae, "provenance", None)
    model = shareable(origin.model) if origin else None
    on_hub = model is not None and model.count("/") == 1 and not Path(model).exists()
    header = {
        "library_name": format,
        "tags": ["sparse-autoencoder", "interpretability", "saelab"],
        **({"base_model": model} if on_hub else {}),
    }
    facts = {
        "kind": "transcoder" if sae.cfg.d_out else "sparse autoencoder",
        "activation": str(sae.cfg.activation),
        "widths": f"d_in {sae.cfg.d_in}, d_sae {sae.cfg.d_sae}" + (f", d_out {sae.cfg.d_out}" if sae.cfg.d_out else ""),
        "model": f"{model} (weight processing: {origin.weight_processing})" if origin else "unknown",
        "place": origin.place if origin else "unknown",
        "text": shareable(origin.text) if origin else "unknown",
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", "", f"# {repo_id}", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts.items()), ""]
    load = (line.format(repo=repo_id) for line in LOADERS[format])
    lines += ["## Loading", "", "```python", *load, "```", ""]
    if format != "saelab":
        lines += [f'saelab reads it too: `saelab.SAE.from_pretrained("{repo_id}")`.', ""]
    if evaluation is not None:
        lines += ["## Evaluation", "", "```text", str(evaluation), "```", ""]
    return "\n".join(lines)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
