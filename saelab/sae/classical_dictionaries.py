"""`fit_dictionary`: dictionaries by methods older than SAEs, as SAEs: ICA, K-SVD, k-means, NMF and others."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.metrics import exact
from saelab.functional.pursuit import pursue_least_squares
from saelab.sae.activation_functions import AbsTopK, TopK
from saelab.sae.archetypal import find_points
from saelab.sae.config import SAEConfig
from saelab.sae.encoders import OrthogonalMatchingPursuit, PursuitEncoder
from saelab.sae.fitting import require_varied
from saelab.sae.normalizer import NormalizerKind
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations

DictionaryMethod = Literal[
    "ica", "l3", "l4", "orthogonal", "pca", "kmeans", "ksvd", "stacked", "nmf", "snmf", "cnmf", "random"
]
N_TOKENS = 16_384
MAX_STEPS = 500
NEAR = 1e-6  # mean 1 - cosine of the rows with those of the step before, at which a fixed point is reached
SETTLED = 5e-4  # relative fall of the squared error in a step, at which a factorization has converged
KSVD_ROUNDS = 20
FACTOR_STEPS = 100
BATCH = 256
N_BATCHES = 2_000
POINTS_PER_ROW = 4  # activations that a convex factorization combines, for each row of the dictionary
ALIKE = 0.99  # |cosine| of two rows of which K-SVD replaces one


class _Atoms(NamedTuple):
    """A dictionary in the normalizer's units, its rows of any length."""

    rows: Float[Tensor, "d_sae d_in"]
    n_steps: int | None = None
    converged: bool | None = None
    """None for a closed form, or a fixed number of steps"""


@dataclass(frozen=True)
class _Method:
    """How a method's dictionary is found, and what it needs around it."""

    find: Callable[[Float[Tensor, "n d_in"], int, int, int], _Atoms]
    """of normalized activations, d_sae, k and seed"""
    normalizer: NormalizerKind = "scale"
    signed: bool = False
    orthogonal: bool = False
    """whether rows are orthogonal in the normalizer's units: then there are at most d_in, and products with them are
    the least-squares codes"""


def fit_dictionary(
    acts: Activations | Float[Tensor, "n_tokens d_in"],
    method: DictionaryMethod = "ica",
    *,
    d_sae: int | None = None,
    k: int = 8,
    encoder: Literal["linear"] | PursuitEncoder | None = None,
    n_tokens: int = N_TOKENS,
    seed: int = 0,
) -> SAE:
    """An SAE whose dictionary was found by a classical method, and is frozen: a baseline for trained ones.

    Orthogonal rows, at most d_in, with signed codes (`AbsTopK`):

        ica         FastICA on whitened activations (scikit-learn)
        l3, l4      orthogonal Q with the largest sum of |Q x|^p over whitened activations x, by the fixed point
                    Q <- polar(sum of sign(Q x) |Q x|^(p-1) x^T) (arXiv:1906.02435, arXiv:2002.10043)
        orthogonal  the same for p = 3 on one batch at a time: Q <- Q + t^(-3/4) (polar(gradient) - Q), Frank-Wolfe
                    steps in the spectral ball (arXiv:2103.01484)
        pca         the principal components of largest variance

    Any number of rows, signed codes:

        ksvd        K-SVD: codes by orthogonal matching pursuit, then each row and its codes by one power step
        stacked     K-SVD of 2 d_sae rows and 2 k codes, then K-SVD of these codes; the rows are the products of both
        random      random directions

    Any number of rows, codes >= 0 (`TopK`):

        kmeans      centroids of k-means (scikit-learn)
        nmf         non-negative matrix factorization, of activations >= 0 (scikit-learn)
        snmf        semi-NMF, x ~ z W with z >= 0, by multiplicative updates (Ding, Li and Jordan, 2010)
        cnmf        convex NMF: the same, each row of W a combination of activations with weights >= 0; of 4 d_sae
                    activations drawn at random

    Rows are of unit norm in the normalizer's units: "whiten" for ica, l3, l4 and orthogonal, "none" for nmf, else
    "scale". `training_` has method, seed, tokens, number of steps and whether they converged (None where there is
    nothing to converge). On a CPU the same seed and number of threads give the same bits.

    Args:
        acts: (n_tokens, d_in) activations.
        method: one of the names above.
        d_sae: number of rows; None is d_in.
        k: codes per token.
        encoder: "linear" (products with the rows), or a pursuit; None is "linear" for orthogonal rows, and orthogonal
            matching pursuit otherwise.
        n_tokens: tokens that the dictionary is fitted to, drawn at random. Memory is a few times that of these rows and
            their dense codes, n_tokens (d_in + d_sae) numbers; "stacked" has codes of 2 d_sae.
        seed: of the sample and the initial rows.

    Raises:
        ValueError: for an unknown method, a number out of range, more rows than an orthogonal dictionary can have,
            activations that are not finite or all equal, and negative ones for nmf.

    >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) ** 3
    >>> fit_dictionary(x, "l3", k=2)
    SAE(AbsTopK(k=2), d_in=8, d_sae=8)
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {list(get_args(DictionaryMethod))}, got '{method}'.")
    if n_tokens < 2:
        raise ValueError(f"`n_tokens` must be at least 2, got {n_tokens}.")
    acts = Activations.from_tensor(acts) if isinstance(acts, Tensor) else acts
    how, width = METHODS[method], acts.d_in if d_sae is None else d_sae
    if how.orthogonal and width > acts.d_in:
        raise ValueError(f"`d_sae` of '{method}' must be at most d_in ({acts.d_in}), got {width}; take 'ksvd'.")
    sae = _make(how, acts.d_in, width, k, encoder, seed)
    x = draw_tokens(acts, n_tokens, seed)
    if method != "random":
        require_varied(x)
    if method == "nmf" and bool((x < 0).any()):
        raise ValueError("`acts` must be at least 0 for 'nmf', got negative ones; take 'snmf', or codes.")
    sae.normalizer.fit(x)
    found = how.find(sae.normalizer.normalize(x), width, k, seed)
    with torch.no_grad():
        sae.W_dec.copy_(_normalize(found.rows))
        if sae.cfg.encoder == "linear":
            sae.W_enc.copy_(sae.W_dec.T)
    if found.converged is False:
        warnings.warn(
            f"'{method}' must converge, got no fixed point in {found.n_steps} steps on {len(x):,} tokens; give more "
            "tokens, or keep it as it is.",
            stacklevel=2,
        )
    record = {"method": method, "n_tokens_seen": len(x), "seed": seed, "n_steps": found.n_steps}
    sae.training_ = {**record, "converged": found.converged}
    sae.provenance = acts.provenance
    return sae


def _make(how: _Method, d_in: int, d_sae: int, k: int, encoder: str | PursuitEncoder | None, seed: int) -> SAE:
    if encoder is None:
        encoder = "linear" if how.orthogonal else OrthogonalMatchingPursuit()
    cfg = SAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        activation=AbsTopK(k=k) if how.signed else TopK(k=k),
        dictionary="frozen",
        normalizer=how.normalizer,
        encoder=encoder,  # type: ignore[arg-type]  # SAEConfig checks names
        train_encoder=encoder != "linear",
    )
    return SAE(cfg, seed)


def draw_tokens(acts: Activations, n_tokens: int, seed: int) -> Float[Tensor, "n d_in"]:
    """Activations of at most `n_tokens` tokens drawn at random, in their order; ValueError unless they are finite."""
    if len(acts) < 2:
        raise ValueError(f"`acts` must hold at least 2 tokens, got {len(acts)}.")
    chosen = torch.randperm(len(acts), generator=_generator(seed))[:n_tokens].sort().values
    x = acts[chosen].float().cpu()
    if not bool(x.isfinite().all()):
        raise ValueError("`acts` must be finite, got NaN or infinity; check where they come from.")
    return x


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def _normalize(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _polar(x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    """The matrix with orthonormal rows that is nearest to `x`."""
    u, _, v = torch.linalg.svd(exact(x), full_matrices=False)
    return (u @ v).to(x)


def _draw_orthogonal(m: int, d: int, seed: int) -> Float[Tensor, "m d"]:
    return _polar(torch.randn(m, d, generator=_generator(seed)))


def _gradient(Q: Float[Tensor, "m d"], x: Float[Tensor, "n d"], p: int) -> Float[Tensor, "m d"]:
    """Of the sum of |Q x|^p, over p."""
    y = x @ Q.T
    return (y * y.abs() ** (p - 2)).T @ x


def maximize_lp(x: Float[Tensor, "n d_in"], m: int, p: int, seed: int) -> _Atoms:
    """Orthonormal rows with the largest sum of |x Q^T|^p, by `Q <- polar(gradient)` from random ones.

    Args:
        x: whitened activations.
        m: number of rows, at most d_in.
        p: the power, 3 or 4.
        seed: of the initial rows.
    """
    Q = _draw_orthogonal(m, x.shape[1], seed)
    for step in range(1, MAX_STEPS + 1):
        before, Q = Q, _polar(_gradient(Q, x, p))
        if float(1 - (Q * before).sum(1).mean()) < NEAR:
            return _Atoms(Q, step, True)
    return _Atoms(Q, MAX_STEPS, False)


def _follow(x: Tensor, m: int, _k: int, seed: int) -> _Atoms:
    """Frank-Wolfe steps in the spectral ball, a batch at a time."""
    Q, generator, t = _draw_orthogonal(m, x.shape[1], seed), _generator(seed), 0
    while t < N_BATCHES:
        for rows in torch.randperm(len(x), generator=generator).split(BATCH)[: N_BATCHES - t]:
            t += 1
            Q = Q + (_polar(_gradient(Q, x[rows], 3)) - Q) / t**0.75
    return _Atoms(_polar(Q), t)


def _find_independent(x: Tensor, m: int, _k: int, seed: int) -> _Atoms:
    """FastICA's components, those furthest from Gaussian first where there are fewer rows than dimensions."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    variances, axes = torch.linalg.eigh(exact(x).T @ exact(x))
    inside = variances > 1e-6 * variances[-1]  # components of directions that activations do not have are arbitrary
    ica = FastICA(whiten=False, max_iter=MAX_STEPS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said by `fit_dictionary`
        basis = torch.eye(len(axes), dtype=axes.dtype) if bool(inside.all()) else axes[:, inside]
        ica.fit((exact(x) @ basis).numpy())
    rows = torch.from_numpy(ica.components_) @ basis.T
    excess = ((exact(x) @ rows.T) ** 4).mean(0) - 3
    rows = torch.cat([rows[excess.abs().argsort(descending=True, stable=True)], axes[:, ~inside].T])
    return _Atoms(rows[:m].float(), ica.n_iter_, ica.n_iter_ < MAX_STEPS)


def _find_components(x: Tensor, m: int, _k: int, _seed: int) -> _Atoms:
    return _Atoms(torch.linalg.eigh(exact(x).T @ exact(x)).eigenvectors.flip(1)[:, :m].T.float())


def _find_centroids(x: Tensor, m: int, _k: int, seed: int) -> _Atoms:
    return _Atoms(find_points(x, m, seed))


def _draw_directions(x: Tensor, m: int, _k: int, seed: int) -> _Atoms:
    return _Atoms(torch.randn(m, x.shape[1], generator=_generator(seed)))


def _find_ksvd(x: Tensor, m: int, k: int, seed: int) -> _Atoms:
    """K-SVD from rows of `x`, with the approximate updates of Rubinstein, Zibulevsky and Elad (2008)."""
    W = _normalize(x[torch.randint(len(x), (m,), generator=_generator(seed))])
    for number in range(KSVD_ROUNDS):
        z = pursue_least_squares(x, W, k, signed=True).to_dense()
        residual = x - z @ W
        for i in range(m):
            tokens = z[:, i].nonzero()[:, 0]
            if len(tokens) == 0:
                continue
            own = residual[tokens] + z[tokens, i, None] * W[i]
            W[i] = _normalize((z[tokens, i] @ own)[None])[0]
            z[tokens, i] = own @ W[i]
            residual[tokens] = own - z[tokens, i, None] * W[i]
        if number < KSVD_ROUNDS - 1:
            _replace_useless(W, (z != 0).sum(0), residual)
    return _Atoms(W, KSVD_ROUNDS)


def _replace_useless(W: Tensor, fires: Tensor, residual: Tensor) -> None:
    """Put the worst residuals in the place of rows that no token uses, and of those that another is like, in place."""
    twins = ((W @ W.T).abs().tril(-1) > ALIKE).any(1)
    useless = (twins | (fires == 0)).nonzero()[:, 0][: len(residual)]
    worst = residual.norm(dim=1).argsort(descending=True, stable=True)[: len(useless)]
    rows = residual[worst]
    kept = rows.norm(dim=1) > 1e-6
    W[useless[kept]] = _normalize(rows[kept])


def _find_stacked(x: Tensor, m: int, k: int, seed: int) -> _Atoms:
    """Rows made of the rows of a wider dictionary, by a dictionary of its codes (arXiv:1602.00203)."""
    first = _find_ksvd(x, 2 * m, min(2 * k, 2 * m), seed).rows
    codes = pursue_least_squares(x, first, min(2 * k, 2 * m), signed=True).to_dense()
    return _Atoms(_find_ksvd(codes, m, k, seed).rows @ first, 2 * KSVD_ROUNDS)


def _factor_nonnegative(x: Tensor, m: int, _k: int, seed: int) -> _Atoms:
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    nmf = NMF(m, init="random", max_iter=FACTOR_STEPS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said by `fit_dictionary`
        rows = torch.from_numpy(nmf.fit(x.numpy()).components_).float()
    return _Atoms(rows, nmf.n_iter_, nmf.n_iter_ < FACTOR_STEPS)


def _mark_clusters(x: Tensor, m: int, seed: int) -> Float[Tensor, "n m"]:
    """Where factorizations start: 1 for the nearest of m centroids, plus .2."""
    nearest = torch.cdist(x, find_points(x, m, seed)).argmin(1)
    return torch.nn.functional.one_hot(nearest, m).to(x) + 0.2


def _multiply(
    factor: Tensor, product: Tensor, fitted: Callable[[Tensor], Tensor], gram: Float[Tensor, "p p"]
) -> Tensor:
    """Multiplicative update of a factor >= 0 towards `fitted(gram) = product`; `fitted` is linear."""
    up = product.clamp(min=0) + fitted((-gram).clamp(min=0))
    down = (-product).clamp(min=0) + fitted(gram.clamp(min=0))
    least = 1e-9 * (up.mean() + down.mean())  # where both are 0 the factor stays
    return factor * ((up + least) / (down + least)).sqrt()


def _factor_semi(x: Tensor, m: int, _k: int, seed: int) -> _Atoms:
    """Semi-NMF: codes >= 0, rows by least squares."""
    z = _mark_clusters(x, m, seed)

    def update() -> tuple[Tensor, Tensor]:
        nonlocal z
        W = _solve_rows(z, x)
        z = _multiply(z, x @ W.T, lambda gram: z @ gram, W @ W.T)
        return z, W

    return _repeat(x, update)


def _factor_convex(x: Tensor, m: int, _k: int, seed: int) -> _Atoms:
    """Convex NMF: codes >= 0, rows `weights points` with weights >= 0."""
    points = x[torch.randperm(len(x), generator=_generator(seed))[: max(POINTS_PER_ROW * m, 2)]]
    z = _mark_clusters(x, m, seed)
    weights = _mark_clusters(points, m, seed).T
    weights = weights / weights.sum(1, keepdim=True)
    between = points @ points.T

    def update() -> tuple[Tensor, Tensor]:
        nonlocal z, weights
        overlap = z.T @ z
        weights = _multiply(weights, (z.T @ x) @ points.T, lambda gram: overlap @ weights @ gram, between)
        W = weights @ points
        z = _multiply(z, x @ W.T, lambda gram: z @ gram, W @ W.T)
        return z, W

    return _repeat(x, update)


def _solve_rows(z: Tensor, x: Tensor) -> Float[Tensor, "m d_in"]:
    """The rows W with the least squared error of `z W`."""
    moments = exact(z).T @ exact(z)
    moments.diagonal().add_(1e-8 * moments.diagonal().mean())
    return torch.linalg.solve(moments, exact(z.T @ x)).float()


def _repeat(x: Tensor, update: Callable[[], tuple[Tensor, Tensor]]) -> _Atoms:
    """Repeat an update of codes and rows until the squared error falls no more."""
    before = float("inf")
    for step in range(1, FACTOR_STEPS + 1):
        z, W = update()
        error = float((x - z @ W).square().sum())
        if before - error <= SETTLED * error:
            return _Atoms(W, step, True)
        before = error
    return _Atoms(W, FACTOR_STEPS, False)


METHODS: dict[str, _Method] = {
    "ica": _Method(_find_independent, "whiten", signed=True, orthogonal=True),
    "l3": _Method(lambda x, m, _k, seed: maximize_lp(x, m, 3, seed), "whiten", signed=True, orthogonal=True),
    "l4": _Method(lambda x, m, _k, seed: maximize_lp(x, m, 4, seed), "whiten", signed=True, orthogonal=True),
    "orthogonal": _Method(_follow, "whiten", signed=True, orthogonal=True),
    "pca": _Method(_find_components, signed=True, orthogonal=True),
    "kmeans": _Method(_find_centroids),
    "ksvd": _Method(_find_ksvd, signed=True),
    "stacked": _Method(_find_stacked, signed=True),
    "nmf": _Method(_factor_nonnegative, "none"),
    "snmf": _Method(_factor_semi),
    "cnmf": _Method(_factor_convex),
    "random": _Method(_draw_directions, signed=True),
}
