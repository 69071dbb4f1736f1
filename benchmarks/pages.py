"""From tokens to pages of features, in saelab and in SAEDashboard; `harvest.py` times it.

Both get the same model object, SAE, tokens and features, and count every token.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import saelab as sl
from saelab.stores.files import save_tensors
from saelab.stores.tensors import load_tensors

N_TRAINING = 262_144
"""Tokens the SAE is trained on: enough for features of many densities."""
N_WARMUP_SEQ, N_WARMUP_FEATURES = 64, 16


@dataclass(frozen=True)
class Job:
    """What both libraries start from."""

    model: Any
    sae: sl.SAE
    tokens: sl.Tokens
    hook_point: str
    features: list[int]

    @classmethod
    def make(cls, model: Any, tokens: sl.Tokens, hook_point: str, sae: sl.SAE, n_features: int) -> "Job":
        """Train the SAE, and choose the first features that fire."""
        text = tokens[: N_TRAINING // tokens.ctx_len]
        acts = sl.collect(model, text, hook_point, mask=sl.TokenMask(special=False), progress=False)
        sae.fit(acts, sl.TrainConfig(n_tokens=N_TRAINING), progress=False)
        latents = sae.encode_sparse(acts[: len(acts) // 4]).indices
        features = torch.bincount(latents, minlength=sae.cfg.d_sae).nonzero().squeeze(1)[:n_features].tolist()
        return cls(model, sae, tokens, hook_point, features)

    def save(self, folder: Path) -> None:
        """Write all but the model."""
        self.sae.save_pretrained(folder / "sae")
        save_tensors(folder / "tokens.safetensors", {"ids": self.tokens.ids, "doc_ids": self.tokens.doc_ids})
        (folder / "job.json").write_text(json.dumps({"hook_point": self.hook_point, "features": self.features}))

    @classmethod
    def load(cls, folder: Path, model: Any) -> "Job":
        """Read what `save` wrote."""
        tokens = sl.Tokens(**load_tensors(folder / "tokens.safetensors"))
        sae = sl.SAE.from_pretrained(folder / "sae")
        return cls(model, sae, tokens, **json.loads((folder / "job.json").read_text()))

    def short(self) -> "Job":
        """A little of it, to warm up."""
        return Job(self.model, self.sae, self.tokens[:N_WARMUP_SEQ], self.hook_point, self.features[:N_WARMUP_FEATURES])


def make_in_saelab(job: Job, out: Path) -> dict[str, float]:
    """Harvest all features, then write the report of those asked for."""
    start = time.perf_counter()
    store = sl.harvest(job.sae, job.model, job.tokens, out / "store", progress=False)
    harvested = time.perf_counter()
    chosen = {"model": job.model, "sae": job.sae, "features": job.features, "progress": False}
    sl.report(store, out / "report", **chosen)
    written = time.perf_counter()
    l0 = store.statistics.fires[job.features].sum() / len(store)
    return {"data": harvested - start, "pages": written - harvested, "l0": float(l0)}


def make_in_dashboard(job: Job, out: Path) -> dict[str, float]:
    """SAEDashboard's runner with its own defaults, then its page."""
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    theirs = as_saelens(job.sae)
    x = sl.lm.capture(job.model, job.tokens[:4].ids, [job.hook_point])[job.hook_point]
    torch.testing.assert_close(theirs.encode(x), job.sae.encode(x), atol=1e-3, rtol=1e-3)
    start = time.perf_counter()
    cfg = SaeVisConfig(hook_point=job.hook_point, features=job.features)
    found = SaeVisRunner(cfg).run(encoder=theirs, model=job.model, tokens=job.tokens.ids.long())
    made = time.perf_counter()
    save_feature_centric_vis(found, out / "page.html")
    written = time.perf_counter()
    titles = [found.feature_data_dict[j].acts_histogram_data.title for j in job.features]
    l0 = sum(float(title.split("=")[1].strip(" %")) for title in titles if title) / 100  # none where nothing fires
    return {"data": made - start, "pages": written - made, "l0": l0}


@torch.no_grad()
def as_saelens(sae: sl.SAE) -> Any:
    """The SAELens SAE with the same codes."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    folded = sae.fold()
    settings = {"d_in": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "apply_b_dec_to_input": True}
    if isinstance(sae.cfg.activation, sl.TopK):
        # The runner scales decoders to unit norm, which SAELens refuses for other TopK SAEs than those.
        cfg = TopKSAEConfig(**settings, k=sae.cfg.activation.k, rescale_acts_by_decoder_norm=True)
        theirs, scale = TopKSAE(cfg), folded.W_dec.norm(dim=1)
    else:
        theirs, scale = JumpReLUSAE(JumpReLUSAEConfig(**settings)), torch.ones(())
        theirs.threshold.copy_(folded.threshold)
    for name, value in (("W_enc", folded.W_enc / scale), ("b_enc", folded.b_enc / scale)):
        getattr(theirs, name).copy_(value)
    theirs.W_dec.copy_(folded.W_dec)
    theirs.b_dec.copy_(folded.b_dec)
    return theirs


MAKERS = {"saelab": make_in_saelab, "SAEDashboard": make_in_dashboard}
