"""From a model and a text to a report of features, in one go: an SAE is trained, a store harvested, a page written.

    python scripts/make_report.py --out runs/report
    python scripts/make_report.py --model PATH/TO/stories260k --text PATH/TO/tinystories.txt --out runs/report

Without a text it takes saelab's own stories and their model. What exists already in the folder is used again, so that
an interrupted run goes on where it stopped. Prints the evaluation and where the report is.
"""

import argparse
from pathlib import Path

import saelab as sl
from saelab.lm.model_checks import Model
from saelab.synthetic.tales import generate_stories

N_EVALUATED = 20_000


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tales")
    parser.add_argument("--text", type=Path, help="default: saelab's own stories")
    parser.add_argument("--hook-point", help="default: the residual stream after half of the layers")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--n-train", type=int, default=1_000_000, help="tokens to train on")
    parser.add_argument("--n-store", type=int, default=300_000, help="tokens of the store, from the text's start")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    return parser.parse_args()


def read_tokens(model: Model, text: Path | None, n_tokens: int, seed: int) -> sl.Tokens:
    """Packed rows of the text, or of stories."""
    if text is not None:
        return sl.tokenize(model, text, ctx_len=128, n_tokens=n_tokens)
    stories = generate_stories(n_tokens // 120, first=70_000_000 + 1_000_000 * seed)
    return sl.tokenize(model, [stories.text(i) for i in range(len(stories))], ctx_len=128, n_tokens=n_tokens)


def train(args: argparse.Namespace, model: Model, tokens: sl.Tokens, hook_point: str) -> sl.SAE:
    """The SAE of an earlier run, or a new one."""
    folder = args.out / "sae"
    if (folder / "model.safetensors").is_file():
        return sl.SAE.from_pretrained(folder)
    acts = sl.collect(model, tokens, hook_point, args.out / "acts")
    assert isinstance(acts, sl.Activations)
    sae = sl.SAE(sl.SAEConfig(d_in=acts.d_in, d_sae=args.d_sae, activation=sl.AbsTopK(k=args.k)), seed=args.seed)
    sae.fit(acts, sl.TrainConfig(n_tokens=args.n_train, seed=args.seed), out=folder, resume=folder.is_dir())
    sae.save_pretrained(folder)
    return sl.SAE.from_pretrained(folder)


def main() -> None:
    args = parse()
    model = sl.load_model(args.model)
    hook_point = args.hook_point or f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    tokens = read_tokens(model, args.text, args.n_train + N_EVALUATED, args.seed)
    held_out = max(1, N_EVALUATED // tokens.ctx_len)
    sae = train(args, model, tokens[:-held_out], hook_point)
    evaluation = sl.evaluate(sae, model, tokens[-held_out:])
    print(evaluation)
    n_rows = max(1, args.n_store // tokens.ctx_len)
    store = sl.harvest(sae, model, tokens[:n_rows], args.out / "store")
    print(sl.analysis.dead_features(store, sae))
    prompts = args.prompt or [model.tokenizer.decode(tokens.ids[-1, :64].tolist(), skip_special_tokens=True)]
    print(sl.report(store, args.out / "report", model, sae=sae, prompts=prompts, evaluation=evaluation))


if __name__ == "__main__":
    main()
