"""`LossTerm`: one summand of the training objective, a small frozen dataclass; classes are registered by name.

To add one, define and register a class; configuration, training, checkpoints and the command line can then use it:

    @register_loss_term("code_energy")
    @dataclass(frozen=True)
    class CodeEnergy(LossTerm):
        coefficient: float = 1e-3

        def __call__(self, step):
            return step.values.square().sum() / step.n_tokens

    SAEConfig(d_in=64, d_sae=1024, objective=(ReconstructionLoss(), AuxK(), CodeEnergy()))
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.functional.codes import Entries, SparseCodes, sparse_decode
from saelab.functional.sparse_products import GradientMemory, transpose_entries
from saelab.stores.validation import read_fields, require_object
from saelab.training.loop import ENTRY_KEYS
from saelab.training.ranks import ALONE, RankGrid
from saelab.training.schedules import Schedule, Scheduled, bounds_of

LOSS_TERMS: dict[str, "type[LossTerm]"] = {}
NEEDS = ("dense", "neighbors")

T = TypeVar("T", bound="type[LossTerm]")


@dataclass(eq=False)
class TrainingStep:
    """What a loss term may read in one training step: inputs, targets, codes, weights and progress of the run.

    Tensors are in the normalizers' units and differentiable unless stated otherwise. Codes are available at their
    non-zero entries (`values`, `entries`); `z` is the same as a dense matrix, built when it is first read.
    """

    sae: Any
    """the `SAEModule` that is trained"""
    x: Float[Tensor, "n_tokens d_in"]
    """inputs"""
    y: Float[Tensor, "n_tokens d_out"]
    """what the latents reconstruct: inputs, or a transcoder's targets without its skip connection"""
    W_dec: Float[Tensor, "d_sae d_out"]
    """decoder of this step, an archetypal one computed from its points"""
    errors: Float[Tensor, "n_groups"]
    """squared reconstruction errors, summed over tokens, one per prefix or number of latents"""
    residual: Float[Tensor, "n_tokens d_out"]
    """`y - b_dec - z W_dec`, without gradient"""
    penalty: Tensor | None
    """the activation's sparsity penalty of each code, of `Gated` its open gate's pre-activation; or None. Its sum has
    the gradients of zeros that are not among the codes
    """
    state: Mapping[str, Tensor]
    """state of training: firing counters, sparsity coefficient, and each term's own under `name.key`"""
    share: float
    """completed steps over all steps, 0 to 1"""
    number: int
    """number of completed steps"""
    seed: int
    """seed of the run"""
    dead_after_tokens: int
    """tokens without firing after which a latent is dead"""
    sparse: tuple[Float[Tensor, "nnz"], Entries] | None = None
    """codes at their entries where this step computed them so; read `values` and `entries`"""
    dense: Float[Tensor, "n_tokens d_sae"] | None = None
    """dense codes where this step computed them; read `z`"""
    u: Float[Tensor, "n_tokens d_sae"] | None = None
    """all pre-activations where this step computed them, as it does for terms that need "dense"; else None"""
    notes: dict[str, Tensor] = field(default_factory=dict)
    """statistics that a term keeps for its own `observe`, without gradient"""
    ranks: RankGrid = ALONE
    """processes that train together; only a term that is `sharded` has to read it"""
    b_read: Float[Tensor, "d_in"] | None = None
    """what the encoder subtracts from x, b_dec with the gradients of all ranks; None for a transcoder"""
    memory: Mapping[str, GradientMemory] = field(default_factory=dict)
    """what may keep gradients of rows of W_enc (transposed) and W_dec; see `select_rows`"""
    weights: Float[Tensor, "d_out"] | None = None
    """factor on the squared error of each output, as layers of a cross-layer transcoder have it; None: all are alike"""

    @property
    def n_tokens(self) -> int:
        """Number of tokens in `x`."""
        return len(self.x)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.W_dec)

    @property
    def values(self) -> Float[Tensor, "nnz"]:
        """Codes, token by token; in JumpReLU's sparse step also zeros that carry a gradient to the threshold."""
        return self._codes[0]

    @property
    def entries(self) -> Entries:
        """Latent and token of each code."""
        return self._codes[1]

    @cached_property
    def _codes(self) -> tuple[Tensor, Entries]:
        if self.sparse is not None:
            return self.sparse
        assert self.dense is not None
        return find_entries(self.dense)

    @cached_property
    def z(self) -> Float[Tensor, "n_tokens d_sae"]:
        """Codes as a dense matrix."""
        return self.codes_of(self.d_sae)

    def codes_of(self, prefix: int) -> Float[Tensor, "n_tokens prefix"]:
        """Codes of the first latents as a dense matrix.

        Args:
            prefix: number of latents.
        """
        if self.dense is not None:
            return self.dense[:, :prefix]
        rows, latents, values = self.entries.rows, self.entries.indices, self.values
        if prefix < self.d_sae:
            inside = (latents < prefix).nonzero()[:, 0]
            rows, latents, values = rows[inside], latents[inside], values.index_select(0, inside)
        flat = values.new_zeros(self.n_tokens * prefix).index_add(0, rows * prefix + latents, values)
        return flat.view(self.n_tokens, prefix)

    @property
    def y_hat(self) -> Float[Tensor, "n_tokens d_out"]:
        """Reconstruction of `y`, differentiable."""
        if self.dense is not None:
            return self.dense @ self.W_dec + self.sae.b_dec
        entries = self.entries
        return sparse_decode(self.values, self.W_dec, entries.indices, entries.rows, entries.offsets) + self.sae.b_dec

    @property
    def latents(self) -> range:
        """The latents of the SAE whose weights and codes are here: all, or in a `sharded` term those of this rank."""
        n = self.d_sae
        return range(self.ranks.latents.index * n, (self.ranks.latents.index + 1) * n)

    @cached_property
    def dead(self) -> Int[Tensor, "n_dead"]:
        """Indices of the dead latents."""
        return (self.state["tokens_since_fired"] >= self.dead_after_tokens).nonzero().squeeze(1)

    @property
    def generator(self) -> torch.Generator:
        """A random generator on the CPU, seeded by run and step, so that no state has to be saved."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)


def find_entries(z: Float[Tensor, "n_tokens d_sae"]) -> tuple[Float[Tensor, "nnz"], Entries]:
    """The non-zero codes of a dense matrix, differentiable, and where they are."""
    codes = SparseCodes.from_dense(z)
    return codes.values, Entries(codes.indices, codes.rows, codes.offsets)


def stack_groups(
    values: Float[Tensor, "nnz"], entries: Entries, group: Int[Tensor, "nnz"], n_groups: int, n_tokens: int
) -> tuple[Float[Tensor, "nnz"], Entries]:
    """The same codes in n_groups stacked batches, as `nested_decode_error` takes them: row `g * n_tokens + r` holds
    those of group g for token r.

    Args:
        values: codes, token by token.
        entries: latent and token of each code.
        group: group of each code, 0-based.
        n_groups: number of groups.
        n_tokens: tokens in the batch.
    """
    stacked = group * n_tokens + entries.rows
    order, offsets = transpose_entries(stacked, n_tokens * n_groups)
    return values.index_select(0, order), Entries(entries.indices[order], stacked[order], offsets)


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """Base class of loss terms. Subclass it as a frozen dataclass and register it; only `__call__` is required.

    The objective is the sum over the terms of `coefficient * term(step)`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """"neighbors": batches whose row i and row i + n/2 are neighboring tokens of one document; "dense": all
    pre-activations, so that every step is computed densely
    """
    sharded: ClassVar[bool] = False
    """whether in training by several processes the term reads the step as this one has it, its own tokens and latents,
    and combines its value with those of the others (`TrainingStep.ranks`); else it is given the step of one process,
    which is gathered as far as it is read. A class that defines `__call__` does not inherit this
    """

    reads_codes: ClassVar[bool] = True
    """whether the term reads codes or their entries, and not only errors, residual and sum of penalties, for which
    `JumpReLU` needs no zeros among its codes. A subclass does not inherit this
    """

    coefficient: Scheduled = 1.0
    """weight of the term in the objective, a number or a `Schedule`"""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__call__" in vars(cls) and "sharded" not in vars(cls):
            cls.sharded = False
        if "reads_codes" not in vars(cls):
            cls.reads_codes = True

    def __post_init__(self) -> None:
        low, _ = bounds_of(self.coefficient)
        if not low >= 0:
            raise ValueError(f"`coefficient` must be at least 0, got {self.coefficient}.")

    def __call__(self, step: TrainingStep) -> Float[Tensor, ""]:
        """Value of the term for one batch, without its coefficient; a mean over tokens where it is one.

        Args:
            step: inputs, codes, weights and progress of the step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(step).")

    def check(self, cfg: Any) -> None:
        """Raise ValueError for settings that do not fit the configuration `cfg` of an SAE."""

    def initial_state(self, cfg: Any) -> dict[str, Tensor]:
        """Tensors that the term keeps from step to step for an SAE of configuration `cfg`, saved in checkpoints; none
        by default.
        """
        return {}

    def observe(self, notes: Mapping[str, Tensor], state: dict[str, Tensor], share: float) -> None:
        """Update the term's state after a step; by default nothing.

        Args:
            notes: what the terms wrote to `TrainingStep.notes`.
            state: state of training, with the term's own under `name.key`; changed in place.
            share: completed steps over all steps, this one included.
        """

    def to_dict(self) -> dict[str, Any]:
        """Name and settings as a dictionary, as in config.json."""
        return {"name": self.name, **{key: _as_lists(value) for key, value in asdict(self).items()}}


def _as_lists(value: Any) -> Any:
    return [_as_lists(part) for part in value] if isinstance(value, (tuple, list)) else value


def register_loss_term(name: str) -> Callable[[T], T]:
    """Class decorator that registers a loss term under a name, for config files and the command line; ValueError for a
    name in use, one that the history has for something else, and an unknown need.
    """

    def register(cls: T) -> T:
        taken = LOSS_TERMS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"A loss term's name must be free, '{name}' is {taken.__name__}; choose another.")
        if name in ENTRY_KEYS or "/" in name:
            raise ValueError(f"A loss term's name must have no '/' and be none of {list(ENTRY_KEYS)}, got '{name}'.")
        if unknown := sorted(cls.needs - set(NEEDS)):
            raise ValueError(f"`needs` of a loss term must be of {list(NEEDS)}, got {unknown}.")
        cls.name = name
        LOSS_TERMS[name] = cls
        return cls

    return register


def read_loss_term(plain: Any) -> LossTerm:
    """Loss term from its `to_dict` form in a file; ValueError for anything else."""
    settings = dict(require_object(plain, "A loss term"))
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"A loss term must have a name, got {str(name)[:40]!r}. Was it edited?")
    if name not in LOSS_TERMS:
        near = get_close_matches(name, LOSS_TERMS, n=5) or sorted(LOSS_TERMS)[:5]
        raise ValueError(
            f"A loss term must be registered, got '{name[:80]}'. Did you mean one of {near}? Import the module that "
            "registers your own before."
        )
    for key, value in settings.items():
        if isinstance(value, dict) and {"start", "end"} <= set(value):
            settings[key] = read_fields(Schedule, value)
    known = {each.name for each in fields(LOSS_TERMS[name])}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"Loss term '{name}' takes {sorted(known)}, got {unknown[:5]}; remove or rename them.")
    return read_fields(LOSS_TERMS[name], settings)
