"""Opening what several commands need: an SAE and the language model that it belongs to."""

from saelab.cli import options
from saelab.lm.models import Model, load_model
from saelab.sae.sae import SAE


def open_pair(sae: str, model: str, device: str | None, progress: bool) -> tuple[SAE, Model]:
    """An SAE and its model, whose weights are processed as those that the SAE was trained on were."""
    chosen = options.choose_device(device)
    coder = SAE.from_pretrained(sae, device=chosen)
    processing = coder.provenance.weight_processing if coder.provenance else "none"
    return coder, load_model(model, device=chosen, weight_processing=processing, progress=progress)
