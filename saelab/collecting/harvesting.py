"""`harvest`: encode a corpus with an SAE and store the sparse codes in a folder, a feature store.

The corpus is a text with its model, or activations collected before. `harvest_untrained` makes the feature store of an
untrained SAE on the same tokens, as a baseline.
"""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from saelab.collecting.reader import (
    ActivationReader,
    ActivationsSource,
    Batch,
    DocumentsSource,
    HarvestSource,
    SameRowsSource,
    TextSource,
    fingerprint,
    rebuild_tokens,
)
from saelab.collecting.shared import SharedFolder, claim_together
from saelab.collecting.writers import ShardWriter, read_rows
from saelab.functional.codes import SparseCodes
from saelab.lm.hooks import FORWARD_TOKENS, forward_size
from saelab.lm.huggingface import AnyModel, as_model
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import Model
from saelab.lm.tokens import Tokens
from saelab.sae.compatibility import Match, match_activations, match_model, require_finite, require_threshold
from saelab.sae.initialization import make_untrained
from saelab.sae.sae import SAE
from saelab.stores.activations import Activations
from saelab.stores.feature_statistics import FeatureStatistics, save_statistics
from saelab.stores.feature_store import FeatureStore
from saelab.stores.jobs import hidden
from saelab.stores.manifest import FeatureManifest
from saelab.stores.packing import pack_codes, round_values, smallest_int
from saelab.stores.sharing import relative_place
from saelab.stores.tensors import TensorFile
from saelab.training.ranks import RankGrid, Steps, run_together

SHARD_TOKENS = 65536  # so that row numbers within a shard fit 16 bits
ValueDtype = Literal["float16", "float32"]
SAMPLE_TOKENS = 8_192  # tokens to which the untrained SAE's location and scale are fitted
EVERYTHING = TokenMask(special=False)


@torch.no_grad()
def harvest(
    saes: SAE | Mapping[str, SAE],
    model: AnyModel | None,
    tokens: Tokens | Activations,
    out: str | Path,
    *,
    hook_point: str | None = None,
    mask: TokenMask | None = None,
    dtype: ValueDtype = "float16",
    batch_size: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    allow_mismatch: bool = False,
    progress: bool = True,
    resume: bool = True,
    mesh: Any = None,
) -> FeatureStore | dict[str, FeatureStore]:
    """Feature store of a corpus: SAE codes ordered by token and by feature, the tokens, and statistics of each feature.

    Several SAEs share one forward pass and get a folder each, `out`/name. An interrupted call continues where it
    stopped when it is made again, and ends with the same bytes; a finished one is opened at once. Memory use is a
    shard.

    Args:
        saes: the SAE, or several by name; then a dictionary of stores is returned.
        model: the language model. May be None for collected activations, where it only gives the strings of tokens.
        tokens: rows of token ids, or activations collected before, such as those of documents from `embed`.
        out: folder of the store.
        hook_point: where the SAE reads; None is where it was trained. Leave it out for collected activations.
        mask: tokens to encode; None is the mask the SAE was trained with. Leave it out for collected activations.
        dtype: dtype of the stored values; float16 has a relative error of at most 2^-11 (absolute 2^-24 below 2^-14),
            and no non-zero code becomes 0.
        batch_size: sequences per forward pass (rows per step of collected activations); None is about 4096 tokens'
            worth.
        shard_tokens: rows per shard.
        allow_mismatch: accept a model, weight processing or hook point that differs from the SAE's training.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.
        mesh: `DeviceMesh` of processes that harvest together, each of which calls this with the same arguments; None is
            this process alone. Each encodes a share of the rows, and `out`, which all must see, ends with the bytes
            that one process writes. An interrupted call goes on with as many processes. Where the mask has a norm rule,
            the disk must have room for the codes twice.

    Raises:
        ValueError: where an SAE was trained on something else or has no threshold yet, for masks that differ between
            SAEs, activations that are not finite, values beyond float16's 65504, and a folder begun with other
            arguments or by another number of processes.
        OSError: where the disk is full or not writable.
        RuntimeError: where another process failed.

    >>> model, sae = sl.lm.tiny_model(), sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4)))
    >>> tokens = sl.tokenize(model, ["Once upon a time there was a cat."] * 8, ctx_len=16)
    >>> import tempfile
    >>> harvest(sae, model, tokens, tempfile.mkdtemp(), hook_point="blocks.1.hook_out", progress=False).l0
    4.0
    """
    model = model if model is None else as_model(model)
    ranks = RankGrid.of(mesh)
    named = {"": saes} if isinstance(saes, SAE) else dict(saes)
    with ranks.together():
        if not named or shard_tokens < 1:
            raise ValueError(f"`saes` and `shard_tokens` must be at least one, got {len(named)} and {shard_tokens}.")
        source, at = _find_source(named, model, tokens, hook_point, mask, batch_size, allow_mismatch)
    ranks.require_equal({"kind of source": type(source).__name__, "names of SAEs": list(named)})
    if isinstance(source, TextSource):
        source.calibrate(ranks)
    with ExitStack() as stack:
        jobs = [
            _Job.start(sae, at[name], source, Path(out) / name, dtype, shard_tokens, resume, ranks, stack)
            for name, sae in named.items()
        ]
        _run(jobs, source, progress and ranks.is_first, ranks)
        stores = {name: FeatureStore.load(job.folder) for name, job in zip(named, jobs, strict=True)}
        return stores[""] if isinstance(saes, SAE) else stores


def _find_source(
    saes: Mapping[str, SAE],
    model: "Model | None",
    tokens: Tokens | Activations,
    hook_point: str | None,
    mask: TokenMask | None,
    batch_size: int | None,
    allow_mismatch: bool,
) -> tuple[HarvestSource, dict[str, str]]:
    """What is encoded, not calibrated yet, and the hook point of each SAE."""
    for sae in saes.values():
        require_threshold(sae)
        require_finite(sae)
    if not isinstance(tokens, Activations):
        return _read_text(saes, model, tokens, hook_point, mask, batch_size, allow_mismatch)
    if hook_point is not None or mask is not None:
        raise ValueError("`hook_point` and `mask` are those of the activations already; give them with tokens only.")
    for sae in saes.values():
        match_activations(sae, tokens, allow_mismatch)
    size = batch_size or FORWARD_TOKENS
    source = ActivationsSource(tokens, model, size) if tokens.payload is None else DocumentsSource(tokens, size)
    return source, dict.fromkeys(saes, tokens.hook_point)


def _read_text(
    saes: Mapping[str, SAE],
    model: "Model | None",
    tokens: Tokens,
    hook_point: str | None,
    mask: TokenMask | None,
    batch_size: int | None,
    allow_mismatch: bool,
) -> tuple[TextSource, dict[str, str]]:
    """Source that reads all the SAEs' hook points in one forward pass, and the hook point of each SAE."""
    if model is None:
        raise ValueError("`model` must be given to harvest from tokens, got None; only activations need none.")
    places = {name: match_model(sae, model, hook_point, mask, allow_mismatch) for name, sae in saes.items()}
    shared = _common_mask(places)
    hook_points = list(dict.fromkeys(place.hook_point for place in places.values()))
    if shared.max_norm_ratio is not None:  # a norm outlier among a transcoder's targets is dropped too
        hook_points = list(dict.fromkeys(name for place in places.values() for name in place.hook_points))
    reader = ActivationReader.make(model, tokens, hook_points, shared, torch.float32)
    at = dict(zip(hook_points, reader.hook_points, strict=True))
    medians = {at[name]: norm for place in places.values() for name, norm in place.median_norms.items() if name in at}
    if len(medians) == len(reader.hook_points):
        reader = replace(reader, median_norms=medians)
    n_seq = forward_size(tokens, batch_size)
    return TextSource(reader, tokens, n_seq), {name: at[place.hook_point] for name, place in places.items()}


def _common_mask(places: Mapping[str, Match]) -> TokenMask:
    masks = {place.mask for place in places.values()}
    if len(masks) > 1:
        raise ValueError(f"SAEs harvested together must share one mask, got {sorted(map(str, masks))}; give `mask`.")
    return masks.pop()


def sae_fingerprint(sae: SAE) -> str:
    """Hash of an SAE's weights, by which a store knows it; tensors go by the names they had in the first stores."""
    return fingerprint({name.replace("normalizer.", "normaliser."): x for name, x in sae.state_dict().items()})


def require_harvested(store: FeatureStore, sae: SAE) -> None:
    """Raise ValueError for an SAE other than the one whose codes a store holds, compared by a hash of its weights; a
    source of a crosscoder goes with the crosscoder's codes.

    A store that was converted from another tool's files records no hash: there only the number of features is compared.
    """
    recorded, made = store.manifest.request.get("sae"), sae_fingerprint(sae)
    whole = None if sae.whole is None or recorded == made else sae_fingerprint(sae.whole[0])
    if sae.cfg.d_sae != store.d_sae or recorded not in (None, made, whole):
        raise ValueError(
            f"`sae` must be the one that was harvested, {store.d_sae} features and fingerprint {recorded}, got "
            f"{sae.cfg.d_sae} and {made}. Give that one, or harvest again."
        )


@dataclass(eq=False)
class _Job:
    """One SAE and the folder that its codes are written to."""

    sae: SAE
    hook_point: str
    folder: Path
    manifest: FeatureManifest
    dtype: str
    shard_tokens: int

    @classmethod
    def start(
        cls,
        sae: SAE,
        hook_point: str,
        source: HarvestSource,
        folder: Path,
        dtype: str,
        shard_tokens: int,
        resume: bool,
        ranks: RankGrid,
        stack: ExitStack,
    ) -> "_Job":
        """A job whose folder the stack holds, where the store that is in it is continued."""
        with ranks.together():
            described = sae.describe()
            request = source.request() | {"sae": sae_fingerprint(sae), "hook_point": hook_point}
            request |= {"values": dtype, "shard_tokens": shard_tokens}
            fresh = FeatureManifest(
                d_sae=sae.cfg.d_sae,
                dtype=dtype,
                sae=described | {"name_or_path": relative_place(sae.name_or_path, folder)},
                source=repr(sae),
                request=request,
                provenance=source.origin(hook_point, 0, {}).to_dict(),
                payload=source.payload,
            )
        manifest = claim_together(folder, request, FeatureManifest, lambda: fresh, resume, ranks, stack)
        return cls(sae, hook_point, folder, manifest, dtype, shard_tokens)

    @property
    def done(self) -> bool:
        """Whether the store is finished."""
        return self.manifest.complete

    def writer(self) -> ShardWriter:
        """Writer of this job's shards."""
        return ShardWriter(self.folder, self.manifest, self.shard_tokens, (self.buffer(), self.buffer()))

    def buffer(self) -> "_CodesBuffer":
        """An empty buffer for a shard."""
        return _CodesBuffer(self.sae.cfg.d_sae, self.dtype, self.manifest.payload is not None)

    def encode(self, batch: Batch) -> "_Codes":
        """Sparse codes of a batch."""
        codes = self.sae.encode_sparse(batch.acts[self.hook_point].to(self.sae.device))
        return _Codes(codes, batch.places, batch.pixels)

    def finish(self, writer: ShardWriter, source: HarvestSource) -> Steps:
        """Write remaining rows, the text and the statistics."""
        writer.flush()
        assert isinstance(writer.manifest, FeatureManifest)
        files: dict[str, str] = {}
        yield from self.add_files(writer.manifest, source, files)
        writer.finish(source.origin(self.hook_point, writer.n_tokens, dict(writer.removed)), files=files)

    def add_files(self, manifest: FeatureManifest, source: HarvestSource, files: dict[str, str]) -> Steps:
        """Write the text and the statistics of all shards, a shard per step, and add their checksums to `files`."""
        store = FeatureStore(self.folder, manifest, manifest.check_shards(self.folder))
        found = FeatureStatistics.zeros(manifest.d_sae)
        for _, arrays in store.shards():
            found.add(arrays["feature_offsets"], arrays["feature_values"])
            yield
        files |= save_statistics(self.folder, found) | source.text().save(self.folder)


@dataclass(eq=False)
class _Part(_Job):
    """The share of a job that one of several processes has."""

    n_first: int
    """rows of the first shard"""

    def writer(self) -> ShardWriter:
        """Writer of the part's shards."""
        buffers = (self.buffer(), self.buffer())
        return ShardWriter(self.folder, self.manifest, self.shard_tokens, buffers, self.n_first)

    def finish(self, writer: ShardWriter, source: HarvestSource) -> Steps:
        """Write remaining rows; the text and the statistics are those of all parts."""
        writer.finish(source.origin(self.hook_point, writer.n_tokens, dict(writer.removed)))
        yield


def _run(jobs: list[_Job], source: HarvestSource, progress: bool, ranks: RankGrid) -> None:
    """Write the folders that are not finished, with the other processes where there are several."""
    left = [job for job in jobs if not job.done]
    if ranks.alone:
        run_together(_encode(left, source, range(source.n_items), progress), ranks)
    else:
        _run_shared(left, source, progress, ranks)


def _encode(jobs: list[_Job], source: HarvestSource, share: range, progress: bool) -> Steps:
    """Write the codes of a share of the items that are not written yet, a batch per step, and finish the folders."""
    from tqdm.auto import tqdm

    with ExitStack() as stack:
        writers = [stack.enter_context(job.writer()) for job in jobs]
        first = min((writer.next_seq for writer in writers), default=share.stop)
        whole, done = source.count(share.start, share.stop), source.count(share.start, first)
        bar = tqdm(total=whole, initial=done, unit=" tokens", unit_scale=True, disable=hidden(progress))
        stack.enter_context(bar)
        starts = range(first, share.stop, source.size)
        batches = stack.enter_context(closing(source.read_all(starts)))
        for start, batch in zip(starts, batches, strict=True):
            n_items = min(source.size, share.stop - start)
            for job, writer in zip(jobs, writers, strict=True):
                if start >= writer.next_seq:
                    writer.add(job.encode(batch), len(batch.places), n_items, batch.removed)
            bar.update(source.count(start, start + n_items))
            yield
        for job, writer in zip(jobs, writers, strict=True):
            yield from job.finish(writer, source)


def _run_shared(jobs: list[_Job], source: HarvestSource, progress: bool, ranks: RankGrid) -> None:
    """Write this process's part of each job, and with the others the folders."""
    size = source.n_items, source.size
    folders = [SharedFolder(job.folder, job.manifest, ranks, *size, job.shard_tokens) for job in jobs]

    def write_parts() -> Steps:
        with ExitStack() as stack:
            parts = []
            for job, shared in zip(jobs, folders, strict=True):
                part, n_first = stack.enter_context(shared.claim_part()), shared.first_tokens(source.count_rows)
                parts.append(_Part(job.sae, job.hook_point, shared.part, part, job.dtype, job.shard_tokens, n_first))
            begun = min((shared.share.start for shared in folders), default=0)
            share = range(begun, folders[0].share.stop if folders else 0)
            yield from _encode([part for part in parts if not part.done], source, share, progress)

    run_together(write_parts(), ranks)
    for job, shared in zip(jobs, folders, strict=True):
        _finish_shared(job, shared, shared.join(job.buffer()), source)


def _finish_shared(
    job: _Job, shared: SharedFolder[FeatureManifest], made: FeatureManifest, source: HarvestSource
) -> None:
    """Write the text, the statistics and the manifest of a folder whose shards are there, in the first process."""

    def write() -> Steps:
        files: dict[str, str] = {}
        yield from job.add_files(made, source, files)
        n_entries = sum(file.specs["latents"].shape[0] for file in made.check_shards(job.folder))
        origin = source.origin(job.hook_point, made.n_tokens, made.removed).to_dict()
        shared.finish(replace(made, complete=True, files=files, n_entries=n_entries, provenance=origin))

    run_together(write() if shared.ranks.is_first else (_ for _ in ()), shared.ranks)


@dataclass(frozen=True, eq=False)
class _Codes:
    """Sparse codes of a batch and the indices of its rows in the text."""

    codes: SparseCodes
    places: Int64[Tensor, "n"]
    pixels: UInt8[Tensor, "n height width channels"] | None = None


class _CodesBuffer:
    """Codes of the next shard, in the shard's dtypes."""

    def __init__(self, d_sae: int, dtype: str, of_documents: bool = False) -> None:
        self._d_sae, self._dtype, self._of_documents = d_sae, dtype, of_documents
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, reading: _Codes | TensorFile, start: int, stop: int) -> None:
        """Append the codes of rows `start:stop` of a batch, or of a shard."""
        if isinstance(reading, TensorFile):
            self._parts.append(_read_codes(reading, start, stop))
            return
        codes, offsets = reading.codes, reading.codes.offsets[start : stop + 1].cpu()
        part = slice(int(offsets[0]), int(offsets[-1]))
        latents = codes.indices[part].cpu().numpy().astype(smallest_int(self._d_sae - 1))
        values = round_values(codes.values[part].float().cpu().numpy(), self._dtype)
        places = reading.places[start:stop].numpy().astype(np.int32)
        counts = offsets.diff().numpy()
        part_of = {"latents": latents, "values": values, "places": places, "counts": counts}
        self._parts.append(part_of | ({} if reading.pixels is None else {"pixels": reading.pixels[start:stop].numpy()}))

    def take(self) -> dict[str, Tensor]:
        """Tensors of a shard of the rows added since the last call."""
        parts, self._parts = self._parts, []
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        offsets = np.concatenate([[0], np.cumsum(whole["counts"])]).astype(np.int32)
        packed = pack_codes(offsets, whole["latents"], whole["values"], self._d_sae)
        if self._of_documents:
            del packed["feature_values"]
        packed |= {name: whole[name] for name in ("places", "pixels") if name in whole}
        return {name: torch.from_numpy(array) for name, array in packed.items()}


def _read_codes(shard: TensorFile, start: int, stop: int) -> dict[str, np.ndarray]:
    """Codes of rows `start:stop` of a shard."""
    offsets = read_rows(shard, "offsets", start, stop + 1).numpy()
    entries = int(offsets[0]), int(offsets[-1])
    codes = {name: read_rows(shard, name, *entries).numpy() for name in ("latents", "values")}
    if "pixels" in shard.specs:
        codes["pixels"] = read_rows(shard, "pixels", start, stop).numpy()
    return {**codes, "places": read_rows(shard, "places", start, stop).numpy(), "counts": np.diff(offsets)}


@torch.no_grad()
def harvest_untrained(
    store: FeatureStore,
    sae: SAE,
    model: AnyModel | Activations,
    out: str | Path,
    *,
    seed: int = 0,
    dtype: ValueDtype = "float16",
    allow_mismatch: bool = False,
    progress: bool = True,
    resume: bool = True,
    mesh: Any = None,
) -> FeatureStore:
    """Feature store with the same rows as `store`, encoded by an untrained SAE of the same shape as `sae`.

    The untrained SAE has the same configuration and number of active codes (`make_untrained`). The result is the
    baseline for `compare(..., untrained=)`, `label_by_rules(..., untrained=)`, `explain_features(..., untrained=)` and
    `probe_features(..., untrained=)`. The text is the store's own; the cost is a forward pass over it. An interrupted
    call continues where it stopped when it is made again.

    Args:
        store: feature store of the trained SAE.
        sae: the SAE that `store` was harvested with.
        model: its language model; of a store of documents the activations that were harvested.
        out: folder of the new store.
        seed: seed of the untrained SAE's weights.
        dtype: dtype of the stored values, as in `harvest`.
        allow_mismatch: accept a model, weight processing or hook point that differs from the SAE's training.
        progress: whether to show a progress bar.
        resume: continue an interrupted call; False deletes what `out` holds and starts over.
        mesh: `DeviceMesh` of processes that encode a share of the rows each, as in `harvest`; None is this process
            alone.

    Raises:
        ValueError: as `harvest`, for an SAE that is not the store's, and for a store whose text is not kept in whole
            rows (a row that lacks a token before its last one).
        RuntimeError: where another process failed.
    """
    source_model = model if isinstance(model, Activations) else as_model(model)
    ranks = RankGrid.of(mesh)
    with ranks.together():
        require_harvested(store, sae)
        made, source, place = _find_untrained(store, sae, source_model, seed, allow_mismatch)
        made.name_or_path = f"untrained, seed {seed}"
    with ExitStack() as stack:
        job = _Job.start(made, place, source, Path(out), dtype, SHARD_TOKENS, resume, ranks, stack)
        _run([job], source, progress and ranks.is_first, ranks)
        return FeatureStore.load(out)


def _find_untrained(
    store: FeatureStore, sae: SAE, model: Model | Activations, seed: int, allow_mismatch: bool
) -> tuple[SAE, HarvestSource, str]:
    """The untrained SAE, the rows that it encodes, and the hook point where it reads."""
    if isinstance(model, Activations):
        match_activations(sae, model, allow_mismatch)
        wanted, given = store.provenance.tokens_sha256, model.provenance
        if not store.of_documents or given is None or given.tokens_sha256 != wanted or len(model) != len(store):
            raise ValueError(
                f"`model` must be the activations of the store's {len(store)} documents, got {model!r}. Give the model "
                "for a store of tokens."
            )
        made = make_untrained(sae, model[: min(SAMPLE_TOKENS, len(model))].float(), None, seed=seed)
        return made, DocumentsSource(model, FORWARD_TOKENS), model.hook_point
    if store.of_documents:
        raise ValueError("`model` must be the activations that `embed` made for a store of documents, got a model.")
    place = match_model(sae, model, store.provenance.hook_point or None, EVERYTHING, allow_mismatch)
    tokens = rebuild_tokens(store.text)
    reader = ActivationReader.make(
        model, tokens, place.hook_points[: 1 if sae.cfg.d_out is None else 2], EVERYTHING, torch.float32
    )
    source = SameRowsSource(reader, tokens, max(1, FORWARD_TOKENS // tokens.ctx_len), store.places)
    x = source.sample(SAMPLE_TOKENS)
    targets = x[reader.hook_points[1]] if sae.cfg.d_out is not None and len(reader.hook_points) > 1 else None
    made = make_untrained(sae, x[reader.hook_points[0]], targets, seed=seed)
    return made, source, reader.hook_points[0]
