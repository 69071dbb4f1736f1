"""`evaluate_sparse_control`: approximation, sparse control and interpretability of dictionaries (arXiv:2405.08366).

Activations of prompts and of their counterfactual versions are read and patched, and codes are edited sparsely.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.evaluation.supervised_dictionary import (
    Attributes,
    AttributeScore,
    Fit,
    fit_supervised_dictionary,
    mark_values,
    score_attributes,
)
from saelab.interventions.edited_runs import EditedRuns
from saelab.interventions.prompt_metrics import Texts, read_last
from saelab.lm.huggingface import AnyModel, as_model
from saelab.sae.sae import SAE
from saelab.stores.results import Result, find_row, format_table

ORIGINAL = "original"
"""version of the unedited prompts"""
KS = (1, 2, 4, 8, 16, 32)
ENCODE_ROWS = 4096
CHANGES = 0.02  # of predictions: with fewer, agreement says little


@dataclass(frozen=True, eq=False, kw_only=True)
class EditTask:
    """Prompts and counterfactual versions of them ("edits"), in which one attribute has another value.

    The unedited prompts are the version named "original". Activations are read and edited at the same positions of all
    versions of a prompt. Versions have the same lengths; rows of ids are padded on the right. ValueError where versions
    do not match.
    """

    model: AnyModel
    hook_point: str
    """where activations are read and edited"""
    ids: Mapping[str, Int[Tensor, "n_prompts n"]]
    """token ids by version, those of the unedited prompts under "original"."""
    lengths: Int[Tensor, "n_prompts"]
    places: Int[Tensor, "n_prompts n_places"]
    """positions, negative ones from a prompt's end"""
    place_names: tuple[str, ...]
    """names of the positions"""
    attributes: Mapping[str, Sequence[Attributes]]
    """values of the attributes of each prompt, by version"""
    joined: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """additional attributes for interpretability, each a union of some: a value holds where any of them has it"""
    answers: Int[Tensor, "n_prompts"]
    """the token that each original prompt determines"""
    other_answers: Int[Tensor, "n_prompts"]
    """the alternative whose logit is subtracted"""
    asks: Sequence[str] = ()
    """the attribute of each original prompt that its answer tells; `score_disentanglement` needs it"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_model(self.model))
        shapes = {tuple(ids.shape) for ids in self.ids.values()}
        if ORIGINAL not in self.ids or len(shapes) != 1 or set(self.ids) != set(self.attributes):
            raise ValueError(
                f"Versions must be '{ORIGINAL}' and edits of one shape, got {list(self.ids)}, {sorted(shapes)}."
            )
        if self.places.shape[1] != len(self.place_names):
            raise ValueError(f"`place_names` must name {self.places.shape[1]} places, got {self.place_names}.")
        known = {name for one in self.attributes[ORIGINAL] for name in one}
        if self.asks and (len(self.asks) != len(self) or not known.issuperset(self.asks)):
            raise ValueError(
                f"`asks` must have one of {sorted(known)} for each of the {len(self)} prompts, got {len(self.asks)} of "
                f"{sorted(set(self.asks))}."
            )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def edits(self) -> tuple[str, ...]:
        """Names of the counterfactual versions."""
        return tuple(name for name in self.ids if name != ORIGINAL)

    @cached_property
    def positions(self) -> Int[Tensor, "n_prompts n_places"]:
        """Positions counted from 0."""
        return torch.where(self.places < 0, self.places + self.lengths[:, None], self.places)

    @cached_property
    def activations(self) -> dict[str, Float[Tensor, "n_prompts n_places d_in"]]:
        """Activations at the positions, by version."""

        def pick(x: Tensor, rows: Tensor) -> Tensor:
            return x[torch.arange(len(rows))[:, None], self.positions[rows]]

        return {version: self._runs(version).activations(self.hook_point, pick) for version in self.ids}

    def match(self, sae: SAE, allow_mismatch: bool = False) -> None:
        """ValueError for an SAE of another model, weight processing or hook point, unless `allow_mismatch`."""
        self._runs().match(sae, self.hook_point, allow_mismatch)

    def _runs(self, version: str = ORIGINAL) -> EditedRuns:
        """Runs of one version's prompts, of which the logits after the last token are read."""
        return EditedRuns(as_model(self.model), Texts(self.ids[version], self.lengths), read_last)

    def predict(
        self, x: Float[Tensor, "n_prompts n_places d_in"] | None = None, version: str = ORIGINAL
    ) -> Float[Tensor, "n_prompts d_vocab"]:
        """Logits after the last token of each prompt of a version.

        Args:
            x: activations put in at the task's positions; None runs the prompts unchanged.
            version: which prompts are run; by default the original ones.
        """

        def put(old: Tensor, rows: Tensor) -> Tensor:
            assert x is not None
            old[torch.arange(len(rows))[:, None], self.positions[rows]] = x[rows].to(old)
            return old

        return self._runs(version).run(None if x is None else {self.hook_point: put})

    def margins(self, predicted: Float[Tensor, "n_prompts d_vocab"]) -> Float[Tensor, "n_prompts"]:
        """Logit of each prompt's answer minus that of its alternative, both those of the original prompts.

        `predicted` are logits, as `predict` returns them for any version.
        """
        rows = torch.arange(len(self))
        return predicted[rows, self.answers] - predicted[rows, self.other_answers]


@dataclass(frozen=True, eq=False)
class FeatureEdit:
    """A change of the codes of a few features in each row: the change of the activation, and the features chosen."""

    change: Float[Tensor, "n d_in"]
    """of the activations"""
    chosen: Bool[Tensor, "n n_features"]
    """features whose codes change"""


def edit_sparsely(
    z: Float[Tensor, "n n_features"],
    goal: Float[Tensor, "n n_features"],
    rows: Float[Tensor, "n_features d_in"],
    delta: Float[Tensor, "n d_in"],
    ks: Sequence[int],
) -> dict[int, FeatureEdit]:
    """For each k, the change of at most k features' codes from `z` to `goal` that comes nearest to `delta`.

    Greedy: each step takes the feature that most reduces the norm of what is left of delta, as long as one does. A
    feature whose code changes sign counts once. Source: arXiv:2405.08366.

    Args:
        z: codes to start from.
        goal: codes that chosen features are set to.
        rows: decoder row of each feature.
        delta: wanted change of the activations.
        ks: largest numbers of features.

    >>> z, goal = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 3.0, 2.0]])
    >>> edit_sparsely(z, goal, torch.eye(3), torch.tensor([[-1.0, 3.0, 0.0]]), ks=[1])[1].change
    tensor([[0., 3., 0.]])
    """
    steps, squares = goal - z, rows.square().sum(1)
    left, chosen = delta.clone(), torch.zeros_like(z, dtype=torch.bool)
    found = {}
    everyone = torch.arange(len(z))
    for k in range(max(ks, default=0) + 1):
        if k in ks:
            found[k] = FeatureEdit(delta - left, chosen.clone())
        gains = 2 * steps * (left @ rows.T) - steps.square() * squares
        best = gains.masked_fill(chosen, -torch.inf).argmax(1)
        better = gains[everyone, best] > 0
        left = left - torch.where(better, steps[everyone, best], 0)[:, None] * rows[best]
        chosen[everyone[better], best[better]] = True
    return found


def weigh_codes(
    z: Float[Tensor, "n n_features"], rows: Float[Tensor, "n_features d_in"]
) -> Float[Tensor, "n n_features"]:
    """Each feature's share in the reconstruction, `(z_i d_i) . y / ||y||^2` with `y = sum_i z_i d_i`; they add up to 1.

    >>> weigh_codes(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([[0.9000, 0.1000]])
    """
    y = z @ rows
    return z * (y @ rows.T) / y.square().sum(1, keepdim=True).clamp(min=1e-12)


@dataclass(frozen=True, kw_only=True)
class EditScore:
    """Score of one kind of edit with at most k features at each position."""

    edit: str
    """name of the counterfactual version"""
    k: int
    agreement: float
    """share of prompts where the edited model predicts what the patched model predicts; higher is better"""
    magnitude: float
    """share of the reconstruction that the edit removes, mean over prompts and positions; lower is more targeted"""
    unexplained: float
    """squared norm of the difference of activations left after the edit, over that of the difference itself"""


@dataclass(frozen=True, kw_only=True)
class DictionaryScore:
    """All scores of one dictionary on the task."""

    name: str
    n_features: int
    l0: float
    """mean over positions"""
    n_live: int
    """features that fire on any prompt"""
    sufficiency: float
    """margin with x replaced by x_hat: 1 as the unmodified model, 0 as with mean ablation"""
    necessity: float
    """1 less the margin with x replaced by `mean + x - x_hat`, the error alone: 1 where nothing is left"""
    edits: tuple[EditScore, ...]
    """for each k; for edits where patching changes less than 2 % of predictions, and agreement means little, the
    largest k alone"""
    attributes: tuple[AttributeScore, ...]
    """empty for a supervised dictionary, whose rows are the attributes"""

    def edit(self, edit: str, k: int) -> EditScore:
        """The score of one kind of edit at k."""
        return find_row(self.edits, edit=edit, k=k)


@dataclass(frozen=True, kw_only=True)
class SparseControlResult(Result):
    """Result of `evaluate_sparse_control`: one row for each dictionary."""

    hook_point: str
    places: tuple[str, ...]
    """names of the positions edited"""
    rows: tuple[DictionaryScore, ...]
    margin: float
    """logit of the answer less that of the alternative, in the unmodified model"""
    margin_ablated: float
    """the same with the mean of training prompts at the edited positions"""
    changed: dict[str, float]
    """by edit: share of prompts whose prediction patching changes; without any edit, agreement is 1 less this"""
    right: dict[str, float]
    """by edit: share of prompts where the patched model predicts what the model predicts for the edited prompt"""
    n_prompts: int
    n_train: int
    """prompts of the training task, all versions counted"""

    def __getitem__(self, name: str) -> DictionaryScore:
        return find_row(self.rows, name=name)

    def __str__(self) -> str:
        lines = [
            f"{self.hook_point} at {', '.join(self.places)}: {self.n_prompts} prompts (fitted and chosen on "
            f"{self.n_train} others); margin {self.margin:.2f}, mean ablation {self.margin_ablated:.2f}",
        ]
        table = [["", "features", "l0", "live", "suffices", "needed"]]
        for row in self.rows:
            counts = f"{row.n_features:,}", f"{row.l0:.1f}", f"{row.n_live:,}"
            table.append([row.name, *counts, f"{row.sufficiency:.3f}", f"{row.necessity:.3f}"])
        lines += format_table(table)
        lines += self._list_edits() + self._list_attributes()
        return "\n".join(lines)

    def _list_edits(self) -> list[str]:
        ks = sorted({score.k for score in self.rows[0].edits})
        lines = [
            "",
            "share that agrees with the patched model / share of the reconstruction taken out, by features a place",
        ]
        for edit, changed in self.changed.items():
            if changed < CHANGES:
                least = min(
                    (score.agreement, row.name) for row in self.rows for score in row.edits if score.edit == edit
                )
                lines.append(
                    f"{edit}: patching changes {changed:.1%} of predictions; agreement is {least[0]:.3f} at least"
                )
                continue
            table = [[f"{edit} (no edit {1 - changed:.3f})", *(f"k={k}" for k in ks)]]
            for row in self.rows:
                cells = [f"{one.agreement:.3f} / {one.magnitude:.2f}" for one in (row.edit(edit, k) for k in ks)]
                table.append([f"  {row.name}", *cells])
            lines += format_table(table)
        return lines

    def _list_attributes(self) -> list[str]:
        titles = ("values", "always", "best", "union", "probe", "sides", "found", "split", "occluded")
        table = [["F1 of values", *titles]]
        for row in self.rows:
            for one in row.attributes:
                f1 = [f"{v:.3f}" for v in (one.f1_always, one.f1, one.f1_union, one.f1_probe)]
                counts = [str(v) for v in (one.n_found, one.n_split, one.n_occluded)]
                where = f"{row.name}, {one.attribute} at {one.place}"
                table.append([where, str(one.n_values), *f1, f"{one.n_sides:.1f}", *counts])
        return ["", *format_table(table)]


def evaluate_sparse_control(
    task: EditTask,
    train: EditTask,
    dictionaries: Mapping[str, SAE],
    *,
    ks: Sequence[int] = KS,
    supervised: Sequence[Fit] = ("means", "least-squares"),
    allow_mismatch: bool = False,
) -> SparseControlResult:
    """Scores of SAEs at reconstructing, editing and interpreting a task, compared with supervised dictionaries.

    Approximation: `sufficiency` replaces x by x_hat, `necessity` replaces it by `mean + x - x_hat`; both are shares of
    the margin (logit of the answer less that of the alternative), 0 at mean ablation, 1 unmodified. Sparse control: the
    codes of at most k features a position are changed to those of the counterfactual prompt, greedily nearest to its
    activation; the edited model must predict what the patched one does; reconstruction errors are kept.
    Interpretability: F1 of features as classifiers of the attributes' values, single ones and unions, with split and
    occluded values. Source: arXiv:2405.08366.

    Args:
        task: prompts to score on, with their counterfactual versions.
        train: other prompts of the same task, on which supervised dictionaries are fitted and all choices are made.
        dictionaries: SAEs by name.
        ks: most features changed at each position.
        supervised: how the supervised dictionaries, the ceiling, are fitted; see `fit_supervised_dictionary`.
        allow_mismatch: go ahead with SAEs of another model, weight processing or hook point than the task's.

    Raises:
        ValueError: for an SAE of another width, and for one of another model, weight processing or hook point than the
            task's (unless `allow_mismatch`).
    """
    means = torch.stack([x.mean(0) for x in pool_versions(train)[0].unbind(1)])
    for sae in dictionaries.values():
        task.match(sae, allow_mismatch)
    clean, ablated = task.predict(), task.predict(means.expand(len(task), -1, -1))
    margins = float(task.margins(clean).mean()), float(task.margins(ablated).mean())
    patched = {edit: task.predict(task.activations[edit]).argmax(1) for edit in task.edits}
    scorer = _Scorer(task, train, means, margins, clean.argmax(1), patched)
    sources: dict[str, SAE | Fit] = {f"supervised {fit}": fit for fit in supervised}
    return SparseControlResult(
        hook_point=task.hook_point,
        places=task.place_names,
        rows=tuple(scorer.score(name, source, ks) for name, source in (sources | dict(dictionaries)).items()),
        margin=margins[0],
        margin_ablated=margins[1],
        changed=scorer.changed,
        right={
            edit: float((guess == task.predict(version=edit).argmax(1)).float().mean())
            for edit, guess in patched.items()
        },
        n_prompts=len(task),
        n_train=len(train) * len(train.ids),
    )


def pool_versions(task: EditTask) -> tuple[Float[Tensor, "n n_places d_in"], list[Attributes]]:
    """Activations and attributes of all versions of all prompts."""
    x = torch.cat([task.activations[version] for version in task.ids])
    return x, [one for version in task.ids for one in task.attributes[version]]


@dataclass(frozen=True, eq=False)
class _Coded:
    """One dictionary's encoder, decoder rows and offsets at each position."""

    rows: tuple[Float[Tensor, "n_features d_in"], ...]
    offsets: tuple[Float[Tensor, "d_in"], ...]
    encode: Callable[[int, Float[Tensor, "n d_in"], Sequence[Attributes]], Float[Tensor, "n n_features"]]
    """codes at a place, from activations or from attributes"""


@dataclass(frozen=True, eq=False)
class _Scorer:
    """The task and the reference predictions that every dictionary is scored against."""

    task: EditTask
    train: EditTask
    means: Float[Tensor, "n_places d_in"]
    margins: tuple[float, float]
    """of the unmodified model and with mean ablation"""
    clean: Int[Tensor, "n_prompts"]
    """predictions of the unmodified model"""
    patched: dict[str, Int[Tensor, "n_prompts"]]
    """predictions of the patched model, by edit"""

    @cached_property
    def changed(self) -> dict[str, float]:
        """Share of predictions that patching changes."""
        return {edit: float((guess != self.clean).float().mean()) for edit, guess in self.patched.items()}

    def score(self, name: str, source: SAE | Fit, ks: Sequence[int]) -> DictionaryScore:
        """All tests of one dictionary."""
        coded = self._read_sae(source) if isinstance(source, SAE) else self._fit(source)
        codes = self._encode(coded, ORIGINAL)
        x = self.task.activations[ORIGINAL]
        x_hat = torch.stack([o + z @ r for z, r, o in zip(codes, coded.rows, coded.offsets, strict=True)], 1)
        fires = torch.stack([(z != 0) for z in codes])
        return DictionaryScore(
            name=name,
            n_features=len(coded.rows[0]),
            l0=float(fires.float().sum(2).mean()),
            n_live=int(fires.any(0).any(0).sum()),
            sufficiency=self._recover(x_hat),
            necessity=1 - self._recover(self.means + x - x_hat),
            edits=tuple(one for edit in self.task.edits for one in self._edit(coded, codes, edit, ks)),
            attributes=tuple(self._tell(coded)) if isinstance(source, SAE) else (),
        )

    def _read_sae(self, sae: SAE) -> _Coded:
        n, rows = len(self.means), read_rows(sae, self.means)
        offset = sae.decode(torch.zeros(1, sae.cfg.d_sae, device=sae.device))[0].detach().cpu()
        return _Coded((rows,) * n, (offset,) * n, lambda _place, x, _known: encode_rows(sae, x))

    def _fit(self, method: Fit) -> _Coded:
        x, known = pool_versions(self.train)
        fits = [fit_supervised_dictionary(part, known, method) for part in x.unbind(1)]
        rows, means = tuple(fit.rows for fit in fits), tuple(fit.mean for fit in fits)
        return _Coded(rows, means, lambda place, _x, known: fits[place].encode(known))

    def _encode(self, coded: _Coded, version: str) -> list[Float[Tensor, "n_prompts n_features"]]:
        x, known = self.task.activations[version], self.task.attributes[version]
        return [coded.encode(place, part, known) for place, part in enumerate(x.unbind(1))]

    def _recover(self, x: Float[Tensor, "n_prompts n_places d_in"]) -> float:
        """The margin with other activations: 0 as with mean ablation, 1 as in the unmodified model."""
        whole, nothing = self.margins
        return (float(self.task.margins(self.task.predict(x)).mean()) - nothing) / (whole - nothing)

    def _edit(self, coded: _Coded, codes: list[Tensor], edit: str, ks: Sequence[int]) -> Iterator[EditScore]:
        """Edits of one kind, by k."""
        x, goals = self.task.activations[ORIGINAL], self._encode(coded, edit)
        delta = self.task.activations[edit] - x
        places = [
            edit_sparsely(z, goal, rows, part, ks)
            for z, goal, rows, part in zip(codes, goals, coded.rows, delta.unbind(1), strict=True)
        ]
        weights = [weigh_codes(z, rows) for z, rows in zip(codes, coded.rows, strict=True)]
        before, guess = None, self.clean
        for k in ks if self.changed[edit] >= CHANGES else [max(ks)]:
            change = torch.stack([found[k].change for found in places], 1)
            if before is None or not torch.equal(change, before):  # no more features than at the k before
                before, guess = change, self.task.predict(x + change).argmax(1)
            taken = [(found[k].chosen * weight).sum(1) for found, weight in zip(places, weights, strict=True)]
            yield EditScore(
                edit=edit,
                k=k,
                agreement=float((guess == self.patched[edit]).float().mean()),
                magnitude=float(torch.stack(taken).mean()),
                unexplained=float((delta - change).square().sum() / delta.square().sum().clamp(min=1e-12)),
            )

    def _tell(self, coded: _Coded) -> Iterator[AttributeScore]:
        """Interpretability at each position: chosen on the prompts of `train`, scored on those of the task."""
        (x, known), (x_held, known_held) = pool_versions(self.train), pool_versions(self.task)
        is_train = np.arange(len(x) + len(x_held)) < len(x)
        truth = mark_values(known + known_held, self.task.joined)
        both = torch.cat([x, x_held])
        for place, name in enumerate(self.task.place_names):
            z = coded.encode(place, both[:, place], known + known_held)
            yield from score_attributes(z, both[:, place], truth, is_train, name)


def read_rows(sae: SAE, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "d_sae d_in"]:
    """What a code of 1 adds to activations such as x; ValueError unless these are fixed vectors of x's width."""
    if sae.cfg.d_in != x.shape[1] or sae.cfg.d_target != sae.cfg.d_in:
        raise ValueError(f"An SAE must rebuild activations of width {x.shape[1]}, got {sae!r}.")
    if isinstance(sae.output_scale(x.to(sae.device)), Tensor):
        raise ValueError(f"An SAE's features must be the same vectors at every token, got {sae.cfg.normalizer}.")
    return sae.directions().detach().float().cpu()


@torch.no_grad()
def encode_rows(sae: SAE, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """Codes of many activations, float32 on the CPU."""
    return torch.cat([sae.encode(part.to(sae.device)).float().cpu() for part in x.split(ENCODE_ROWS)])
