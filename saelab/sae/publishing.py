"""Uploading SAEs to the Hugging Face Hub, one or several to a repository, with model cards that say how to load them.

An SAE in a folder of a repository has its own card there; the card at the top lists all of them, between two comments,
and is otherwise left as it is.
"""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saelab.sae.formats.circuit_tracer import describe_transcoder
from saelab.sae.module import SAEModule
from saelab.stores.files import inside, write_atomic
from saelab.stores.hub import Upload
from saelab.stores.results import Result
from saelab.stores.sharing import shareable

CARD = "README.md"
LOADERS = {
    "saelab": ("import saelab as sl", 'sae = sl.SAE.from_pretrained("{repo}"{, path})'),
    "saelens": ("from sae_lens import SAE", 'sae = SAE.from_pretrained("{repo}", "{path}")'),
    "sparsify": ("from sparsify import SparseCoder", 'sae = SparseCoder.load_from_hub("{repo}"{, hookpoint=path})'),
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary",
        'sae, config = load_dictionary(folder, device="cpu")  # where the files of {place} are',
    ),
    "circuit_tracer": (
        "from circuit_tracer.utils.hf_utils import load_transcoder_from_hub",
        'transcoders, config = load_transcoder_from_hub("{place}")  # once all layers are there',
    ),
    "overcomplete": (
        "import json, torch",
        "from overcomplete import sae as saes",
        'cfg = json.load(open(f"{folder}/config.json"))  # where the files of {place} are',
        'sae = getattr(saes, cfg["sae_class"])(**cfg["arguments"])',
        'sae.load_state_dict(torch.load(f"{folder}/sae.pt", weights_only=True))',
        "sae = sae.eval()",
    ),
}
START, END = "<!-- SAEs, listed by saelab -->", "<!-- end of the list -->"
LIST = re.compile(rf"{re.escape(START)}\n(.*?){re.escape(END)}\n?", re.DOTALL)
ROW = re.compile(r"^\| \[`(.+?)`\]\(.*\|$", re.MULTILINE)
HEAD = ("| SAE | activation | widths | model | place |", "|---|---|---|---|---|")


def push(sae: SAEModule, save: Callable[[Path], None], to: Upload, format: str, evaluation: Result | None) -> str:
    """Upload an SAE's files and cards in one commit; returns the commit's address, or that of the pull request.

    Args:
        sae: the SAE, which the cards describe.
        save: function that writes its files into a folder.
        to: repository, folder and branch.
        format: library whose files are uploaded.
        evaluation: result of `evaluate` for the card; None leaves it out.
    """
    path = None if to.path_in_repo is None else Path(inside(to.path_in_repo)).as_posix()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if path is None else Path(folder, path)
        save(place)  # first, as it refuses what a format cannot express
        api = to.begin()
        there = _read_card(api, to)
        card = write_card(sae, to.repo_id, format, evaluation, path)
        if path is None:
            held = LIST.search(there or "")
            write_atomic(place / CARD, (card + (f"\n{held[0]}" if held else "")).encode())
        else:
            write_atomic(place / CARD, card.encode())
            write_atomic(Path(folder, CARD), list_in_card(there, sae, to.repo_id, path).encode())
        commit = api.upload_folder(
            repo_id=to.repo_id,
            folder_path=folder,
            revision=to.revision,
            commit_message=to.commit_message,
            create_pr=to.create_pr,
        )
    return str(getattr(commit, "pr_url", None) or commit)


def _read_card(api: Any, to: Upload) -> str | None:
    """The card at the top of the repository as it is; None without one."""
    if not api.file_exists(to.repo_id, CARD, revision=to.revision):
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = api.hf_hub_download(to.repo_id, CARD, revision=to.revision, local_dir=folder)
        return Path(file).read_text(encoding="utf-8")


def list_in_card(card: str | None, sae: SAEModule, repo_id: str, path: str) -> str:
    """The card at the top of a repository with an SAE in its list; rows of others, and all other text, stay.

    Args:
        card: the card as it is; None makes one.
        sae: the SAE.
        repo_id: 'owner/name' on the Hub.
        path: its folder in the repository.
    """
    facts = describe_sae(sae)
    cells = [f"[`{path}`]({path})", *(facts[name] for name in ("activation", "widths", "model", "place"))]
    row = f"| {' | '.join(map(_cell, cells))} |"
    if card is None:
        head = [*_write_header(sae, "saelab"), "", f"# {repo_id}", "", "Each folder holds an SAE:", ""]
        load = f'```python\nimport saelab as sl\n\nsae = sl.SAE.from_pretrained("{repo_id}", "{path}")\n```\n'
        card = "\n".join([*head, START, END, "", load])
    elif LIST.search(card) is None:
        card = f"{card.rstrip()}\n\n{START}\n{END}\n"
    held = LIST.search(card)
    assert held is not None
    rows = {found[1]: found[0] for found in ROW.finditer(held[1])} | {path: row}
    lines = "\n".join(["", *HEAD, *(rows[name] for name in sorted(rows, key=_natural)), ""])
    return f"{card[: held.start()]}{START}\n{lines}\n{END}\n{card[held.end() :]}"


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Key that sorts layer_9 before layer_10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path)]


def describe_sae(sae: SAEModule) -> dict[str, str]:
    """What a card says of an SAE."""
    origin: Any = getattr(sae, "provenance", None)
    return {
        "kind": "transcoder" if sae.cfg.d_out else "sparse autoencoder",
        "activation": str(sae.cfg.activation),
        "widths": f"d_in {sae.cfg.d_in}, d_sae {sae.cfg.d_sae}" + (f", d_out {sae.cfg.d_out}" if sae.cfg.d_out else ""),
        "model": f"{shareable(origin.model)} (weight processing: {origin.weight_processing})" if origin else "unknown",
        "place": origin.place if origin else "unknown",
        "text": shareable(origin.text) if origin else "unknown",
    }


def write_card(sae: SAEModule, repo_id: str, format: str, evaluation: Result | None, path: str | None = None) -> str:
    """Markdown of the model card, with the Hub's header: what the SAE is, its training data, how to load it, and its
    metrics.

    Args:
        sae: the SAE; its provenance, where it has one, gives model, hook point and text.
        repo_id: 'owner/name' on the Hub.
        format: library whose files are uploaded; chooses the loading example.
        evaluation: result of `evaluate`, shown as a table; None leaves that section out.
        path: folder in the repository; None is its top.
    """
    place = repo_id if path is None else f"{repo_id}/{path}"
    file = path
    if format == "circuit_tracer":  # several SAEs in a folder
        name = describe_transcoder(sae, getattr(sae, "provenance", None))["file"]
        file = name if path is None else f"{path}/{name}"
    filled = {
        "{repo}": repo_id,
        "{place}": place,
        "{path}": path or ".",
        "{, path}": f', "{path}"' if path else "",
        "{, file}": f', "{file}"' if file else "",
        "{, hookpoint=path}": f', hookpoint="{path}"' if path else "",
    }

    def fill(line: str) -> str:
        for name, value in filled.items():
            line = line.replace(name, value)
        return line

    lines = [*_write_header(sae, format), "", f"# {place}", "", "| | |", "|---|---|"]
    lines += [*(f"| {name} | {_cell(value)} |" for name, value in describe_sae(sae).items()), ""]
    lines += ["## Loading", "", "```python", *map(fill, LOADERS[format]), "```", ""]
    if format != "saelab":
        lines += [fill('saelab reads it too: `saelab.SAE.from_pretrained("{repo}"{, file})`.'), ""]
    if evaluation is not None:
        lines += ["## Evaluation", "", "```text", str(evaluation), "```", ""]
    return "\n".join(lines)


def _write_header(sae: SAEModule, format: str) -> list[str]:
    """What the Hub reads of a card."""
    origin: Any = getattr(sae, "provenance", None)
    model = shareable(origin.model) if origin else None
    on_hub = model is not None and model.count("/") == 1 and not Path(model).exists()
    header = {
        "library_name": format,
        "tags": ["sparse-autoencoder", "interpretability", "saelab"],
        **({"base_model": model} if on_hub else {}),
    }
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"]


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
