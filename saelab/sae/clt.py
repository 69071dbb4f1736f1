"""`CLT`: a cross-layer transcoder that is trained, saved, loaded, and looked at layer by layer."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.functional.autocast import computing_in
from saelab.sae.activation_functions import BatchTopK, JumpReLU, ReLU
from saelab.sae.cross_layer import CLTConfig, CLTModule
from saelab.sae.fitting import MAX_TOKENS, hold_out, open_data, open_run
from saelab.sae.formats.circuit_tracer import LayerFiles, name_places, read_layers, write_layers
from saelab.sae.formats.registry import CIRCUIT_TRACER, CROSS_LAYER, require_room
from saelab.sae.pretrained import fill, on_meta
from saelab.sae.sae import SAE
from saelab.sae.training_clt import TrainingCLT, finish_clt
from saelab.stores.activations import ActivationPairs, Activations
from saelab.stores.files import await_settled, read_settled, replace_folder, save_tensors, write_json
from saelab.stores.jobs import hold_folder
from saelab.stores.manifest import Provenance
from saelab.stores.sharing import shareable
from saelab.stores.tensors import load_tensors
from saelab.stores.validation import SEAL, naming, read_json, read_sealed, refuse_unknown
from saelab.training.config import Batches, TrainConfig
from saelab.training.loop import HistoryEntry, Sink, TrainingRun, train
from saelab.training.prefetch import prefetch

SCHEMA_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMATS = ("saelab", CIRCUIT_TRACER)
BLOCK = re.compile(r"blocks\.(\d+)\.")
LayerData: TypeAlias = (
    Activations
    | ActivationPairs
    | Batches
    | tuple[Activations, Activations]
    | tuple[Float[Tensor, "n d_read"], Float[Tensor, "n d_written"]]
)
"""inputs of all layers side by side, and their outputs"""


class CLT(CLTModule):
    """A cross-layer transcoder: features of a layer read its MLP's input and write its output and all later ones.

        z_l = activation( normalize_l(x_l) W_enc_l + b_enc_l ),    y_hat_m = unnormalize_m( sum over l <= m of z_l
        W_dec_lm + b_dec_m )

    Inputs of all layers lie side by side, as `Activations.join` puts them, and so do outputs. What one latent computes
    and many layers write is one feature; with a transcoder for each layer it is one in every layer. What it does not
    tell: whether a later layer reads the same input or what an earlier one wrote, see `docs/how-to/trace.md`. Source:
    Circuit Tracing (transformer-circuits.pub/2025/attribution-graphs/methods.html).

    >>> clt = CLT(CLTConfig(n_layers=3, d_in=4, d_sae=16, activation=sl.TopK(k=2)), seed=0)
    >>> clt.encode(torch.ones(5, 12)).shape, clt(torch.ones(5, 12)).shape
    (torch.Size([5, 3, 16]), torch.Size([5, 12]))
    """

    def __init__(self, cfg: CLTConfig, seed: int | None = 0) -> None:
        super().__init__(cfg, seed)
        self.provenances: tuple[Provenance, ...] | None = None
        """origin of the pairs of each layer"""
        self.training_: dict[str, Any] | None = None
        self.history_: list[HistoryEntry] = []
        self.placed = False  # whether its weights are what training is to start from
        self.name_or_path = ""

    def fit(
        self,
        acts: LayerData,
        cfg: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        held_out: Float[Tensor, "n_held width"] | tuple[Activations, Activations] | None = None,
        sinks: Sequence[Sink] = (),
        progress: bool = True,
    ) -> "CLT":
        """Train on the activations of all layers in one pass and return self; losses are in `history_`, settings and
        what was measured of every layer in `training_`.

        L0 is that of all layers together, FVU the mean over layers.

        Args:
            acts: (inputs, targets): inputs of all layers joined in the order of the model, outputs likewise; or tensors
                with all layers side by side; or a stream of (input, target) of every layer, see `sl.stream`.
            cfg: training configuration; None is `TrainConfig()`.
            out: folder for history and checkpoints; None writes nothing.
            resume: continue from the last checkpoint in `out`, on a CPU with the same number of threads bit for bit.
            held_out: activations to measure FVU on; None holds out the last tokens of `acts`, except of a stream.
            sinks: loggers that receive each entry of the history.
            progress: whether to show a progress bar.

        Raises:
            ValueError: for layers that are missing, in another order or of other widths, inputs and targets that are
                not of the same tokens, too little data, and a folder that does not go with `resume`.
        """
        data, cfg = open_data(acts), cfg or TrainConfig()
        check_layers(self.cfg, data)
        with ExitStack() as held:
            held.enter_context(computing_in(None, self.device.type))
            if out is not None:
                held.enter_context(hold_folder(out))
            run = self._make_run(data, cfg, held_out, out, resume)
            train(run, resume=resume, sinks=sinks, progress=progress)
            others = run.peek(MAX_TOKENS) if run.held_out is None or len(run.held_out) == 0 else run.held_out[:0]
            saved = finish_clt(self, run.held_out, others)
        self.provenances, self.history_ = check_layers(self.cfg, data), run.history  # a stream has counted its tokens
        self.training_ = _describe_training(run, saved)
        return self

    def _make_run(
        self, acts: Any, cfg: TrainConfig, held_out: Any, out: str | Path | None, resume: bool
    ) -> TrainingRun:
        kept = None
        if held_out is not None:
            kept = held_out if isinstance(held_out, Tensor) else open_data(held_out)[:]  # type: ignore[index]
            due = self.cfg.n_layers * (self.cfg.d_in + self.cfg.d_target)
            if kept.shape[1:] != (due,):
                raise ValueError(
                    f"`held_out` must have the inputs of all layers with all outputs appended, of width {due}, got "
                    f"shape {tuple(kept.shape)}; give (inputs, targets) as for training."
                )
        batches = acts
        if not isinstance(acts, Batches):
            batches, kept = hold_out(acts, cfg, kept, neighbors=False)
            batches = prefetch(batches, self.device)
        return open_run(
            [TrainingCLT(self, cfg, self.placed or self.training_ is not None)], batches, cfg, kept, out, resume
        )

    def layer(self, number: int, writes: int | None = None, *, copy: bool = True) -> SAE:
        """The transcoder that a layer's latents are, with the normalizers folded in.

        It has the codes of that layer, so that its features are shown and counted as any transcoder's; it writes the
        layer's own output and all later ones side by side, or one of them. The reconstructions of all layers add up to
        the whole: a layer has the bias of its own output alone.

        Args:
            number: number of the layer, counted from the first that is read.
            writes: number of the layer whose output it writes; None is all, from its own on.
            copy: whether its weights are copies; else those that need no folding are this transcoder's own, and take no
                memory of their own.

        Raises:
            ValueError: for a layer that does not exist or that it does not write.

        >>> clt = CLT(CLTConfig(n_layers=3, d_in=4, d_sae=16, activation=sl.TopK(k=2)), seed=0)
        >>> clt.layer(1), clt.layer(0, writes=2)
        (SAE(TopK(k=2), d_in=4, d_sae=16, d_out=8), SAE(TopK(k=2), d_in=4, d_sae=16, d_out=4))
        """
        n, d = self.cfg.n_layers, self.cfg.d_target
        if not 0 <= number < n:
            raise ValueError(f"`number` must be in 0..{n - 1}, got {number}.")
        if writes is not None and not number <= writes < n:
            raise ValueError(f"`writes` must be in {number}..{n - 1}, as a layer writes no earlier one, got {writes}.")
        cfg, held = self.fold_layer(number, copy)
        if writes is not None:
            columns = slice((writes - number) * d, (writes - number + 1) * d)
            cfg = replace(cfg, d_out=d)
            held["W_dec"], held["b_dec"] = held["W_dec"][:, columns].clone(), held["b_dec"][columns].clone()
        sae = SAE(cfg, seed=None)
        sae.load_state_dict(held, assign=True)
        if self.provenances is not None:
            target = self.provenances[number if writes is None else writes]
            sae.provenance = replace(
                self.provenances[number],
                hook_point_out=target.hook_point_out,
                median_norm_out=target.median_norm_out,
            )
        sae.placed = self.placed or self.training_ is not None
        sae.name_or_path = f"{self.name_or_path}#layer {number}" if self.name_or_path else ""
        return sae

    @torch.no_grad()
    def fold(self) -> "CLT":
        """An equal transcoder without normalizers: the same codes and reconstructions from the weights alone. Rows of
        W_dec are no longer of unit norm.
        """
        parts = [self.fold_layer(i)[1] for i in range(self.cfg.n_layers)]
        other = type(self)(replace(self.cfg, normalizer="none", dictionary="free"), seed=None).to(self.b_dec)
        for layer, held in zip(other.layers, parts, strict=True):
            bias = held.pop("b_dec")
            layer.load_state_dict(held, assign=True)
            start = layer.cfg.d_target
            other.b_dec[len(other.b_dec) - start :][: self.cfg.d_target] = bias[: self.cfg.d_target]
        return self._describe_as(other)

    @torch.no_grad()
    def to_jumprelu(self, sample: Float[Tensor, "n d_read"]) -> "CLT":
        """The same transcoder as a JumpReLU (signed: `AbsJumpReLU`) with a threshold for each latent, at which it fires
        for as many tokens of the sample as before; circuit-tracer knows ReLU and JumpReLU alone.

        Args:
            sample: inputs of all layers side by side, many more tokens than latents of a layer.

        Raises:
            ValueError: as `SAE.to_jumprelu`, and for a sample of another width than that of all layers.

        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> clt = CLT(CLTConfig(n_layers=2, d_in=4, d_sae=16, activation=sl.TopK(k=2)), seed=0)
        >>> clt.to_jumprelu(x).encode(x).count_nonzero(2).float().mean(0)
        tensor([2., 2.])
        """
        self.require_inputs(sample)
        parts = sample.split(self.cfg.d_in, dim=-1)
        layers = [self.layer(i).to_jumprelu(x) for i, x in enumerate(parts)]
        first = layers[0].cfg.activation
        l0 = sum(layer.cfg.activation.penalty_target or 0 for layer in layers) / len(layers)
        activation = replace(first, target_l0=l0)  # type: ignore[call-arg]
        other = type(self)(replace(self.cfg, activation=activation), seed=None).to(self.b_dec)
        held = self.state_dict() | {f"layers.{i}.threshold": layer.threshold for i, layer in enumerate(layers)}
        other.load_state_dict(held)
        return self._describe_as(other)

    def _describe_as(self, other: "CLT") -> "CLT":
        other.provenances, other.training_, other.name_or_path = self.provenances, self.training_, self.name_or_path
        other.placed = self.placed
        return other

    @property
    def places(self) -> tuple[tuple[str, str], ...] | None:
        """Hook points that each layer reads and writes; None where unknown."""
        if self.provenances is None:
            return None
        return tuple((one.hook_point, one.hook_point_out or "") for one in self.provenances)

    def save_pretrained(self, folder: str | Path, format: str = "saelab") -> None:
        """Write `config.json` and `model.safetensors` into a folder, or circuit-tracer's files, which SAELens reads a
        layer at a time.

        Args:
            folder: folder to write to; made if need be.
            format: "saelab" or "circuit_tracer".

        Raises:
            ValueError: with the reason, for what the other format cannot express: codes that are chosen otherwise than
                by a threshold (see `to_jumprelu`), and layers that it has no names for; and for a folder that holds an
                SAE, or a cross-layer transcoder in the other format.
        """
        if format not in FORMATS:
            raise ValueError(f"`format` must be one of {list(FORMATS)}, got '{format}'.")
        require_room(Path(folder), CROSS_LAYER if format == "saelab" else format)
        if format == CIRCUIT_TRACER:
            write_layers(Path(folder), _name_layers(self))
            return
        origin = None if self.provenances is None else [one.to_dict() for one in self.provenances]
        described: dict[str, Any] = {"config": self.cfg.to_dict(), "provenance": origin, "training": self.training_}
        described |= {"placed": True} if self.placed else {}
        with replace_folder(folder, last=CONFIG, stale=(CONFIG, WEIGHTS)) as temp:
            save_tensors(temp / WEIGHTS, self.state_dict(), {"format": "pt"})
            write_json(temp / CONFIG, {"schema_version": SCHEMA_VERSION, "kind": CROSS_LAYER, **described}, sealed=True)
        self.name_or_path = str(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        model: str | None = None,
        weight_processing: str = "none",
    ) -> "CLT":
        """Load a cross-layer transcoder from a folder that saelab, circuit-tracer, or what exports to circuit-tracer
        (crosslayer-transcoder, CLT-Forge) wrote.

        Args:
            folder: the folder.
            device: device of the weights; None is the CPU.
            dtype: dtype of the weights.
            model: name of the model, where circuit-tracer's `config.yaml` is missing or of another.
            weight_processing: processing of the model's weights in training, of circuit-tracer's files.

        Raises:
            FileNotFoundError: where there is nothing, or files of a layer are missing.
            ValueError: for files that are damaged or do not fit each other.
        """
        place = Path(folder).expanduser()
        if not place.is_dir():
            raise FileNotFoundError(
                f"A cross-layer transcoder must be a folder, got {place}, which is none. Check the path."
            )
        await_settled(place)
        found = read_settled(place, lambda: cls._load(place, dtype, model, weight_processing))
        found.name_or_path = str(folder)
        return found.to(device) if device is not None else found

    @classmethod
    def _load(cls, place: Path, dtype: torch.dtype, model: str | None, weight_processing: str) -> "CLT":
        if not (place / CONFIG).is_file():
            return cls._compose(place, dtype, model, weight_processing)
        described = read_json(place / CONFIG)
        if not isinstance(described, dict) or described.get("kind") != CROSS_LAYER:
            raise ValueError(
                f"{place / CONFIG} must describe a cross-layer transcoder ('kind': '{CROSS_LAYER}'), got another."
            )
        if (version := described.get("schema_version")) != SCHEMA_VERSION:
            raise ValueError(
                f"{place / CONFIG} must have schema_version {SCHEMA_VERSION}, got {version}; upgrade saelab."
            )
        with naming(place / CONFIG):
            refuse_unknown(
                described, ["schema_version", "kind", "config", "provenance", "training", "placed", SEAL], "It"
            )
            cfg = CLTConfig.from_dict(described.get("config"))  # type: ignore[arg-type]
            origin = described.get("provenance")
            places = None if origin is None else tuple(Provenance.from_dict(one) for one in origin)
            if places is not None and len(places) != cfg.n_layers:
                raise ValueError(f"`provenance` must be of {cfg.n_layers} layers, got {len(places)}. Was it edited?")
        clt = cls._hollow(cfg)
        fill(clt, {name: t.to(dtype) for name, t in load_tensors(place / WEIGHTS).items()}, place)
        read_sealed(place / CONFIG)[1]()
        clt.provenances, clt.training_ = places, described.get("training")
        clt.placed = described.get("placed") is True
        return clt

    @classmethod
    def _hollow(cls, cfg: CLTConfig) -> "CLT":
        """One whose weights are to be assigned, without memory for them."""
        with on_meta():
            clt = cls(cfg, seed=None)
        for layer in clt.layers:
            layer.b_dec = torch.zeros(layer.cfg.d_target)
        return clt

    @classmethod
    def _compose(cls, place: Path, dtype: torch.dtype, model: str | None, weight_processing: str) -> "CLT":
        held = read_layers(place)
        if model is not None:
            held.settings["model_name"] = model
        l0 = min(32.0, float(len(held.b_enc[0])))
        activation = ReLU(target_l0=l0) if held.thresholds is None else JumpReLU(target_l0=l0)
        cfg = CLTConfig(
            n_layers=len(held.W_enc),
            d_in=held.W_enc[0].shape[1],
            d_sae=held.W_enc[0].shape[0],
            d_out=held.b_dec[0].shape[0],
            activation=activation,
            dictionary="free",
            normalizer="none",
        )
        clt = cls._hollow(cfg)
        tensors = {"b_dec": torch.cat(held.b_dec).to(dtype)}
        for i in range(cfg.n_layers):
            tensors[f"layers.{i}.W_enc"] = held.W_enc[i].to(dtype).contiguous().T
            tensors[f"layers.{i}.b_enc"] = held.b_enc[i].to(dtype)
            tensors[f"layers.{i}.W_dec"] = held.W_dec[i].to(dtype).flatten(1)
            if held.thresholds is not None:
                tensors[f"layers.{i}.threshold"] = held.thresholds[i].to(dtype)
        fill(clt, tensors, place)
        clt.placed = True
        clt.provenances = held.make_provenances(weight_processing)
        return clt

    def __repr__(self) -> str:
        cfg, where = self.cfg, ""
        if self.provenances is not None:
            first, last = self.provenances[0], self.provenances[-1]
            where = f", from {first.hook_point} to {last.hook_point_out} of {shareable(first.model)}"
        widths = f"n_layers={cfg.n_layers}, d_in={cfg.d_in}, d_sae={cfg.d_sae}"
        return f"CLT({cfg.activation}, {widths}{f', d_out={cfg.d_out}' if cfg.d_out else ''}{where})"


def _name_layers(clt: CLT) -> LayerFiles:
    """What circuit-tracer's files hold; ValueError for what they cannot express."""
    if clt.places is None or clt.provenances is None:
        raise ValueError("circuit-tracer's files name model and hook points, got a transcoder without provenance.")
    activation = clt.cfg.activation
    plain = type(activation) in (ReLU, JumpReLU)
    if not plain and not (isinstance(activation, BatchTopK) and not activation.signed):
        raise ValueError(
            f"circuit-tracer knows ReLU and a threshold for each latent, got {activation}; convert it: "
            "clt.to_jumprelu(sample)."
        )
    parts = [clt.fold_layer(i)[1] for i in range(clt.cfg.n_layers)]
    thresholds = None
    if not isinstance(activation, ReLU):
        thresholds = [part["threshold"].expand(clt.cfg.d_sae).clone() for part in parts]
        if any(bool(threshold.isnan().any()) for threshold in thresholds):
            raise ValueError(f"{activation} must have its inference threshold to be written, got none; train first.")
    d = clt.cfg.d_target
    return LayerFiles(
        W_enc=[part["W_enc"].T for part in parts],
        b_enc=[part["b_enc"] for part in parts],
        W_dec=[part["W_dec"].unflatten(1, (-1, d)) for part in parts],
        b_dec=[part["b_dec"][:d] for part in parts],
        thresholds=thresholds,
        settings={"model_name": shareable(clt.provenances[0].model)} | name_places(clt.places),
    )


def check_layers(cfg: CLTConfig, acts: Activations | ActivationPairs | Batches) -> tuple[Provenance, ...] | None:
    """Origin of each layer's pairs, where known; ValueError for activations that are not those of its layers in order.

    Args:
        cfg: configuration of the transcoder.
        acts: pairs of the inputs of all layers and their outputs, or a stream of them.
    """
    widths = cfg.n_layers * cfg.d_in, cfg.n_layers * cfg.d_target
    given = acts.d_in, getattr(acts, "d_out", None)
    if isinstance(acts, Activations) or (given != widths and given != (sum(widths), None)):
        raise ValueError(
            f"Activations must be (inputs, targets) of {cfg.n_layers} layers side by side, of widths {widths}, got "
            f"{given}; join all layers: (Activations.join(inputs), Activations.join(targets))."
        )
    if not isinstance(acts, ActivationPairs):
        return _check_stream(cfg, getattr(acts, "provenances", None))
    sides: list[list[Provenance]] = []
    for side, width in ((acts.inputs, cfg.d_in), (acts.targets, cfg.d_target)):
        if side.sources is not None and [source.d_in for source in side.sources] != [width] * cfg.n_layers:
            raise ValueError(
                f"Each layer must have a width of {width} and {cfg.n_layers} layers be joined, got "
                f"{ {source.name: source.d_in for source in side.sources} }."
            )
        if (origins := _list_origins(side)) is None:
            return None
        sides.append(origins)
    _check_order([(read.hook_point, written.hook_point) for read, written in zip(*sides, strict=True)])
    return tuple(read.paired(written) for read, written in zip(*sides, strict=True))


def _check_stream(cfg: CLTConfig, origins: Any) -> tuple[Provenance, ...] | None:
    """Origin of each layer's pairs in a stream, where it tells."""
    if not isinstance(origins, tuple) or len(origins) != cfg.n_layers:
        return None
    _check_order([(one.hook_point, one.hook_point_out or "") for one in origins])
    return origins


def _check_order(places: Sequence[tuple[str, str]]) -> None:
    read, written = ([_find_block(pair[side]) for pair in places] for side in (0, 1))
    if read != written or read != sorted(set(read)):
        raise ValueError(f"Layers must be joined in the order of the model, inputs as targets, got {places}.")


def _list_origins(acts: Activations) -> list[Provenance] | None:
    origin, sources = acts.provenance, acts.sources
    if origin is None or origin.sources is None or sources is None:
        return None
    return [origin.at_source(source.name) for source in sources]


def _find_block(hook_point: str) -> int:
    found = BLOCK.match(hook_point)
    if found is None:
        raise ValueError(f"A layer's hook point must be in a block, got '{hook_point}'.")
    return int(found[1])


def _describe_training(run: TrainingRun, saved: dict[str, Any]) -> dict[str, Any]:
    """Settings, learning rate, tokens, dead latents by layer, the last entry of the history, and what was measured."""
    trainee = run.trainables[0]
    dead = trainee.state["tokens_since_fired"] >= trainee.dead_after_tokens
    last = dict(run.history[-1]) if run.history else {}
    if saved["n_tokens"]:
        last |= {"l0": saved["l0"]} | ({"held_out_fvu": saved["fvu"]} if saved["held_out"] else {})
    return {
        **run.cfg.to_dict(),
        "lr": run.lrs[0],
        "n_tokens_seen": run.step * run.cfg.batch_size,
        "dead": [layer.nonzero().squeeze(1).tolist() for layer in dead],
        "last": last,
        "saved": saved,
    }
