"""Does starting in the active subspace keep latents alive? (arXiv:2508.16929)

    python scripts/subspace_start.py tales blocks.2.hook_attn_out
    python scripts/subspace_start.py PATH/TO/stories260k blocks.2.hook_attn_out --text PATH/TO/tinystories.txt
    python scripts/subspace_start.py --planted 0.1 0.25 0.5 --widths 64 256 512 --n-tokens 200000
    python scripts/subspace_start.py tales --spectrum

Wide TopK dictionaries (d_sae = 64 d_in) on a layer's attention output, started from random directions and from random
directions in the subspace that the activations fill, with and without AuxK. Prints the share of latents that never fire
on held-out text, and the fraction of variance unexplained, by seed. With `--planted` the activations are those of a
planted world that fills a share of the dimensions, and with `--spectrum` nothing is trained: how many directions each
layer's attention output, MLP output and residual stream fill, and how many of them the model needs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import saelab as sl
from saelab.functional.metrics import ReconstructionSums, effective_rank
from saelab.lm.model_checks import Model
from saelab.synthetic.planted import PlantedConfig, PlantedWorld
from saelab.synthetic.tales import generate_stories


def read_tokens(model: Model, text: Path | None, n_tokens: int) -> sl.Tokens:
    """Packed text, or stories where none is given."""
    if text is not None:
        return sl.tokenize(model, text, ctx_len=128, n_tokens=n_tokens)
    stories = generate_stories(n_tokens // 150, first=50_000_000)
    return sl.tokenize(model, [stories.text(i) for i in range(len(stories))], ctx_len=128, n_tokens=n_tokens)


@torch.no_grad()
def measure(sae: sl.SAE, x: torch.Tensor) -> tuple[float, float]:
    """Share of latents that never fire, and FVU."""
    fired, sums = torch.zeros(sae.cfg.d_sae, dtype=torch.bool), ReconstructionSums(sae.cfg.d_in)
    for part in x.split(8192):
        codes = sae.encode_sparse(part)
        fired[codes.indices] = True
        sums.add(part, sae.decode(codes))
    return float((~fired).float().mean()), sums.fvu


def plant(share: float, d_in: int, n_features: int, n_tokens: int, seed: int) -> torch.Tensor:
    """Activations that fill a share of their dimensions, with a hundredth of their size as noise in all of them."""
    rank = max(1, round(share * d_in))
    world = PlantedWorld(PlantedConfig(n_features=n_features, d_in=rank, l0=min(8.0, rank / 2), n_roots=0), seed)
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q[:, :rank]
    x = world.sample(n_tokens, seed)[0] @ axes.T
    return x + 0.01 * x.std() * torch.randn(x.shape, generator=generator)


def compare_starts(
    name: str, seen: sl.Activations | torch.Tensor, held_out: torch.Tensor, width: int, args: argparse.Namespace
) -> None:
    """Print dead latents and FVU of every start."""
    d_in = held_out.shape[1]
    rank = effective_rank(torch.linalg.svdvals(held_out[:20_000] - held_out[:20_000].mean(0)))
    print(f"{name}: d_in {d_in}, d_sae {width} d_in, effective rank {rank:.1f}; {len(held_out):,} tokens held out")
    plain = sl.SAEConfig(d_in=d_in, d_sae=width * d_in, activation=sl.TopK(k=args.k))
    for objective in (plain.objective if auxk else plain.objective[:1] for auxk in args.auxk):
        for init in ("tied", "subspace"):
            cfg = replace(plain, objective=objective, init=init)  # type: ignore[arg-type]
            for seed in args.seeds:
                budget = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=args.batch_size, seed=seed)
                dead, fvu = measure(sl.SAE(cfg, seed).fit(seen, budget, progress=False), held_out)
                print(
                    f"AuxK {len(objective) > 1!s:<5}  init {init:<8}  seed {seed}  dead {dead:.3f}  FVU {fvu:.4f}",
                    flush=True,
                )


def print_spectra(model: Model, text: Path | None, n_tokens: int) -> None:
    """One line for each place: what fills it, and how many components recover 90 % and 99 % of the loss."""
    tokens = read_tokens(model, text, n_tokens)
    half = len(tokens) // 2
    columns = ("99 %", "eff. rank", "90 % loss", "99 % loss", "clean", "zeros", "mean")
    print(f"shares of d_in {model.cfg.d_model}; {n_tokens // 2:,} tokens, loss on as many others")
    print(f"{'':<26}" + "".join(f"{name:>10}" for name in columns))
    for layer in range(model.cfg.n_layers):
        for place in ("hook_attn_out", "hook_mlp_out", "hook_resid_post"):
            hook_point = f"blocks.{layer}.{place}"
            acts = sl.collect(model, tokens[:half], hook_point, progress=False)
            ranks = (0, *range(4, acts.d_in, max(4, acts.d_in // 16)), acts.d_in)
            found = sl.evaluation.spectrum(acts, model, tokens[half:], ranks=ranks)
            needed = [found.rank_for(share) for share in (0.9, 0.99)]
            shares = [found.components_frac, found.effective_rank_frac]
            shares += [float("nan") if rank is None else rank / acts.d_in for rank in needed]
            losses = (found.ce_clean, found.ce_zero, found.rows[0].ce)
            print(f"{hook_point:<26}" + "".join(f"{number:>10.3f}" for number in (*shares, *losses)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("hook_point", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--spectrum", action="store_true", help="spectra of all layers of the model")
    parser.add_argument("--planted", type=float, nargs="+", help="shares of the dimensions that planted worlds fill")
    parser.add_argument("--d-in", type=int, default=32, help="of planted worlds")
    parser.add_argument(
        "--n-features", type=int, default=2048, help="of planted worlds: fewer leave latents nothing to do"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64], help="d_sae as multiples of d_in")
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--n-held-out", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--auxk", type=int, nargs="+", choices=(0, 1), default=[0, 1], help="without it, with it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for share in args.planted or ():
        x = plant(share, args.d_in, args.n_features, args.n_tokens + args.n_held_out, seed=0)
        for width in args.widths:
            compare_starts(f"planted {share:g}", x[: args.n_tokens], x[args.n_tokens :], width, args)
    if args.model is None:
        return
    model = sl.load_model(args.model)
    if args.spectrum:
        print_spectra(model, args.text, args.n_tokens)
        return
    n_tokens = args.n_tokens + args.n_held_out
    acts = sl.collect(model, read_tokens(model, args.text, n_tokens), args.hook_point)
    assert isinstance(acts, sl.Activations)
    seen, held_out = acts.rows(0, len(acts) - args.n_held_out), acts[len(acts) - args.n_held_out :]
    for width in args.widths:
        compare_starts(args.hook_point, seen, held_out, width, args)


if __name__ == "__main__":
    main()
