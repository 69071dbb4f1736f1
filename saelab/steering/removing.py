"""`ablate_concept`: a concept erased from activations, with probe accuracies and losses before and after."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from saelab.evaluation.rivals import read_codes
from saelab.lm.hooks import find_hook_point
from saelab.lm.models import Model
from saelab.lm.tokens import Tokens
from saelab.sae.sae import SAE
from saelab.steering.collateral import RemovalBench
from saelab.steering.erasing import (
    AffineErasure,
    Edit,
    FeatureErasure,
    To,
    choose_sides,
    draw_directions,
    draw_like,
    erase_direction,
    erase_least,
)
from saelab.steering.interventions import match_source
from saelab.steering.labelled import read_chosen, require_labels
from saelab.steering.rankings import Ranking
from saelab.steering.removals import Removal, average_scores
from saelab.steering.rivals import find_direction

Method = Literal["features", "means", "probe", "erasure"]


def ablate_concept(
    model: Model,
    tokens: Tokens,
    labels: Mapping[str, Bool[Tensor, "n_seq ctx_len"]],
    concept: str,
    sae: SAE | None = None,
    *,
    hook_point: str | None = None,
    read_at: str | None = None,
    methods: Sequence[Method] | None = None,
    k: int = 8,
    ranking: Ranking | Literal["effect"] = "pruning",
    n_directions: int = 1,
    to: To = "usual",
    n_random: int = 3,
    train_frac: float = 0.5,
    n_rows: int = 20_000,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> Removal:
    """Probe accuracies and losses after a concept is erased at a hook point by several methods and by random controls.

        features  the codes of the `k` features, each with one sign, that best predict the concept and fire more where
                  it is true become 0, the reconstruction error kept
        means     directional ablation along the difference of means, `x - ((x - c) . v) v`
        probe     the same along `n_directions` logistic probes, one after another
        erasure   the smallest affine edit that defeats linear probes (LEACE, arXiv:2306.03819)

    c is the mean of tokens without the concept. Controls: for "features" as many random features with similar firing
    rates, for the others as many random directions. Everything is chosen and fitted on training documents and scored on
    the others: balanced accuracy and AUROC of probes retrained on the edited activations at `read_at`, for every
    concept with 20 true and 20 false tokens on each side of the split; and the loss on predictions with the concept
    neither at the token nor at the next one.

    Args:
        model: language model.
        tokens: the text.
        labels: for each concept by name, (n_seq, ctx_len) whether it is true of each token.
        concept: name of the one to erase.
        sae: SAE for "features".
        hook_point: where activations are edited; by default where the SAE was trained.
        read_at: hook point downstream where probes are trained; by default the last residual stream.
        methods: any of the four; by default all (without "features" if there is no SAE).
        k: number of features for "features".
        ranking: how they are chosen: one of `probe_features`' rankings, or "effect" (arXiv:2411.18895).
        n_directions: number of probes' directions for "probe".
        to: "usual" for c, "zero" for the origin in its place.
        n_random: random draws that each control is the mean of; 0 for none.
        train_frac: share of documents for training.
        n_rows: most tokens for probes on each side of the split.
        seed: of the split, the samples and the controls.
        allow_mismatch: go ahead with an SAE of another model, weight processing or hook point.

    Raises:
        ValueError: where the concept is unknown or too rare, and for an SAE of another model, weight processing or hook
            point (unless `allow_mismatch`).
    """
    require_labels(labels, tokens)
    point = _find_point(model, sae, hook_point, allow_mismatch)
    bench = RemovalBench.make(model, tokens, labels, concept, point, read_at, (train_frac, n_rows, seed))
    kinds = list(
        methods if methods is not None else [m for m in get_args(Method) if m != "features" or sae is not None]
    )
    if bad := [kind for kind in kinds if kind not in get_args(Method) or (kind == "features" and sae is None)]:
        raise ValueError(f"`methods` must be of {get_args(Method)}, 'features' with an SAE, got {bad}.")
    chooser = _Chooser(sae, bench, k, ranking, n_directions, to, seed)
    edits: dict[str, Edit] = {}
    rows = [bench.score("untouched", None, 0)]
    for kind in kinds:
        edits[kind] = chooser.make(kind)
        rows.append(bench.score(kind, edits[kind], _count(edits[kind])))
    for name, drawn in chooser.draw(edits, n_random):
        rows.append(average_scores(name, [bench.score(name, edit, _count(edit)) for edit in drawn]))
    chosen = edits.get("features")
    return Removal(
        concept=concept,
        hook_point=point,
        read_at=bench.read_at,
        rows=tuple(rows),
        features=chosen.features if isinstance(chosen, FeatureErasure) else (),
        signs=chosen.signs if isinstance(chosen, FeatureErasure) else (),
        rate=float(bench.truth[concept][bench.held].float().mean()),
        n_train=int(bench.train.sum()),
        n_tokens=int(bench.held.sum()),
        n_predictions=int(bench.predictions(False).sum()),
        edits=edits,
    )


def _find_point(model: Model, sae: SAE | None, hook_point: str | None, allow_mismatch: bool) -> str:
    if sae is not None:
        return match_source(sae, model, hook_point, allow_mismatch)
    if hook_point is None:
        raise ValueError("`hook_point` must be given where no SAE says it, got None.")
    return find_hook_point(model, hook_point)


def _count(edit: Edit) -> int:
    return len(edit.features) if isinstance(edit, FeatureErasure) else len(edit.read)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class _Chooser:
    """Makes the edits from training tokens, and their random controls."""

    sae: SAE | None
    bench: RemovalBench
    k: int
    ranking: Ranking | Literal["effect"]
    n_directions: int
    to: To
    seed: int

    def __post_init__(self) -> None:
        x = read_chosen(self.bench.model, self.bench.tokens, self.bench.train, self.bench.hook_point)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", self.bench.truth[self.bench.concept][self.bench.train])
        object.__setattr__(self, "codes", read_codes(self.sae, x) if self.sae is not None else None)

    x: Any = field(init=False, repr=False)
    y: Any = field(init=False, repr=False)
    codes: Any = field(init=False, repr=False)

    def make(self, kind: Method) -> Edit:
        """The edit of one method."""
        if kind == "features":
            assert self.sae is not None
            probe = find_direction(self.x, self.y, self.bench.hook_point, "probe").vector
            pull = (self.sae.directions().detach().cpu() @ probe).numpy()
            return FeatureErasure(self.sae, *choose_sides(self.codes, self.y.numpy(), self.k, self.ranking, pull))
        if kind == "erasure":
            return erase_least(self.x, self.y)
        n = self.n_directions if kind == "probe" else 1
        return erase_direction(self.x, self.y, self.bench.hook_point, kind, n, self.to)

    def draw(self, edits: dict[str, Edit], n: int) -> Iterator[tuple[str, list[Edit]]]:
        """Random controls, for features and for each number of directions among the edits."""
        rng, done = np.random.default_rng(self.seed), set()
        for edit in edits.values() if n else ():
            if isinstance(edit, FeatureErasure):
                pairs = [draw_like(self.codes, edit.features, edit.signs, rng) for _ in range(n)]
                yield "random features", [FeatureErasure(edit.sae, *pair) for pair in pairs]
            elif isinstance(edit, AffineErasure) and (rank := len(edit.read)) not in done:
                done.add(rank)
                name = "random direction" if rank == 1 else f"{rank} random directions"
                yield name, [draw_directions(edit, self.seed + i) for i in range(n)]
