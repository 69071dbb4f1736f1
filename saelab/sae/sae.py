"""`SAE`: the coder with its life: made, trained, saved, loaded, shared."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.checkpoint import find_folder, read_sae, write_sae
from saelab.sae.coder import Coder
from saelab.sae.config import SAEConfig
from saelab.sae.fitting import Data, Pair, describe_training, make_run, open_data, origin_of
from saelab.stores.provenance import Provenance
from saelab.training.config import TrainConfig
from saelab.training.loop import train
from saelab.training.sinks import Entry, Sink


class SAE(Coder):
    """A sparse autoencoder: `x_hat = unnormalise(z W_dec + b_dec)`, `z = activation((normalise(x) - b_dec) W_enc +
    b_enc)`.

    Every variant is this class with another `SAEConfig`. Weights are float32, drawn from `seed`.

    >>> sae = sl.SAE(sl.SAEConfig(d_in=4, d_sae=8, activation=sl.AbsTopK(k=2)), seed=0)
    >>> sae.encode(torch.ones(3, 4)).count_nonzero(dim=1).tolist()
    [2, 2, 2]
    """

    def __init__(self, cfg: SAEConfig, seed: int = 0) -> None:
        super().__init__(cfg, seed)
        self.provenance: Provenance | None = None
        self.training_: dict[str, Any] | None = None
        self.history_: list[Entry] = []
        self.name_or_path = ""  # where it was loaded from or saved to

    def fit(
        self,
        acts: Data,
        cfg: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        held_out: Float[Tensor, "n d_in"] | Pair | None = None,
        sinks: Sequence[Sink] = (),
        progress: bool = True,
    ) -> "SAE":
        """Train on activations and return self; the losses are in `history_`, the settings in `training_`.

        `acts` is what `collect` or `stream` give, or a plain tensor; for a transcoder (inputs, targets), two of the
        first or the last whose rows are of the same tokens, or a stream of pairs. With `out`, history and checkpoints
        are written there, and `resume=True` goes on from the last one, bit for bit on CPU. Ctrl-C saves and says where.
        """
        fit([self], acts, cfg, out=out, resume=resume, held_out=held_out, sinks=sinks, progress=progress)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        write_sae(Path(folder), self.describe(), self.state_dict())
        self.name_or_path = str(folder)

    def describe(self) -> dict[str, Any]:
        """Config, origin of the activations and training, ready for JSON."""
        origin = self.provenance.to_dict() if self.provenance else None
        return {"config": self.cfg.to_dict(), "provenance": origin, "training": self.training_}

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str | torch.device | None = None, revision: str | None = None
    ) -> "SAE":
        """Load an SAE from a folder written by `save_pretrained`, or from the Hub by id `owner/name`.

        Raises FileNotFoundError where there is none, ValueError for unknown keys and for weights that do not fit the
        config.
        """
        folder = find_folder(source, revision)
        described, tensors = read_sae(folder)
        sae = cls(SAEConfig.from_dict(described["config"]))
        try:
            sae.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"The weights in {folder} must fit its config.json: {error}") from error
        sae.provenance = Provenance.from_dict(described["provenance"]) if described["provenance"] else None
        sae.training_, sae.name_or_path = described["training"], str(source)
        return sae.to(device) if device is not None else sae

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the two files to a Hub model repository, made if need be; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload SAE"))

    def fold(self) -> "SAE":
        """An equal SAE without a normaliser: same codes, same reconstructions; its dictionary rows are no longer
        unit.
        """
        folded = super().fold()
        assert isinstance(folded, SAE)
        return folded

    def __repr__(self) -> str:
        cfg = self.cfg
        nested = f", prefixes={cfg.prefixes}" if cfg.prefixes else ""
        widths = f"d_in={cfg.d_in}, d_sae={cfg.d_sae}" + (f", d_out={cfg.d_out}" if cfg.d_out else "")
        more = (", skip" if cfg.skip else "") + (f", {cfg.encoder}" if cfg.encoder != "linear" else "")
        at = f", {self.provenance.place} of {self.provenance.model}" if self.provenance else ""
        return f"SAE({cfg.activation}, {widths}{more}{nested}{at})"


def fit(
    saes: Sequence[SAE],
    acts: Data,
    cfg: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    held_out: Float[Tensor, "n d_in"] | Pair | None = None,
    sinks: Sequence[Sink] = (),
    progress: bool = True,
) -> list[SAE]:
    """Train several SAEs on the same batches in one pass, each exactly as it would be trained alone; returns them.

    Arguments are those of `SAE.fit`; in the history, entries of the i-th SAE start with `i/`.
    """
    acts = open_data(acts)
    run = make_run(saes, acts, cfg or TrainConfig(), held_out, out, resume)
    train(run, resume=resume, sinks=sinks, progress=progress)
    for i, sae in enumerate(saes):
        sae.provenance, sae.training_, sae.history_ = origin_of(acts), describe_training(run, i), run.history
    return list(saes)
