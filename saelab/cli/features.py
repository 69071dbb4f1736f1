"""`saelab harvest`, `saelab features`, `saelab dead`: a feature store, made and read."""

from typing import Any

from saelab.analyses.dead import dead_units
from saelab.analyses.listing import list_features
from saelab.cli import options
from saelab.cli.info import describe_store
from saelab.cli.opening import open_pair
from saelab.cli.saying import say
from saelab.cli.texts import read_head
from saelab.collecting.harvesting import harvest
from saelab.sae.sae import SAE
from saelab.stores.features import FeatureStore
from saelab.stores.files import to_json

SORT, TOP = (options.default_of(list_features, name) for name in ("sort", "top"))
VALUES = options.default_of(harvest, "dtype")
NEAR_DEAD, DENSE = (options.default_of(dead_units, name) for name in ("near_dead_rate", "dense_rate"))


def harvest_text(
    sae: options.SAEName,
    model: options.ModelName,
    text: options.TextFile,
    out: options.OutStore,
    n_tokens: options.HeadTokens = None,
    ctx_len: options.EvalCtxLen = None,
    values: options.ValueType = VALUES,
    batch_size: options.ForwardSize = None,
    allow_mismatch: options.AllowMismatch = False,
    separator: options.Separator = options.SEPARATOR,
    field: options.Field = options.FIELD,
    bos: options.Bos = True,
    device: options.Device = None,
    overwrite: options.OverwriteStore = False,
    progress: options.Progress = True,
) -> None:
    """Encode a text once into a feature store, which every analysis reads.

    Reads the text from its start; hook point and mask are the SAE's. A run that was cut off goes on where it stopped
    when the same command is given again, and ends with the same bytes.
    """
    if values not in ("float16", "float32"):
        raise ValueError(f"`--values` must be float16 or float32, got '{values}'.")
    coder, lm = open_pair(sae, model, device, progress)
    length = ctx_len or (coder.provenance.ctx_len if coder.provenance else None) or options.CTX_LEN
    harvest(
        coder,
        lm,
        read_head(lm, text, n_tokens, length, bos, separator, field),
        out,
        dtype=values,  # type: ignore[arg-type]
        batch_size=batch_size,
        allow_mismatch=allow_mismatch,
        progress=progress,
        resume=not overwrite,
    )
    say(describe_store(out))


def show_features(
    store: options.StoreFolder,
    sort: options.SortColumn = SORT,
    top: options.TopRows = TOP,
    ascending: options.Ascending = False,
    json: options.AsJSON = False,
) -> None:
    """List features by how often they fire, how strongly, or with which sign."""
    found = list_features(FeatureStore.load(store), sort=sort, top=top, descending=not ascending)
    _print(found, json)


def show_dead(
    store: options.StoreFolder,
    sae: options.StoreSAE = None,
    near_dead_rate: options.NearDead = NEAR_DEAD,
    dense_rate: options.Dense = DENSE,
    json: options.AsJSON = False,
) -> None:
    """Count dead, near-dead, live and dense features; with --sae, say why the dead ones may be."""
    coder = SAE.from_pretrained(sae) if sae is not None else None
    opened = FeatureStore.load(store)
    _print(dead_units(opened, coder, near_dead_rate=near_dead_rate, dense_rate=dense_rate), json)


def _print(result: Any, as_json: bool) -> None:
    say(to_json(result.to_dict()) if as_json else str(result))
