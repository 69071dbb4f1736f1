"""Write `saelab/sae/formats/releases.json` from the registry of an installed sae-lens; `--check` compares the two.

    pip install --no-deps sae-lens pyyaml       # only its registry is read; --check needs saelab beside it
    python scripts/refresh_releases.py          # writes the file
    python scripts/refresh_releases.py --check  # exit code 1 where an id leads elsewhere than in sae-lens

Facts alone are taken over: names, repositories, paths, measured L0 and variance explained, Neuronpedia's ids. Hook
points and widths are in the names and in SAELens' loaders, a function per loader; which of the facts the files
themselves leave out is said here.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[1] / "saelab" / "sae" / "formats" / "releases.json"
HUB_IDS = {
    "gpt2-small": "gpt2",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    **{f"gemma-2-{size}": f"google/gemma-2-{size}" for size in ("2b", "9b", "27b", "9b-it")},
    **{name: f"google/{name}" for name in ("gemma-2b", "gemma-2b-it")},
    **{f"qwen3-{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")},
}
"""Hub ids of models that the registry calls by TransformerLens' names"""
RIGHT_MODELS = {"gemma-scope-9b-it-res": "google/gemma-2-9b-it"}
"""releases whose model the registry has wrong: repository and canonical release say the instruction-tuned one"""
PLACES = {
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "att": "blocks.{layer}.attn.hook_z",
}
ROUNDED = {65: 2**16, 131: 2**17, 262: 2**18, 524: 2**19}
"""widths that are given in thousands, by that; others are in units of 1,024"""
UNREAD = {
    "temporal": "a temporal SAE, whose codes come from attention over earlier tokens",
    "mntss_clt_layer_transcoder": "one layer of a cross-layer transcoder, which writes to all later layers and "
    "reconstructs no place by itself",
}
"""why saelab refuses what a loader reads"""
Entry = dict[str, Any]
Facts = dict[str, Any]
"""fields of a release; a list has a value for each id, else one stands for all"""


def read_registry() -> tuple[dict[str, Entry], str]:
    """SAELens' registry by release, and its version. The package is not imported, as that needs torch and more."""
    import yaml

    found = find_spec("sae_lens")
    if found is None or found.origin is None:
        sys.exit("sae-lens must be installed: pip install --no-deps sae-lens pyyaml")
    text = (Path(found.origin).parent / "pretrained_saes.yaml").read_text()
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), metadata.version("sae-lens")


def find_layer(id: str, path: str) -> int | None:
    """Layer that an id or a path names; None for the embedding."""
    found = re.search(r"(?:layer_?|blocks\.|^l)(\d+)", id) or re.search(r"layer_?(\d+)", path)
    return int(found[1]) if found else None


def find_width(names: list[str], d_in: int | None) -> int | None:
    """Number of latents as names give it; None where none does."""
    for text in names:
        if found := re.search(r"(?:width_|[-_]w-?|v5[-_]|res-)(\d+)(k|m)(?![a-z])", text):
            return ROUNDED.get(int(found[1]), int(found[1]) * 1024) if found[2] == "k" else int(found[1]) * 1024**2
        if found := re.search(r"2pow(\d+)", text):
            return 2 ** int(found[1])
        if found := re.search(r"_ds(\d+)_|hook_(?:[a-z]+_)+(\d{3,6})(?:$|[_:])", text):
            return int(found[1] or found[2])
        if d_in and (found := re.search(r"_(\d+)x$", text)):
            return int(found[1]) * d_in
    return None


def of_saelens(release: str, entry: Entry) -> Facts:
    """Files in its own format name model and hook point; not always what the model was processed by, and the factor on
    activations.
    """
    points = [re.sub(r"_\d+$", "", sae["id"]) for sae in entry["saes"]]
    facts: Facts = {"hook_point": "{id}" if points == [sae["id"] for sae in entry["saes"]] else points}
    if ((entry.get("config_overrides") or {}).get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        facts["weight_processing"] = "folded"
    scales = [sae.get("norm_scaling_factor") for sae in entry["saes"]]
    return facts | ({"scale": scales} if any(scales) else {})


def of_gemma_scope(release: str, entry: Entry) -> Facts:
    kind = re.search(r"-(res|mlp|att)(-|$)", release)
    assert kind is not None
    places = ["hook_embed" if "embedding" in sae["id"] else PLACES[kind[1]] for sae in entry["saes"]]
    return {"hook_point": places, "missing": ["model", "hook_point"]}


def of_gemma_transcoders(release: str, entry: Entry) -> Facts:
    return {
        "hook_point": "blocks.{layer}.ln2.hook_normalized",
        "hook_point_out": "blocks.{layer}.hook_mlp_out",
        "missing": ["model", "hook_point", "hook_point_out"],
    }


def of_gemma_scope_2(release: str, entry: Entry) -> Facts:
    if "transcoders" in release:
        return {"hook_point": "blocks.{layer}.ln2.hook_out", "hook_point_out": "blocks.{layer}.hook_mlp_out"}
    kind = re.search(r"-(res|mlp|att)(-|$)", release)
    assert kind is not None
    return {"hook_point": PLACES[kind[1]]}


def of_llama_scope(release: str, entry: Entry) -> Facts:
    kind = re.search(r"_lx([arm])_", release)
    place = {"a": "hook_attn_out", "m": "hook_mlp_out", "r": "hook_resid_post"}[kind[1] if kind else "r"]
    return {"hook_point": f"blocks.{{layer}}.{place}", "missing": ["model"], "d_in": 4096}


def of_dictionary_learning(release: str, entry: Entry) -> Facts:
    said = ["model", "hook_point"] if release.endswith("-andyrdt") else ["hook_point"]
    return {"hook_point": PLACES["res"], "missing": said}


def of_single_files(release: str, entry: Entry) -> Facts:
    return {"hook_point": PLACES["res"], "missing": ["model", "hook_point"]}


def of_qwen_scope(release: str, entry: Entry) -> Facts:
    k = int(entry["repo_id"].rpartition("_")[2])
    return of_single_files(release, entry) | {"activation": {"name": "topk", "k": k}}


def of_hook_z(release: str, entry: Entry) -> Facts:
    return {
        "hook_point": "blocks.{layer}.attn.hook_z",
        "missing": ["model", "hook_point"],
        "unread": "a file of weights alone in a format that saelab does not read",
    }


def of_qwen_transcoders(release: str, entry: Entry) -> Facts:
    return {
        "hook_point": "blocks.{layer}.mlp.hook_in",
        "hook_point_out": "blocks.{layer}.hook_mlp_out",
        "missing": ["model", "hook_point", "hook_point_out"],
    }


def of_unread(release: str, entry: Entry) -> Facts:
    places = {"hook_point": PLACES["res"]} if entry["conversion_func"] == "temporal" else {}
    return {**places, "unread": UNREAD[entry["conversion_func"]]}


LOADERS: dict[str | None, Callable[[str, Entry], Facts]] = {
    None: of_saelens,
    "connor_rob_hook_z": of_hook_z,
    "gemma_2": of_gemma_scope,
    "gemma_2_transcoder": of_gemma_transcoders,
    "gemma_3": of_gemma_scope_2,
    "llama_scope": of_llama_scope,
    "llama_scope_r1_distill": of_llama_scope,
    "dictionary_learning_1": of_dictionary_learning,
    "deepseek_r1": of_single_files,
    "goodfire": of_single_files,
    "qwen_scope": of_qwen_scope,
    "mwhanna_transcoder": of_qwen_transcoders,
    "temporal": of_unread,
    "mntss_clt_layer_transcoder": of_unread,
}
"""what is known of a release, by the loader that SAELens reads it with"""


def convert(release: str, entry: Entry) -> Facts:
    """The entry of a release in `releases.json`, without fields that say nothing."""
    loader, saes = entry.get("conversion_func"), entry["saes"]
    if loader not in LOADERS:
        sys.exit(f"{release} is read by '{loader}', which is new: say in LOADERS what is known of it")
    facts = LOADERS[loader](release, entry)
    d_in = facts.pop("d_in", None)
    ids, paths = [str(sae["id"]) for sae in saes], [str(sae["path"]) for sae in saes]
    layers = [find_layer(id, path) for id, path in zip(ids, paths, strict=True)]
    widths = [
        find_width([id, path, release, sae.get("neuronpedia") or "", entry["repo_id"]], d_in)
        for id, path, sae in zip(ids, paths, saes, strict=True)
    ]
    fields = {
        "repo": entry["repo_id"],
        "model": RIGHT_MODELS.get(release) or HUB_IDS.get(entry["model"], entry["model"]),
        "id": ids,
        "path": shorten_paths(ids, paths),
        "layer": layers,
        "d_sae": widths,
        "l0": [find_l0(sae, path) for sae, path in zip(saes, paths, strict=True)],
        "fvu": [round(1 - sae["variance_explained"], 6) if "variance_explained" in sae else None for sae in saes],
        "neuronpedia": [sae.get("neuronpedia") for sae in saes],
        **facts,
    }
    said = {name: value if name == "id" else gather(name, value) for name, value in fields.items()}
    return {name: value for name, value in said.items() if value is not None}


def find_l0(sae: Entry, path: str) -> float | None:
    """L0 that the registry or else a path gives, as those of Gemma Scope do."""
    found = re.search(r"average_l0_(\d+)", path)
    l0 = sae.get("l0", found[1] if found else None)
    return None if l0 is None else float(l0)


def shorten_paths(ids: list[str], paths: list[str]) -> str | list[str]:
    """One path with `{id}` in place of the id, where all are like that; else the paths."""
    texts = {path.replace(id, "{id}") for id, path in zip(ids, paths, strict=True) if id in path}
    if len(texts) == 1 and [next(iter(texts)).replace("{id}", id) for id in ids] == paths:
        return texts.pop()
    return paths


def gather(name: str, value: Any) -> Any:
    """The one value of a list that holds no other."""
    alike = isinstance(value, list) and name != "missing" and all(item == value[0] for item in value)
    return value[0] if alike else value


def build() -> dict[str, Any]:
    registry, version = read_registry()
    return {
        "source": f"sae-lens {version}",
        "releases": {name: convert(name, entry) for name, entry in registry.items()},
    }


def write(table: dict[str, Any]) -> None:
    lines = [
        f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in table["releases"].items()
    ]
    text = ",\n".join(lines)
    TABLE.write_text(f'{{"source": {json.dumps(table["source"])}, "releases": {{\n{text}\n}}}}\n')


def check() -> list[str]:
    """Ids that lead elsewhere than in SAELens' registry, or nowhere, as saelab reads its table."""
    sys.path.insert(0, str(TABLE.parents[3]))
    from saelab.sae.formats.releases import find_published

    registry, version = read_registry()
    wrong, n = [], 0
    for release, entry in registry.items():
        for sae in entry["saes"]:
            found = find_published(release, str(sae["id"]))
            there, n = (entry["repo_id"], str(sae["path"])), n + 1
            if found is None or (found.repo, found.path) != there:
                wrong.append(f"{release} {sae['id']}: {there}, got {found and (found.repo, found.path)}")
    print(f"{n - len(wrong):,} of {n:,} ids of sae-lens {version} lead where it finds them.")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the file with sae-lens instead of writing it")
    if parser.parse_args().check:
        if wrong := check():
            sys.exit("\n".join(wrong[:20]))
        return
    table = build()
    write(table)
    n = sum(len(entry["id"]) for entry in table["releases"].values())
    print(f"{TABLE}: {len(table['releases'])} releases, {n:,} SAEs, {TABLE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
