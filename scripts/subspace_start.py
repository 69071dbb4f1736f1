"""Does starting in the active subspace keep latents alive? (arXiv:2508.16929)

    python scripts/subspace_start.py tales blocks.2.hook_attn_out
    python scripts/subspace_start.py PATH/TO/stories260k blocks.2.hook_attn_out --text PATH/TO/tinystories.txt

Wide TopK dictionaries (d_sae = 64 d_in) on a layer's attention output, started from random directions and from random
directions in the subspace that the activations fill, with and without AuxK. Prints the share of latents that never fire
on held-out text, and the fraction of variance unexplained, by seed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import saelab as sl
from saelab.functional.metrics import ReconstructionSums, effective_rank
from saelab.lm.model_checks import Model
from saelab.synthetic.tales import generate_stories

N_HELD_OUT = 100_000


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("hook_point")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    model = sl.load_model(args.model)
    acts = sl.collect(model, read_tokens(model, args.text, args.n_tokens + N_HELD_OUT), args.hook_point)
    seen, held_out = acts.rows(0, len(acts) - N_HELD_OUT), acts[len(acts) - N_HELD_OUT :]
    spectrum = torch.linalg.svdvals(held_out[:20_000] - held_out[:20_000].mean(0))
    print(f"d_in {acts.d_in}, effective rank {effective_rank(spectrum):.1f}; {N_HELD_OUT:,} tokens held out")
    plain = sl.SAEConfig(d_in=acts.d_in, d_sae=64 * acts.d_in, activation=sl.TopK(k=args.k))
    for objective in (plain.objective[:1], plain.objective):
        for init in ("tied", "subspace"):
            cfg = replace(plain, objective=objective, init=init)  # type: ignore[arg-type]
            for seed in args.seeds:
                budget = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=4096, seed=seed)
                dead, fvu = measure(sl.SAE(cfg, seed).fit(seen, budget), held_out)
                print(
                    f"AuxK {len(objective) > 1!s:<5}  init {init:<8}  seed {seed}  dead {dead:.3f}  FVU {fvu:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
