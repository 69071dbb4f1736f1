"""`SAE`, a sparse autoencoder or transcoder, and `fit`, which trains several on the same batches."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.autocast import computing_in
from saelab.sae.activation_functions import AbsJumpReLU, GroupMax, JumpReLU
from saelab.sae.activation_registry import Activation
from saelab.sae.adapters import SAEBenchSAE
from saelab.sae.config import SAEConfig
from saelab.sae.fitting import (
    Data,
    HeldOut,
    check_processes,
    cut_to,
    describe_training,
    finish_run,
    join_states,
    make_run,
    match_thresholds,
    mean_l0,
    open_data,
    origin_of,
)
from saelab.sae.formats.origin import Origin, SAEFacts
from saelab.sae.formats.registry import OWN, find_format, require_room, write_foreign
from saelab.sae.formats.sources import SAEFiles
from saelab.sae.module import SAEModule
from saelab.sae.pretrained import check_config, fill, load, locate, on_meta, write_sae
from saelab.sae.publishing import push
from saelab.sae.sharding import put_together, take_share
from saelab.sae.source_views import cut_source
from saelab.stores.files import read_settled
from saelab.stores.hub import HubAccess, Upload
from saelab.stores.jobs import hold_folder
from saelab.stores.manifest import Provenance
from saelab.stores.results import Result
from saelab.stores.sharing import shareable
from saelab.stores.validation import naming
from saelab.training.config import TrainConfig
from saelab.training.loop import HistoryEntry, Sink, train
from saelab.training.ranks import RankGrid


class SAE(SAEModule):
    """A sparse autoencoder: `x_hat = unnormalize(z W_dec + b_dec)`,
    `z = activation((normalize(x) - b_dec) W_enc + b_enc)`.

    Every variant is this class with another `SAEConfig`; with `d_out` it is a transcoder, see `SAEModule` for its
    formula. Weights are float32, drawn from `seed`.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=8, activation=sl.AbsTopK(k=2)), seed=0)
    >>> sae.encode(torch.ones(3, 4)).count_nonzero(dim=1).tolist()
    [2, 2, 2]
    """

    def __init__(self, cfg: SAEConfig, seed: int | None = 0, latents: range | None = None) -> None:
        super().__init__(cfg, seed, latents)
        self.provenance: Provenance | None = None
        self.origin: Origin | None = None  # of an SAE that was read from another library's files
        self.placed = False  # whether its weights are what training is to start from
        self.training_: dict[str, Any] | None = None
        self.history_: list[HistoryEntry] = []
        self.name_or_path = ""  # where it was loaded from or saved to
        self.whole: tuple[SAE] | None = None  # the crosscoder that it is a source of; in a tuple as it is no submodule

    def fit(
        self,
        acts: Data,
        cfg: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        held_out: HeldOut | None = None,
        sinks: Sequence[Sink] = (),
        progress: bool = True,
        mesh: Any = None,
    ) -> "SAE":
        """Train on activations and return self; the losses are in `history_`, the settings in `training_`.

        Ctrl-C and SIGTERM save a checkpoint and report where.

        Args:
            acts: activations from `collect` or `stream`, or a plain tensor (n, d_in). For a transcoder (inputs,
                targets) of the same tokens, each collected activations or a tensor; or a stream of pairs.
            cfg: training configuration; None is `TrainConfig()`.
            out: folder for history and checkpoints; None writes nothing.
            resume: continue from the last checkpoint in `out`, on a CPU with the same number of threads bit for bit.
            held_out: activations to measure FVU on; None holds out the last tokens of `acts`, except of a stream.
            sinks: loggers that receive each entry of the history.
            progress: whether to show a progress bar.
            mesh: `DeviceMesh` of the processes that train together, see `sl.fit`; None is this one alone.

        Raises:
            ValueError: for widths that differ, pairs that are not of the same tokens, too little data, a folder that
                does not go with `resume`, and a mesh that does not divide latents and batches.
        """
        fit([self], acts, cfg, out=out, resume=resume, held_out=held_out, sinks=sinks, progress=progress, mesh=mesh)
        return self

    def save_pretrained(self, folder: str | Path, format: str = "saelab") -> None:
        """Write `config.json` and `model.safetensors` into a folder, or the files of another library.

        An SAE that was loaded from that library's files and is unchanged is written as it was, bit for bit; otherwise a
        normalizer is folded into the weights, and BatchTopK becomes a threshold.

        Args:
            folder: folder to write to; made if need be.
            format: "saelab", "saelens", "sparsify", "dictionary_learning", "circuit_tracer" or "overcomplete".

        Raises:
            ValueError: with the reason, for an SAE that the other library's format cannot express, and for a folder
                that holds an SAE of another format.
        """
        require_room(Path(folder), format)
        if format != "saelab":
            write_foreign(Path(folder), self, self.provenance, self.origin, format)
            return
        write_sae(Path(folder), self.describe(), self.state_dict(), self.origin)
        self.name_or_path = str(folder)

    def describe(self) -> dict[str, Any]:
        """Configuration, provenance of the activations and training record as a dictionary for JSON."""
        origin = self.provenance.to_dict() if self.provenance else None
        return {"config": self.cfg.to_dict(), "provenance": origin, "training": self.training_}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        name: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        latents: Sequence[int] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        format: str | None = None,
        model: str | None = None,
        hook_point: str | None = None,
        hook_point_out: str | None = None,
        weight_processing: str | None = None,
        activation: Activation | None = None,
        threshold: float | None = None,
        scale: float | None = None,
    ) -> "SAE":
        """Load an SAE or transcoder of any supported format; its codes and reconstructions equal those of the library
        that wrote it.

        The format is detected from the files: saelab, saelens (also from before 6.0), sparsify, dictionary_learning,
        gemma_scope, gemma_scope_2, llama_scope, openmoss, openai, qwen_scope, circuit_tracer, overcomplete. Facts that
        a file leaves out have to be given; those given override the file's. Weights may lie in several files with an
        index. Files are memory-mapped, shapes checked before weights are read, and nothing is executed.

        Args:
            source: folder or file, Hub id `owner/name`, or a release: see `sl.list_releases`.
            name: sub-folder or file in it, or the release's SAE id.
            device: device of the weights; None is the CPU.
            dtype: dtype of the weights.
            latents: indices of the latents to load, in that order, where their codes do not depend on the others; None
                is all.
            revision: branch, tag or commit on the Hub; None is the default branch.
            token: Hub access token; None uses the stored login.
            cache_dir: folder that downloads are kept in; None is Hugging Face's.
            local_files_only: whether to look in that folder alone and fetch nothing.
            format: one of the formats above, where a folder holds several; None detects it.
            model: name of the model that the SAE is for.
            hook_point: hook point that it reads.
            hook_point_out: hook point that a transcoder writes.
            weight_processing: processing of the model's weights in training, "none" or "folded".
            activation: activation function with its k.
            threshold: threshold of inference.
            scale: factor by which activations are multiplied before the encoder.

        Raises:
            FileNotFoundError: where there is nothing, or the Hub cannot be reached.
            ValueError: for files of no known format or of two, that are damaged, that do not fit their configuration,
                or that leave out a fact which was not given.
        """
        overrides = SAEFacts(
            model=model,
            hook_point=hook_point,
            hook_point_out=hook_point_out,
            weight_processing=weight_processing,
            activation=activation,
            threshold=threshold,
            scale=scale,
        )
        hub = HubAccess(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        place, overrides = locate(source, name, hub, overrides)
        sae = read_settled(place.folder, lambda: cls._load(place, overrides, format, latents, dtype))
        sae.name_or_path = str(source) if name is None else f"{source}/{name}"
        return sae.to(device) if device is not None else sae

    @classmethod
    def _load(
        cls,
        source: SAEFiles,
        overrides: SAEFacts,
        format: str | None,
        latents: Sequence[int] | None,
        dtype: torch.dtype,
    ) -> "SAE":
        """SAE of the tensors in a folder or file, without drawing random weights first."""
        format = find_format(source, format)
        cfg, tensors, provenance, training, origin = load(source, overrides, format, latents, dtype)
        with naming(source.place), on_meta():
            sae = cls(cfg, seed=None)
        fill(sae, tensors, source.place)
        if format == OWN:
            check_config(source.folder)  # last, as the other messages are more precise
        sae.provenance, sae.training_, sae.origin = provenance, training, origin
        sae.placed = origin is not None  # trained elsewhere, so that `fit` goes on from there
        return sae

    def push_to_hub(
        self,
        repo_id: str,
        *,
        format: str = "saelab",
        evaluation: Result | None = None,
        path_in_repo: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload SAE",
        create_pr: bool = False,
        private: bool = False,
        token: str | bool | None = None,
    ) -> str:
        """Upload the files and a model card to a Hub repository, created if need be; returns the commit's address.

        A repository may hold several SAEs, each in a folder for `from_pretrained(repo_id, path_in_repo)`.

        Args:
            repo_id: 'owner/name' on the Hub.
            format: format of the files, as in `save_pretrained`.
            evaluation: result of `evaluate`, shown on the card; None leaves it out.
            path_in_repo: folder in the repository; None is its top.
            revision: branch, made if need be; None is the default branch.
            commit_message: message of the commit.
            create_pr: whether to open a pull request instead; its address is returned.
            private: whether a new repository is private.
            token: Hub access token; None uses the stored login.
        """
        to = Upload(repo_id, path_in_repo, revision, commit_message, create_pr, private, token)
        known_as = self.name_or_path
        try:
            return push(self, lambda folder: self.save_pretrained(folder, format), to, format, evaluation)
        finally:
            self.name_or_path = known_as  # not the folder that the files were in on their way

    def for_saebench(self) -> SAEBenchSAE:
        """The same SAE with the attributes and methods that SAEBench expects, rows of W_dec at unit length.

        Raises:
            ValueError: for a transcoder, for an SAE without provenance, and for a normalizer with per-token statistics.
        """
        return SAEBenchSAE(self, self.provenance, (self.training_ or {}).get("n_tokens_seen"))

    def fold(self) -> "SAE":
        """An equal SAE without a normalizer: same codes, same reconstructions; its dictionary rows are no longer of
        unit norm. See `SAEModule.fold`.
        """
        folded = super().fold()
        assert isinstance(folded, SAE)
        return folded

    @torch.no_grad()
    def with_k(self, k: int, sample: Float[Tensor, "n d_in"] | None = None) -> "SAE":
        """The same SAE that keeps another k in inference; weights are shared, so that training one changes both.

        Reconstructions are good at several k where training asked for it (`HierarchicalLoss`, `MultiTopKLoss`), and
        otherwise near the k trained with; such a term is left out of the configuration where k is beyond those that it
        was trained at. A batch activation keeps what is above a threshold, which has to be found on
        a sample for each k.

        Args:
            k: latents to keep per token; for a batch activation on average.
            sample: (n, d_in) activations on which BatchTopK's threshold is set; not read by TopK.

        Raises:
            ValueError: for an activation that does not keep the k largest, a k out of range, and BatchTopK without a
                sample.

        >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)), seed=0)
        >>> sae.with_k(2).encode_sparse(torch.ones(1, 8)).l0.tolist()
        [2]
        """
        activation = self.cfg.activation
        if not hasattr(activation, "k") or isinstance(activation, GroupMax):
            raise ValueError(f"`with_k` must be given an SAE that keeps the k largest, as TopK does, got {activation}.")
        threshold = activation.threshold == "running"
        if threshold and (sample is None or len(sample) == 0):
            raise ValueError(f"`sample` must hold activations to set the threshold of {activation} on, got none.")
        other = self._with_activation(replace(activation, k=k))  # type: ignore[call-arg]
        if other.threshold is not None and self.threshold is not None:
            other.threshold.copy_(self.threshold)
        if threshold and sample is not None and not cut_to(other, sample, float(k)):
            raise ValueError(
                f"The threshold must be trained and reach an L0 of {k} on the sample, got {self.threshold}."
            )
        return other

    def source(self, name: str) -> "SAE":
        """An SAE of one source of a crosscoder: its encoder, decoder rows, bias and normalizer, copied. Rows of W_dec
        are no longer of unit norm.

        What its features write is what they write there, so steering, direct logit effects and reports work as with any
        SAE. Of a crosscoder that encodes from "any" source it has the codes of that source; of one that encodes from
        "all" it has the crosscoder's codes where the other sources are at their bias, and so fires less. Stores of the
        crosscoder's own codes go with it: `store.at_source(name)`.

        Args:
            name: name of the source.

        Raises:
            ValueError: for an SAE of one source, and for a name that is none of its sources.

        >>> two = tuple(sl.stores.JoinedSource(name=name, d_in=4) for name in "ab")
        >>> sl.SAE(sl.SAEConfig(d_in=8, d_sae=16, sources=two, activation=sl.TopK(k=2)), seed=0).source("a")
        SAE(TopK(k=2), d_in=4, d_sae=16)
        """
        cfg, held = cut_source(self, name)
        other = self._share(cfg, held)
        joined = self.provenance is not None and self.provenance.sources is not None
        other.provenance = self.provenance.at_source(name) if joined and self.provenance is not None else None
        other.whole = (self,)
        return other

    @torch.no_grad()
    def prune(self, tau: float = 0.1) -> "SAE":
        """The same SAE that in inference drops codes which the reconstruction hardly needs; weights are shared.

        In every token the code whose removal raises the squared error least is dropped, again and again, while that
        raises it by less than `tau` times what it was at first; codes that are kept stay as they are. Formula:
        `saelab.functional.needed_codes`. A step of the LISTA-Matryoshka recipe, see `MatryoshkaLoss`. It is `pruning`
        in config.json, and not used in training.

        Args:
            tau: relative rise of the error; 0 drops only codes that make it larger.

        Raises:
            ValueError: for a negative `tau`, and for a transcoder, whose error is not known in inference.

        >>> sae, x = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)), seed=0), torch.eye(8)
        >>> sae.prune(0.5).encode_sparse(x).l0.sum() < sae.encode_sparse(x).l0.sum()
        tensor(True)
        """
        return self._share(replace(self.cfg, pruning=tau), self.state_dict())

    def to_jumprelu(self, sample: Float[Tensor, "n d_in"], target_l0: float | None = None) -> "SAE":
        """The same SAE as a JumpReLU (signed: `AbsJumpReLU`) with a threshold for each latent; weights are shared.

        Where latents compete (TopK) each gets the threshold at which it fires for as many tokens of the
        sample as before, so that the mean L0 stays, though a token's does not. BatchTopK's one threshold and Gated's
        own are kept, and so are all codes. Loss terms that go with the activation before alone are left out of the
        configuration. Files and tools that know JumpReLU alone can then use it.

        Args:
            sample: (n, d_in) activations to find thresholds on, many more tokens than latents.
            target_l0: mean L0 on the sample, reached by a common factor of all thresholds; None keeps it.

        Raises:
            ValueError: for a pursuit and GroupMax, whose latents take each other's place, for an activation whose codes
                are not pre-activations or 0, for an empty sample, and for a target that no factor reaches.

        >>> sae = sl.SAE(sl.SAEConfig(d_in=8, d_sae=32, activation=sl.TopK(k=4)), seed=0)
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> sae.to_jumprelu(x).encode_sparse(x).l0.float().mean()
        tensor(4.)
        """
        if self.cfg.pruning is not None:
            raise ValueError("`to_jumprelu` must be given an SAE without pruning, which no thresholds do; prune after.")
        if self.cfg.encoder != "linear" or isinstance(self.cfg.activation, GroupMax):
            raise ValueError(
                "`to_jumprelu` must be given an SAE whose latents are chosen by pre-activations alone, got "
                f"{self.cfg.activation if self.cfg.encoder == 'linear' else self.cfg.encoder}."
            )
        if len(sample) == 0:
            raise ValueError("`sample` must hold activations to find thresholds on, got none.")
        if target_l0 is not None and not 0 < target_l0 <= self.cfg.d_sae:
            raise ValueError(f"`target_l0` must be above 0 and at most d_sae ({self.cfg.d_sae}), got {target_l0}.")
        if not self._passes_on(sample[:256].to(self.W_dec)):
            raise ValueError(
                f"`to_jumprelu` must be given an SAE whose codes are its pre-activations where they are not 0, got "
                f"{self.cfg.activation}, which changes them."
            )
        threshold, l0 = match_thresholds(self, sample), target_l0 or mean_l0(self, sample)
        kind = AbsJumpReLU if self.cfg.activation.signed else JumpReLU
        other = self._with_activation(kind(target_l0=max(l0, 1e-6)))
        with torch.no_grad():
            assert other.threshold is not None
            other.threshold.copy_(threshold)
        if target_l0 is not None and not cut_to(other, sample, target_l0):
            raise ValueError(f"`target_l0` must be reached by a factor on all thresholds, got {target_l0}.")
        return other

    @torch.no_grad()
    def _passes_on(self, x: Float[Tensor, "n d_in"]) -> bool:
        """Whether codes are pre-activations or 0, on some tokens."""
        z, u = self.encode(x), self.center(x) @ self.W_enc + self.b_enc
        return torch.allclose(z, torch.where(z != 0, u, 0.0), rtol=1e-3, atol=1e-4 * float(u.abs().max()))

    def _with_activation(self, activation: Activation) -> "SAE":
        """The same weights, shared, with another activation, whose threshold is not set. Loss terms that go with the
        activation before alone are left out.
        """
        held = {name: t for name, t in self.state_dict().items() if name not in ("threshold", "r_mag", "b_gate")}
        if (threshold := activation.initial_threshold(self.cfg.d_sae)) is not None:
            held["threshold"] = torch.full(threshold.shape, torch.nan, device=self.device)
        return self._share(self.cfg.adapt(activation=activation), held)

    def _share(self, cfg: SAEConfig, held: dict[str, Tensor]) -> "SAE":
        """An SAE of another configuration that has these tensors as its weights."""
        with on_meta():
            other = type(self)(cfg, seed=None)
        other.load_state_dict(held, assign=True)
        other.provenance, other.name_or_path = self.provenance, self.name_or_path
        figures = ("last", "saved")  # measured with the activation before
        other.training_ = self.training_ and {n: v for n, v in self.training_.items() if n not in figures}
        return other

    def __repr__(self) -> str:
        cfg = self.cfg
        nested = f", prefixes={cfg.prefixes}" if cfg.prefixes else ""
        widths = f"d_in={cfg.d_in}, d_sae={cfg.d_sae}" + (f", d_out={cfg.d_out}" if cfg.d_out else "")
        widths += f", sources={'+'.join(source.name for source in cfg.sources)}" if cfg.sources else ""
        more = (", skip" if cfg.skip else "") + (f", {cfg.encoder}" if cfg.encoder != "linear" else "")
        more += f", pruned by {cfg.pruning:g}" if cfg.pruning is not None else ""
        at = f", {self.provenance.place} of {shareable(self.provenance.model)}" if self.provenance else ""
        return f"SAE({cfg.activation}, {widths}{more}{nested}{at})"


def fit(
    saes: Sequence[SAE],
    acts: Data,
    cfg: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    held_out: HeldOut | None = None,
    sinks: Sequence[Sink] = (),
    progress: bool = True,
    mesh: Any = None,
) -> list[SAE]:
    """Train several SAEs on the same batches in one pass, each exactly as it would be trained alone; returns them.

    Where one has a loss term of neighboring tokens, the batches of all are pairs of neighbors.

    In the history, entries of the i-th SAE start with `i/`.

    Args:
        saes: the SAEs; their widths must be the activations'.
        acts: activations to train on, as in `SAE.fit`.
        cfg: training configuration shared by all; None is `TrainConfig()`.
        out: folder for history and checkpoints; None writes nothing.
        resume: continue from the last checkpoint in `out`, on a CPU with the same number of threads bit for bit.
        held_out: activations to measure FVU on; None holds out the last tokens of `acts`, except of a stream.
        sinks: loggers that receive each entry of the history.
        progress: whether to show a progress bar.
        mesh: `DeviceMesh` of processes that train together, each of which calls this with the same arguments; None is
            this process alone. Its axis "data" divides every batch, its axis "latents" the latents, with their
            gradients and moments; both give the result of one process. All processes return the whole SAEs, but of
            those that were made as shares (`SAE(..., latents=)`) the first alone. Where a process fails, the SAEs of
            the others are not whole.

    Raises:
        ValueError: as `SAE.fit`.
    """
    acts, cfg = open_data(acts), cfg or TrainConfig()
    ranks = RankGrid.of(mesh)
    check_processes(saes, acts, cfg, out, ranks)
    with ExitStack() as held:
        for kind in {sae.device.type for sae in saes}:
            held.enter_context(computing_in(None, kind))
        if out is not None:
            ranks.on_first(lambda: held.enter_context(hold_folder(out)))
        made_as_shares = [take_share(sae, ranks) for sae in saes]
        run = make_run(saes, acts, cfg, held_out, out, resume, ranks)
        try:
            train(run, resume=resume, sinks=sinks, progress=progress)
        finally:
            # of a process that failed no other would answer
            for sae in saes if run.stopped or run.step == cfg.n_steps else ():
                put_together(sae, ranks, to_first=any(made_as_shares))
        join_states(run)
        if any(made_as_shares) and not ranks.is_first:
            return list(saes)
        saved = finish_run(run, saes)
    for i, sae in enumerate(saes):
        sae.provenance, sae.training_, sae.history_ = origin_of(acts), describe_training(run, i, saved[i]), run.history
    return list(saes)
