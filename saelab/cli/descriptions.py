"""Tables of what a folder holds and how it was made: of an SAE, activations, a feature store, an unfinished run."""

import math
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from saelab.cli.terminal import printable
from saelab.sae.config import RandomPrefixes, SAEConfig
from saelab.sae.formats.conventions import Convention, compose_config
from saelab.sae.formats.origin import SAEFacts
from saelab.sae.formats.registry import find_format, is_own, read_foreign
from saelab.sae.formats.sources import SAEFiles
from saelab.sae.pretrained import CONFIG, check_config, read_config
from saelab.stores.files import await_settled
from saelab.stores.manifest import ActivationsManifest, FeatureManifest, Provenance
from saelab.stores.results import format_table
from saelab.stores.validation import check_settings, naming, read_json, require_object
from saelab.training.checkpoint import FOLDER, PROGRESS, read_progress
from saelab.training.schedules import Schedule, Scheduled

TableRows = list[tuple[str, str]]


def describe_folder(path: Path) -> str:
    """What lies in a folder, as a table; FileNotFoundError or ValueError where it is nothing of ours."""
    if not path.exists():
        raise FileNotFoundError(f"PATH must be a folder or a file, got '{path}', where there is none.")
    with naming(path):
        return _describe(path)


def _describe(path: Path) -> str:
    if is_own(SAEFiles.open(path)):
        return describe_sae(path)
    if (path / "manifest.json").is_file():
        kind = require_object(read_json(path / "manifest.json"), f"{path / 'manifest.json'}").get("kind")
        return describe_store(path) if kind == FeatureManifest.kind else describe_activations(path)
    await_settled(path / FOLDER)
    if (path / FOLDER / PROGRESS).is_file():
        return describe_unfinished(path)
    return describe_foreign(path)


def describe_sae(path: Path) -> str:
    """An SAE's configuration, training and origin."""
    described = read_config(path)
    with naming(path / CONFIG):
        cfg, training = SAEConfig.from_dict(described["config"]), described["training"]
        rows = [
            ("activation", str(cfg.activation)),
            ("widths", f"d_in {cfg.d_in:,}, d_sae {cfg.d_sae:,}{_target(cfg)}"),
            ("prefixes", _prefixes(cfg)),
            ("dictionary", f"{cfg.dictionary} (start: {cfg.init}), normalizer {cfg.normalizer}"),
            ("objective", _objective(cfg)),
            *(_training_rows(training) if training else [("training", "none")]),
        ]
        rows += _read_from(described.get("origin"))
        origin = described["provenance"]
        rows += _origin_rows(origin) if origin else [("origin", "unknown")]
    check_config(path)
    kind = "sparse autoencoder" if cfg.d_out is None else "transcoder"
    return _table(f"{path}: a {kind}", rows)


def describe_foreign(path: Path) -> str:
    """What an SAE of another library is, and what it leaves to ask; ValueError for what is none that is known."""
    source = SAEFiles.open(path)
    form = find_format(source)
    rows: TableRows = [("format", form)]
    try:
        reading = read_foreign(source, form, SAEFacts())
        cfg = compose_config(reading.parts, reading.how)
    except ValueError as error:
        return _table(f"{path}: a sparse autoencoder of {form}", [*rows, ("to be given", str(error))])
    facts = reading.facts
    unsaid = "unknown" if facts.complete else "not said: has to be given"
    out = f", d_out {cfg.d_out:,}" if cfg.d_out else ""
    rows += [
        ("activation", str(cfg.activation)),
        ("widths", f"d_in {cfg.d_in:,}, d_sae {cfg.d_sae:,}{out}"),
        *(("convention", words) for words in reading.how.describe()),
        ("model", facts.model or unsaid),
        ("hook point", facts.hook_point or unsaid),
    ]
    if cfg.d_out:
        rows.append(("writes", facts.hook_point_out or unsaid))
    if facts.model:
        rows.append(("weight processing", facts.weight_processing or "none"))
    return _table(f"{path}: a {'transcoder' if cfg.d_out else 'sparse autoencoder'} of {form}", rows)


def describe_activations(path: Path) -> str:
    """What a folder of activations holds, and its origin."""
    manifest = ActivationsManifest.load(path)
    state = "" if manifest.complete else ", UNFINISHED: give the same command again to go on"
    rows = [
        ("hook points", ", ".join(f"{name} (d_in {d_in})" for name, d_in in manifest.d_in.items())),
        (manifest.counted, f"{manifest.n_tokens:,} of {manifest.dtype}, shards: {len(manifest.shards)}{state}"),
    ]
    origin = {**manifest.provenance, "removed": manifest.removed}
    return _table(f"{path}: activations", rows + _origin_rows(origin, hook_point=False))


def describe_store(path: Path) -> str:
    """What a feature store holds, and its origin."""
    manifest = FeatureManifest.load(path)
    state = "" if manifest.complete else ", UNFINISHED: give the same command again to go on"
    l0 = manifest.n_entries / max(1, manifest.n_tokens)
    rows = [
        ("features", f"{manifest.d_sae:,} of {manifest.source}"),
        (manifest.counted, f"{manifest.n_tokens:,}, shards: {len(manifest.shards)}{state}"),
        ("codes", f"{manifest.n_entries:,} of {manifest.dtype}, l0 {l0:.4g}"),
    ]
    origin = {**manifest.provenance, "removed": manifest.removed}
    return _table(f"{path}: a feature store", rows + _origin_rows(origin))


def describe_unfinished(path: Path) -> str:
    """How far a training run has come."""
    progress = read_progress(path / "checkpoint")
    with naming(path / "checkpoint"):
        said = check_settings(_Budget, progress["config"], "`config` of a checkpoint")
    n_tokens, seen = said["n_tokens"], progress["step"] * said["batch_size"]
    rows = [("tokens seen", f"{seen:,} of {n_tokens:,}"), ("go on", "saelab train with the same flags and --resume")]
    return _table(f"{path}: an unfinished training run", rows)


class _Budget(TypedDict):
    n_tokens: int
    batch_size: int


class _Training(_Budget):
    lr: float
    seed: int
    n_tokens_seen: int
    last: dict[str, Any]


class _Saved(TypedDict, total=False):
    met: bool
    target_l0: float
    n_tokens: int


class _Classical(TypedDict):
    method: str
    n_tokens_seen: int
    seed: int


def _training_rows(training: dict[str, Any]) -> TableRows:
    if "method" in training:  # of `fit_dictionary`
        fitted = check_settings(_Classical, training, "`training`")
        return [("fitted by", f"{fitted['method']} to {fitted['n_tokens_seen']:,} tokens (seed {fitted['seed']})")]
    said = check_settings(_Training, training, "`training`")
    settings = f"batch {said['batch_size']:,}, lr {said['lr']:.3g}, seed {said['seed']}"
    names = {"held_out_fvu": "held-out FVU", "l0": "L0", "dead_frac": "dead"}
    values = [f"{name} {x:.4g}" for key, name in names.items() if isinstance(x := said["last"].get(key), int | float)]
    rows = [("trained on", f"{said['n_tokens_seen']:,} tokens ({settings})"), ("at the end", ", ".join(values))]
    saved = check_settings(_Saved, said.get("saved") or {}, "`saved` of `training`")
    if saved.get("met") is not None:
        verdict = "met" if saved["met"] else "MISSED by more than 5 %"
        rows.append(
            ("target L0", f"{saved.get('target_l0', math.nan):g}, {verdict} on {saved.get('n_tokens', 0):,} tokens")
        )
    return rows


def _origin_rows(origin: dict[str, Any], hook_point: bool = True) -> TableRows:
    come = Provenance.from_dict(origin)
    rows = [
        ("model", f"{come.model} (weight processing: {come.weight_processing})"),
        ("hook point", " to ".join(filter(None, (come.hook_point, come.hook_point_out)))),
        *([("back end", come.backend)] if come.backend else []),
    ]
    if come.n_tokens:  # of somebody else's SAE no more is known
        parts = f"rows of {come.ctx_len}" if come.pooling is None else f"pooling: {come.pooling}"
        counted = "tokens" if come.pooling is None else "documents"
        removed = ", ".join(f"{name} {n:,}" for name, n in come.removed.items() if n)
        rows += [
            ("text", f"{come.text}, {parts}, sha256 {come.tokens_sha256[:12]}"),
            ("activations", f"{come.n_tokens:,} {counted} of {come.dtype}"),
            ("left out", removed or "nothing"),
            ("versions", ", ".join(f"{name} {version}" for name, version in come.versions.items())),
        ]
    return rows if hook_point else [row for row in rows if row[0] not in ("hook point", "activations")]


def _read_from(origin: dict[str, Any] | None) -> TableRows:
    """Of an SAE that was read from another library's files: which, and what its numbers meant there."""
    if origin is None:
        return []
    said = require_object(origin, "`origin`")
    folds = Convention.from_dict(said.get("convention")).describe()
    return [("read from", str(said.get("format"))), *(("convention", words) for words in folds)]


def _prefixes(cfg: SAEConfig) -> str:
    if isinstance(cfg.prefixes, RandomPrefixes):
        return f"{cfg.prefixes.n} random ones a step, from {cfg.prefixes.smallest}"
    return ", ".join(f"{size:,}" for size in cfg.prefixes or ()) or "none"


def _target(cfg: SAEConfig) -> str:
    return "" if cfg.d_out is None else f", d_out {cfg.d_out:,}" + (", skip connection" if cfg.skip else "")


def _objective(cfg: SAEConfig) -> str:
    return ", ".join(f"{term.name} {_number(term.coefficient)}" for term in cfg.terms)


def _number(scheduled: Scheduled) -> str:
    if isinstance(scheduled, Schedule):
        return f"{scheduled.start:.3g} to {scheduled.end:.3g}"
    return f"{scheduled:.3g}"


def _table(title: str, rows: TableRows) -> str:
    lines = format_table([[f"  {name}", " ".join(str(value).split())] for name, value in rows], left=(0, 1))
    return printable("\n".join([title, *lines]))
