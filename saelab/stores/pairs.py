"""`ActivationPairs`: activations at two hook points for the same tokens, concatenated for training a transcoder."""

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.stores.activations import Activations
from saelab.stores.batches import BUFFER_TOKENS, ShuffledBatches
from saelab.stores.manifest import INT_COLUMNS
from saelab.stores.provenance import Provenance

PART_TOKENS = 1 << 20


class ActivationPairs:
    """Inputs and targets of a transcoder for the same tokens; rows are (d_in + d_out) wide.

    Args:
        inputs: activations that the transcoder encodes.
        targets: activations that it reconstructs.

    Raises:
        ValueError: the two are not of the same tokens: number of rows, token ids, documents, positions and origin are
            compared, as far as both have them.

    >>> x = Activations.from_tensor(torch.arange(6.0).view(3, 2))
    >>> pairs = ActivationPairs(x, Activations.from_tensor(torch.ones(3, 1)))
    >>> pairs[1:].tolist()
    [[2.0, 3.0, 1.0], [4.0, 5.0, 1.0]]
    """

    def __init__(self, inputs: Activations, targets: Activations) -> None:
        if len(inputs) != len(targets):
            raise ValueError(
                f"Pairs must have as many inputs as targets, got {len(inputs)} and {len(targets)}; collect both hook "
                "points in one call."
            )
        self.inputs, self.targets = inputs, targets
        self.provenance: Provenance | None = None
        if inputs.provenance and targets.provenance:
            self.provenance = inputs.provenance.paired(targets.provenance)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Compare the columns of both, a part of the rows at a time."""
        for start in range(0, len(self), PART_TOKENS):
            x, y = (acts.rows(start, min(start + PART_TOKENS, len(self))) for acts in (self.inputs, self.targets))
            for name in INT_COLUMNS:
                mine, other = getattr(x, name), getattr(y, name)
                if mine is not None and other is not None and not torch.equal(mine, other):
                    row = start + int((mine != other).nonzero()[0])
                    raise ValueError(
                        f"Pairs must be of the same tokens, their {name} differ from row {row} on; collect both hook "
                        "points in one call."
                    )

    @property
    def d_in(self) -> int:
        """Width of the input activations."""
        return self.inputs.d_in

    @property
    def d_out(self) -> int:
        """Width of the target activations."""
        return self.targets.d_in

    @property
    def n_tokens(self) -> int:
        """Number of pairs; equal to `len`."""
        return len(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice) -> Float[Tensor, "n d_in_d_out"]:
        """Copy of a slice of pairs, each an input followed by its target."""
        return torch.cat([self.inputs[index], self.targets[index]], dim=1)

    def rows(self, start: int, stop: int) -> "ActivationPairs":
        """The pairs start..stop as a lazily read view."""
        part = object.__new__(ActivationPairs)
        part.inputs, part.targets = self.inputs.rows(start, stop), self.targets.rows(start, stop)
        part.provenance = self.provenance
        return part

    def batches(
        self, batch_size: int, seed: int = 0, *, buffer_tokens: int = BUFFER_TOKENS, epochs: int | None = None
    ) -> ShuffledBatches:
        """Iterator over shuffled batches of pairs (batch_size, d_in + d_out); see `ShuffledBatches`.

        Args:
            batch_size: pairs per batch.
            seed: of the order of the pairs.
            buffer_tokens: pairs held in memory and shuffled together.
            epochs: passes over the pairs; None for no end.
        """
        return ShuffledBatches(_Joined(self), batch_size, seed, buffer_tokens=buffer_tokens, epochs=epochs)


class _Joined:
    """Pairs as rows that `ShuffledBatches` can read."""

    def __init__(self, pairs: ActivationPairs) -> None:
        self.pairs = pairs
        self.d_in = pairs.d_in + pairs.d_out
        self.dtype = torch.promote_types(pairs.inputs.dtype, pairs.targets.dtype)

    def __len__(self) -> int:
        return len(self.pairs)

    def copy_slice(self, start: int, out: Float[Tensor, "n d"]) -> None:
        """Fill `out` with consecutive pairs, the first of which is pair `start`."""
        self.pairs.inputs.copy_slice(start, out[:, : self.pairs.d_in])
        self.pairs.targets.copy_slice(start, out[:, self.pairs.d_in :])
