"""Fingerprints of model weights, which identify a model by its weights, whatever its name."""

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from saelab.lm.plain import unwrap

N_ENTRIES = 16
"""number of entries of each parameter, evenly spaced"""
N_SUMS = 4
TOLERANCE = 0.25
"""largest difference, as a fraction of the sum of magnitudes times the coarser dtype's resolution: rounding moves sums
by a tenth of that with some hundred parameters, other random weights move them by a hundredth of the sum itself
"""
FINEST = 1e-6
"""finest resolution required: folded weights were rounded once more, by each machine in its own order"""
WHOLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""dtypes whose rounding stays below the tolerance"""

Sketch = tuple[float, ...]


def sketch_weights(model: nn.Module) -> Sketch | None:
    """Fingerprint of a model's weights; None where weights are quantized or have not been loaded.

    It consists of a checksum of the parameters' shapes, the resolution of their dtype, the sum of the magnitudes of 16
    entries of each parameter, and 4 sums of these entries times fixed factors. It does not depend on the parameters'
    order, up to rounding not on the dtype, and not on hooks or the bridge.

    >>> sketch_weights(sl.tiny_model(seed=0)) == sketch_weights(sl.tiny_model(seed=0))
    True
    >>> is_same_weights(sketch_weights(sl.tiny_model(seed=0)), sketch_weights(sl.tiny_model(seed=1)))
    False
    """
    weights = list(_find_weights(model))
    if not weights or any(one.dtype not in WHOLE or one.is_meta for one in weights):
        return None
    shapes = sorted(tuple(one.shape) for one in weights)
    entries = torch.stack([_pick(one) for one in weights]).double().cpu()
    phases = torch.arange(1, N_SUMS + 1).double()[:, None] * torch.arange(1, N_ENTRIES + 1)
    sums = (entries @ phases.cos().T).sum(0)
    resolution = max(FINEST, *(torch.finfo(one.dtype).eps for one in weights))
    return (float(zlib.crc32(repr(shapes).encode())), resolution, float(entries.abs().sum()), *sums.tolist())


def is_same_shape(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of models with parameters of the same shapes."""
    return one[0] == other[0]


def is_same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of the coarser dtype."""
    allowed = TOLERANCE * max(one[1], other[1]) * max(one[2], other[2])
    return is_same_shape(one, other) and all(abs(a - b) <= allowed for a, b in zip(one[2:], other[2:], strict=True))


def _find_weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters of Hugging Face's own modules, each once, without those that the bridge derived from them."""
    seen: set[int] = set()
    waiting = [unwrap(getattr(model, "original_model", model))]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        waiting += [unwrap(child) for child in module.children()]
        for weight in module.parameters(recurse=False):
            if weight.numel() and id(weight) not in seen:
                seen.add(id(weight))
                yield weight


def _pick(weight: Tensor) -> Tensor:
    places = torch.linspace(0, weight.numel() - 1, N_ENTRIES, dtype=torch.float64).long().to(weight.device)
    return weight.detach().reshape(-1)[places].float()
