"""`saelab demo`: train dictionaries on a model whose concepts are known, and score them; offline."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Option

from saelab.cli import options
from saelab.cli.exploring import name_command
from saelab.cli.terminal import Context, echo
from saelab.stores.jobs import hold_folder

EXPLORED = "AbsTopK"
"""the dictionary whose features are harvested, to be explored"""
STORY_SEED = 0
FIRST = 20_000_000  # number of the first story: the models of tales were trained and measured on earlier ones


def run_demo(
    context: Context,
    out: Annotated[
        Path, Option(help="Folder for the report and the dictionaries; an older demo is replaced.", metavar="FOLDER")
    ] = Path("demo"),
    model: Annotated[
        str, Option(help="A model of tales: its name, or a folder that holds one.", metavar="NAME")
    ] = "tales",
    hook_point: Annotated[
        str, Option(help="Hook point whose activations the dictionaries are trained on.", metavar="NAME")
    ] = "blocks.2.hook_resid_post",
    n_stories: Annotated[int, Option(help="Stories to train on; half as many others to score on.")] = 2400,
    n_tokens: Annotated[int, Option(help="Tokens that each dictionary is trained on.")] = 1_200_000,
    d_sae: Annotated[int, Option(help="Latents in each dictionary.")] = 1024,
    k: Annotated[int, Option(help="Latents that fire for a token: kept, or their mean.")] = 16,
    seed: Annotated[int, Option(help="Seed of dictionaries, order of the data and split of the stories.")] = 0,
    progress: options.Progress = True,
) -> None:
    """Train three dictionaries on a built-in model whose concepts are known, score them, and write a report.

    Needs no network, and three minutes at most on two cores. The report is one self-contained HTML file.
    """
    from saelab.cli import demo_stages as stages
    from saelab.collecting.harvesting import harvest
    from saelab.lm.models import describe_model, load_model
    from saelab.sae.sae import SAE
    from saelab.stores.results import format_table
    from saelab.synthetic.tales import generate_stories
    from saelab.visualization.demo_page import tabulate

    clock = stages.Clock()
    context.with_resource(hold_folder(out))
    with clock.stage("generating stories"):
        lm, half = load_model(model, progress=progress), max(2, n_stories // 2)
        seen, unseen = (
            generate_stories(n_stories, STORY_SEED, FIRST),
            generate_stories(half, STORY_SEED, FIRST + n_stories),
        )
    with clock.stage("collecting activations"):
        acts, others = (stages.collect_stories(lm, stories, hook_point, progress) for stories in (seen, unseen))
    with clock.stage("training three dictionaries in one pass"):
        saes = stages.train_all(acts, d_sae, k, n_tokens, seed, progress)
    with clock.stage("scoring them and their baselines"):
        trials, baselines = stages.score_all(saes, others, unseen, seed, progress)
    ran = {
        "Model": f"{model}, at {hook_point} (d_in {acts.d_in})",
        "Trained on": stages.describe(seen, acts) + f"; {n_tokens:,} tokens seen",
        "Scored on": stages.describe(unseen, others)
        + "; features chosen on one half of the stories, scored on the other",
        "Dictionaries": f"{d_sae:,} latents; k = {k} for all, so that their L0 is matched; seed {seed}",
        "Time": str(clock),
        "Versions": ", ".join(f"{name} {version}" for name, version in describe_model(lm).versions.items()),
    }
    stages.save_all(out, saes, trials, stages.lay_out(ran, trials, baselines, stages.read_corpus(others, unseen, seed)))
    store = out / "store"
    harvest(SAE.from_pretrained(out / EXPLORED.lower()), lm, others, store, progress=progress, resume=False)
    header, rows = tabulate(trials, baselines)
    echo("\n".join(["", *format_table([header, *rows]), "", f"{clock}."]))
    echo(
        f"Open {out / 'report.html'} in a browser; then try `saelab info {shlex.quote(str(out / 'abstopk'))}`, or "
        f"`saelab demo --k {max(1, k // 2)} --out {shlex.quote(str(out) + '-sparser')}`."
    )
    scores = out / EXPLORED.lower() / "concepts.json"
    echo(f"To search, name and steer the features of {EXPLORED} in a browser: {name_command(store, model, scores)}")
