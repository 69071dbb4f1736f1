"""The same full training step in saelab and in other libraries, each by its own trainer and defaults.

A builder takes an activation and the sizes and returns a `Subject`. Nothing heavy is imported until one is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, pairwise
from typing import Any

N_STEPS = 1_000_000
"""Length of the run each trainer believes it is in: long enough for constant schedules."""


@dataclass(frozen=True)
class Sizes:
    """What every library is given alike."""

    n: int
    d_in: int
    d_sae: int
    k: int

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Five Matryoshka prefixes, each twice the one before."""
        return tuple(self.d_sae // 2**i for i in (4, 3, 2, 1, 0))


@dataclass(frozen=True)
class Subject:
    """A training step ready to be timed, and for saelab the encoder's product alone."""

    step: Callable[[Tensor], object]
    product: Callable[[Tensor], object] | None = None


@dataclass(frozen=True)
class Library:
    """How to get a library, what it can train, how to build it."""

    module: str
    package: str
    activations: tuple[str, ...]
    build: Callable[[str, Sizes], Subject]

    @property
    def installed(self) -> bool:
        return find_spec(self.module) is not None


def saelab(activation: str, sizes: Sizes, **options: Any) -> Subject:
    """saelab: one step of its training loop, the finiteness check on the batch included; options are of `TrainConfig`.

    Activations with a sparsity penalty start with most latents active and reach their target L0 in the course of a run;
    here they are at it from the first step, as they are in most of a run, with codes of the size that reconstructs best
    then. "jumprelu-small" leaves codes as small as they are where most latents fire: more than ten times as many
    pre-activations are then within the bandwidth of a threshold as fire.
    """
    from saelab.sae.activation_functions import make_activation
    from saelab.sae.config import SAEConfig
    from saelab.sae.sae import SAE
    from saelab.sae.training_sae import TrainingSAE
    from saelab.stores.activations import Activations
    from saelab.training.config import TrainConfig
    from saelab.training.loop import TrainingRun

    matryoshka = activation == "matryoshka"
    name, _, small = activation.partition("-")
    settings = {"target_l0": float(sizes.k)} if name in ("relu", "jumprelu") else {"k": sizes.k}
    chosen = make_activation("batchtopk" if matryoshka else name, **settings)
    prefixes = sizes.prefixes if matryoshka else None
    sae = SAE(SAEConfig(d_in=sizes.d_in, d_sae=sizes.d_sae, activation=chosen, prefixes=prefixes))
    cfg = TrainConfig(n_tokens=N_STEPS * sizes.n, batch_size=sizes.n, **options)
    trainee = TrainingSAE(sae, cfg)
    run: TrainingRun | None = None

    def step(x: Tensor) -> None:
        nonlocal run
        if run is None:
            trainee.prepare(x)
            if name in ("relu", "jumprelu"):
                reach_target(sae, x, sizes.k, scaled=not small)
            run = TrainingRun([trainee], Activations.from_tensor(x).batches(len(x)), cfg, None, None)
        run.check_finite(x)
        run.train_on(x)

    return Subject(step, product=saelab_product(sae))


def reach_target(sae: Any, x: Tensor, k: int, scaled: bool) -> None:
    """Have k latents fire on a token of x on average, by the thresholds of JumpReLU or the biases of ReLU; and scale
    their codes to the least squared error.
    """
    import torch

    with torch.no_grad():
        centered = sae.center(sae.normalizer.normalize(x[:256]))
        u = centered @ sae.W_enc + sae.b_enc
        floor = u.flatten().topk(k * len(u)).values[-1]
        if sae.threshold is None:
            sae.b_enc.sub_(floor)
            z = (u - floor).relu()
        else:
            sae.threshold.fill_(floor)
            z = u * (u > floor)
        y_hat = z @ sae.W_dec
        scale = (centered * y_hat).sum() / y_hat.square().sum() if scaled else 1.0
        for weight in (sae.W_enc, sae.b_enc, sae.threshold):
            if weight is not None:
                weight.mul_(scale)


def saelab_product(sae: Any) -> Callable[[Tensor], object]:
    """The encoder's product alone, in the precision that saelab screens in."""
    import torch

    from saelab.functional.screening import SCAN_ROWS, Screen, choose_precision, quantize_rows

    precision = choose_precision(sae.cfg.d_in, sae.cfg.d_sae, sae.device)
    screen = Screen(sae.W_enc.detach().T, sae.b_enc.detach(), precision, signed=False)
    dtype = torch.int32 if precision == "int8" else screen.W.dtype
    out = torch.empty(SCAN_ROWS, sae.cfg.d_sae, dtype=dtype)

    def product(x: Tensor) -> None:
        low = quantize_rows(x, x.new_ones(len(x), 1))[0] if precision == "int8" else x
        for part in low.split(SCAN_ROWS):
            screen.multiply(part, out[: len(part)])

    return product


def saelens(activation: str, sizes: Sizes, **options: Any) -> Subject:
    """SAELens: one call of `SAETrainer.step`, clipping and Adam included."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    kind = {
        "topk": "TopK",
        "abstopk": "AbsTopK",
        "batchtopk": "BatchTopK",
        "matryoshka": "MatryoshkaBatchTopK",
        "relu": "Standard",
        "jumprelu": "JumpReLU",
    }[activation]
    if "topk" in activation or activation == "matryoshka":
        options["k"] = sizes.k
    if activation == "matryoshka":
        options["matryoshka_widths"] = list(sizes.prefixes)
    cfg = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=sizes.d_in, d_sae=sizes.d_sae, **options)
    run = SAETrainerConfig(total_training_samples=N_STEPS * sizes.n, train_batch_size_samples=sizes.n, lr_end=3e-5)
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(cfg)
    trainer = sae_lens.SAETrainer(run, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return Subject(step)


def saelens_sparse(activation: str, sizes: Sizes) -> Subject:
    """SAELens with its optional COO codes: not its default, and for TopK its backward pass does not run on a CPU."""
    return saelens(activation, sizes, use_sparse_activations=True)


def dictionary_learning(activation: str, sizes: Sizes) -> Subject:
    """dictionary_learning: one call of `trainer.update`, as `trainSAE` makes for every batch."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    # The threshold is updated from the first step on, as it is for most of a real run.
    top = {"k": sizes.k, "threshold_start_step": 0}
    fractions = [(b - a) / sizes.d_sae for a, b in pairwise((0, *sizes.prefixes))]
    kind, options = {
        "topk": (trainers.TopKTrainer, top),
        "batchtopk": (trainers.BatchTopKTrainer, top),
        "matryoshka": (MatryoshkaBatchTopKTrainer, {**top, "group_fractions": fractions}),
        "relu": (trainers.StandardTrainer, {}),
        "jumprelu": (trainers.JumpReluTrainer, {"target_l0": float(sizes.k)}),
    }[activation]
    shared = {"steps": N_STEPS, "activation_dim": sizes.d_in, "dict_size": sizes.d_sae, "layer": 0, "lm_name": "none"}
    trainer = kind(**shared, device="cpu", **options)
    steps = count()
    return Subject(lambda x: trainer.update(next(steps), x))


def sparsify(activation: str, sizes: Sizes, optimizer: str = "signum") -> Subject:
    """sparsify: the body of `Trainer.fit` for one batch of activations (its Trainer wants a whole model)."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    assert activation == "topk"
    torch.set_float32_matmul_precision("high")  # as `Trainer.fit` does
    sae = SparseCoder(sizes.d_in, SparseCoderConfig(num_latents=sizes.d_sae, k=sizes.k), dtype=torch.float32)
    opt = sparsify_optimizer(sae, optimizer)
    since_fired = torch.zeros(sizes.d_sae, dtype=torch.long)
    did_fire = torch.zeros(sizes.d_sae, dtype=torch.bool)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=None, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()
        since_fired.add_(len(x))[did_fire] = 0
        did_fire.zero_()

    return Subject(step)


def sparsify_optimizer(sae: Any, name: str) -> Any:
    """The optimizer and rate that sparsify's Trainer makes for `name`."""
    import torch
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    width = (sae.num_latents / 2**14) ** 0.5
    if name == "adam":
        return torch.optim.Adam(sae.parameters(), lr=2e-4 / width)
    opt = ScheduleFreeWrapper(SignSGD([{"params": list(sae.parameters()), "lr": 5e-3 / width}]), momentum=0.95)
    opt.train()
    return opt


def sparsify_adam(activation: str, sizes: Sizes) -> Subject:
    """sparsify with Adam, the optimizer all the others use."""
    return sparsify(activation, sizes, optimizer="adam")


TOPKS = ("topk", "abstopk", "batchtopk", "matryoshka")
SAELAB = Library("saelab.sae", "saelab", (*TOPKS, "relu", "jumprelu"), saelab)
PEERS = {
    "SAELens": Library("sae_lens", "sae-lens", (*TOPKS, "relu", "jumprelu"), saelens),
    "SAELens (sparse)": Library("sae_lens", "sae-lens", ("abstopk",), saelens_sparse),
    "sparsify": Library("sparsify", "eai-sparsify", ("topk",), sparsify),
    "sparsify (Adam)": Library("sparsify", "eai-sparsify", ("topk",), sparsify_adam),
    "dictionary_learning": Library(
        "dictionary_learning",
        "dictionary-learning",
        ("topk", "batchtopk", "matryoshka", "relu", "jumprelu"),
        dictionary_learning,
    ),
}
