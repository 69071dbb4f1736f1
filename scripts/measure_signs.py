"""Do signed features use both signs, and are attributes sums of vectors? AbsTopK against TopK, and ideal words.

    python scripts/measure_signs.py

Dictionaries of equal size and k on activations of the model `tales`. For AbsTopK the balance of signs, beside that of
an untrained dictionary; for both the share of features with an antipodal partner, beside that of random directions.
Then the share of the variance between combinations of attributes, in prompts of a name task, that one vector for each
value explains (arXiv:2302.14383), beside that of exchanged combinations.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import saelab as sl
from saelab.collecting import harvest_untrained
from saelab.evaluation import additive_share
from saelab.synthetic.tales import generate_stories
from saelab.synthetic.tasks import name_edits

HOOK = "blocks.2.hook_resid_post"
FIRST_STORY = 70_000_000  # beyond those that the model was trained on


def show_additive(model: sl.lm.Model, hook_point: str, n_prompts: int, seed: int) -> None:
    """Giver, receiver and order of names, read at the last token and where the giver is named."""
    prompts = [version for versions in name_edits(n_prompts, seed) for version in versions.values()]
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    ids = torch.nn.utils.rnn.pad_sequence([prompt.ids.long() for prompt in prompts], batch_first=True)
    acts = sl.lm.capture(model, ids, [hook_point])[hook_point]
    rows = torch.arange(len(prompts))
    places = {"giver": torch.tensor([prompt.giver_at for prompt in prompts]), "end": lengths - 1}
    for place, at in places.items():
        for names in (("receiver", "order"), ("giver", "order"), ("giver", "receiver")):
            attributes = [{name: prompt.attributes[name] for name in names} for prompt in prompts]
            print(
                f"seed {seed}, {place}, {' x '.join(names)}: {additive_share(acts[rows, at], attributes)}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-collected", type=int, default=200_000, help="tokens of text")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="tokens each is trained on")
    parser.add_argument("--n-measured", type=int, default=50_000, help="tokens of other text to measure on")
    parser.add_argument("--n-prompts", type=int, default=400, help="prompts of the name task, in five versions each")
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sl.load_model("tales", progress=False)
    for seed in args.seeds:
        show_additive(model, HOOK, args.n_prompts, seed)
    acts = sl.collect(
        model, generate_stories(args.n_collected // 155, first=FIRST_STORY).tokens(), HOOK, progress=False
    )
    assert isinstance(acts, sl.Activations)
    text = generate_stories(args.n_measured // 155, first=FIRST_STORY + 10_000_000).tokens()
    for seed in args.seeds:
        for activation in (sl.AbsTopK(k=args.k), sl.TopK(k=args.k)):
            cfg = sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=activation)
            run = sl.TrainConfig(n_tokens=args.n_tokens, batch_size=2048, seed=seed)
            sae = sl.SAE(cfg, seed).fit(acts, run, progress=False)
            with tempfile.TemporaryDirectory() as folder:
                store = sl.harvest(sae, model, text, Path(folder) / "store", progress=False)
                other = harvest_untrained(
                    store, sae, model, Path(folder) / "untrained", seed=100 + seed, progress=False
                )
                found = sl.analysis.sign_audit(store, sae, untrained=other, n_shown=3 if seed == 0 else 0)
            print(f"{activation}, seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    main()
