"""One check, at every function that takes an SAE and a model: is this where the SAE was trained?"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saelab as sl
from saelab.collecting.reader import ActivationReader
from saelab.evaluation.sparse_control import ORIGINAL, EditTask
from saelab.explorer import MovedFeature, PromptQuery, SteeringSetup
from saelab.lm.hook_points import hook_points_of
from saelab.lm.masks import TokenMask
from saelab.lm.model_checks import is_same_weights, sketch_weights
from saelab.sae.compatibility import match_weights

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
QUIET = {"progress": False}


@dataclass(frozen=True)
class At:
    """What a call is made on."""

    sae: sl.SAE
    model: Any
    tokens: sl.Tokens
    store: sl.FeatureStore
    out: Path

    @property
    def first(self) -> int:
        """A token that is in every row."""
        return int(self.tokens.ids[0, 4])


def enter(block: AbstractContextManager) -> None:
    with block:
        pass


def steer_to(at: At, **how) -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    enter(
        sl.interventions.steer_to_prototype(
            at.model, at.sae, sl.interventions.mean_codes(at.sae, x, ["a", "b"] * 4), "a", **how
        )
    )


def steering_curve(at: At, **how) -> None:
    options = {"strengths": [1], "n": 1, "n_tokens": 2, **QUIET}
    if "hook_point" in how:
        sl.steering.steering_curve(at.model, {"a": sl.Intervention(at.sae, {3: 1.0}, **how)}, "a", "One", **options)
    else:
        sl.steering.steering_curve(at.model, {"a": (at.sae, 3)}, "a", "One", **options, **how)


def ablate_concept(at: At, **how) -> None:
    labels = {"first": at.tokens.ids == at.first}
    options = {"n_random": 1, "methods": ["features"], "n_rows": 200, "ranking": "f"}
    sl.probing.erase_concept(at.model, at.tokens, labels, "first", at.sae, **options, **how)


def make_edit_task(at: At, hook_point: str) -> EditTask:
    ids = torch.tensor([[0, 70], [0, 71], [0, 72], [0, 73]])
    names, answers = [{"letter": name} for name in "abcd"], sl.lm.logits(at.model, ids)[:, -1].argmax(1)
    return EditTask(
        model=at.model, hook_point=hook_point, ids={ORIGINAL: ids, "letter": ids.flip(0)}, lengths=torch.full((4,), 2),
        places=torch.full((4, 1), -1), place_names=("end",), attributes={ORIGINAL: names, "letter": names[::-1]},
        answers=answers, other_answers=(answers + 1) % 100, asks=("letter",) * 4,
    )  # fmt: skip


def compare_control(at: At, hook_point: str = HOOK, **how) -> None:
    task = make_edit_task(at, hook_point)
    sl.evaluation.evaluate_sparse_control(task, task, {"a": at.sae}, ks=(1,), **how)


def disentangle(at: At, hook_point: str = HOOK, **how) -> None:
    task = make_edit_task(at, hook_point)
    sl.evaluation.score_disentanglement(at.sae, task, task, ns=(1,), baselines=False, **how)


def line_up(at: At, **how) -> None:
    sl.steering.steering_baselines(
        at.model, at.sae, 3, sl.steering.TokenConcept("a word", (at.first,)), at.tokens, **how
    )


def steer_live(at: At, **how) -> None:
    setup = SteeringSetup(prompt="One", features=(MovedFeature(feature=3),), n_tokens=2)
    list(sl.explorer.steer_live(at.model, [sl.Intervention(at.sae, {3: 1.0}, **how)], setup))


def trace_prompt(at: At, hook_point: str | None = None, **how) -> Any:
    dictionaries = at.sae if hook_point is None else {hook_point: at.sae}
    return sl.circuits.trace(at.model, dictionaries, "One two", allow_missing=True, **how)


def score_attention(at: At, hook_point: str | None = None, **how) -> None:
    dictionaries = at.sae if hook_point is None else {hook_point: at.sae}
    sl.circuits.attention_score(at.model, dictionaries, "One two", head=(0, 0), key=1, allow_missing=True, **how)


def validate_graph(at: At, hook_point: str | None = None, **how) -> None:
    graph = trace_prompt(at, hook_point, allow_mismatch=True)
    dictionaries = at.sae if hook_point is None else {hook_point: at.sae}
    sl.circuits.validate(graph, at.model, dictionaries, n_ablated=2, n_steered=1, **QUIET, **how)


def split_heads(at: At, **how) -> None:
    sae = deepcopy(at.sae)
    sae.provenance = replace(sae.provenance, hook_point="blocks.1.hook_attn_out")
    graph = trace_prompt(replace(at, sae=sae), allow_mismatch=True)
    [node, *_] = np.flatnonzero(graph.features * (graph.sources >= 0) > 0)
    sl.circuits.split_by_head(graph, at.model, sae, int(node), **how)


def classify_heads(at: At, **how) -> None:
    texts = sl.tokenize(at.model, ["one", "two"] * 3, ctx_len=8, packed=False)
    sl.circuits.classify_heads(at.model, texts, ["a", "b"] * 3, 2, sae=at.sae, n_draws=2, **how)


CALLS: dict[str, Callable] = {
    "steer by nothing": lambda at, **how: enter(sl.steer(at.model, at.sae, {3: 0.0}, **how)),
    "ActivationCondition": lambda at, **how: enter(
        sl.steer(
            at.model,
            sl.Direction(torch.ones(32), HOOK),
            1.0,
            where=sl.interventions.ActivationCondition(at.sae, 3, **how),
        )
    ),
    "erase_concept": ablate_concept,
    "read": lambda at, **how: sl.read(at.sae, at.model, "One", **QUIET, **how),
    "attribute": lambda at, **how: sl.interventions.attribute(at.model, at.sae, "One", "e", **QUIET, **how),
    "describe_prompt": lambda at: sl.explorer.describe_prompt(
        at.sae, at.model, at.store, PromptQuery(text="One"), lambda features: {}
    ),
    "evaluate_sparse_control": compare_control,
    "score_disentanglement": disentangle,
    "explore": lambda at: sl.explore(at.store, at.model, at.sae, port=0).close(),
    "evaluate": lambda at, **how: sl.evaluate(
        at.sae, at.model, at.tokens[:2], n_bootstrap=0, baselines=False, **QUIET, **how
    ),
    "export_store": lambda at: sl.interop.export_store(
        at.store, at.out, "saedashboard", sae=at.sae, model=at.model, features=[3], **QUIET
    ),
    "upload": lambda at: sl.interop.upload(
        at.store, sae=at.sae, model=at.model, dry_run=True, journal=at.out / "journal.json", progress=False
    ),
    "finetune": lambda at, **how: sl.evaluation.finetune(
        deepcopy(at.sae), at.model, at.tokens[:2], sl.TrainConfig(n_tokens=64, batch_size=64), **QUIET, **how
    ),
    "harvest": lambda at, **how: sl.harvest(at.sae, at.model, at.tokens[:2], at.out, **QUIET, **how),
    "harvest_untrained": lambda at, **how: sl.collecting.harvest_untrained(
        at.store, at.sae, at.model, at.out, **QUIET, **how
    ),
    "steering_baselines": line_up,
    "logit_lens": lambda at, **how: sl.analysis.logit_lens(at.sae, at.model, [3], **how),
    "patch": lambda at, **how: sl.interventions.patch(at.model, "One", "Two", "e", sources=at.sae, **how),
    "prompt_widget": lambda at: sl.explorer.prompt_widget(at.store, at.model, "One", at.sae),
    "prune_dictionary": lambda at, **how: sl.analysis.prune_dictionary(at.sae, at.model, at.tokens[:4], (4,), **how),
    "read_prompt": lambda at: sl.analysis.read_prompt(at.sae, at.model, "One", at.store.provenance),
    "report": lambda at: sl.report(at.store, at.out, at.model, sae=at.sae, features=[3], **QUIET),
    "output_scores": lambda at, **how: sl.steering.output_scores(at.model, at.sae, at.store, [3], prompts="One", **how),
    "splice": lambda at, **how: enter(sl.splice(at.model, at.sae, **how)),
    "steer": lambda at, **how: enter(sl.steer(at.model, at.sae, {3: 1.0}, **how)),
    "steer_live": steer_live,
    "steering_widget": lambda at: sl.explorer.steering_widget(at.store, at.model, sae=at.sae),
    "steer_all": lambda at, **how: enter(
        sl.interventions.steer_all(at.model, [sl.Intervention(at.sae, {3: 1.0}, **how)])
    ),
    "steer_randomly": lambda at, **how: enter(
        sl.interventions.steer_randomly(at.model, [sl.Intervention(at.sae, {3: 1.0}, **how)])
    ),
    "converse": lambda at, **how: sl.steering.converse(
        at.model, "One", [sl.Intervention(at.sae, {3: 1.0}, **how)], n_tokens=1
    ),
    "compare_generations": lambda at, **how: sl.steering.compare_generations(
        at.model, sl.Intervention(at.sae, {3: 1.0}, **how), "One", 2, **QUIET
    ),
    "steer_to_prototype": steer_to,
    "attention_score": score_attention,
    "split_by_head": split_heads,
    "classify_heads": classify_heads,
    "trace": trace_prompt,
    "validate": validate_graph,
    "steering_curve": steering_curve,
}
"""Every public function that takes an SAE and a model, called on them."""

ANY_POINT = {"harvest_untrained", "logit_lens"}  # the store says it; what features write is read at no hook point
ONE_KIND = {"split_by_head"}  # of attention outputs only
BY_STORE = {
    "describe_prompt",
    "explore",
    "export_store",
    "prompt_widget",
    "read_prompt",
    "report",
    "steering_widget",
    "upload",
}  # the store says what the model must be


@pytest.fixture(scope="module")
def trained(tiny, tiny_tokens, tmp_path_factory) -> At:
    """An SAE where it belongs, with its store."""
    tokens, out = tiny_tokens[:24], tmp_path_factory.mktemp("matching")
    acts = sl.collect(tiny, tokens[:4], HOOK, **QUIET)
    cfg = sl.SAEConfig(d_in=32, d_sae=48, activation=sl.AbsTopK(k=4), normalizer="none")
    sae = sl.SAE(cfg).fit(acts, sl.TrainConfig(n_tokens=128, batch_size=64), **QUIET)
    return At(sae, tiny, tokens, sl.harvest(sae, tiny, tokens[:8], out / "store", **QUIET), out)


@pytest.fixture(scope="module")
def strangers() -> dict[str, Any]:
    """Another model of the same width, and the right one with folded weights."""
    return {"model": sl.lm.tiny_model(seed=1), "weight processing": sl.load_model("tiny", weight_processing="folded")}


def test_no_function_that_takes_an_sae_and_a_model_is_left_out():
    found = set()
    packages = [getattr(sl, name) for name in sl.__all__ if inspect.ismodule(getattr(sl, name))]
    packages += [sl.labels.autointerp, sl.labels.rules, sl.sae.formats]
    things = {name: getattr(package, name) for package in packages for name in package.__all__}
    for name, thing in things.items():
        if not inspect.isfunction(thing):
            continue
        signature = str(inspect.signature(thing))
        if "model_checks.Model" in signature and any(
            word in signature for word in ("sae.SAE", "Intervention", "EditTask")
        ):
            found.add(name)
    assert found >= {"attribute", "evaluate", "patch", "steer", "steering_curve"}  # the search itself works
    assert found <= set(CALLS), found - set(CALLS)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_where_the_sae_was_trained_it_works(name, trained, tmp_path):
    CALLS[name](replace(trained, out=tmp_path / "out"))


@pytest.mark.parametrize("what", ["model", "weight processing"])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_another_model_or_other_weights_are_refused_unless_asked_for(name, what, trained, strangers, tmp_path):
    at = replace(trained, model=strangers[what], out=tmp_path / "out")
    with pytest.raises(ValueError, match=f"must be used where it was trained, got another {what}"):
        CALLS[name](at)
    if name not in BY_STORE:
        CALLS[name](at, allow_mismatch=True)


@pytest.mark.parametrize("name", sorted(set(CALLS) - ANY_POINT - ONE_KIND - BY_STORE))
def test_another_hook_point_is_refused_unless_asked_for(name, trained, tmp_path):
    at = replace(trained, out=tmp_path / "out")
    with pytest.raises(ValueError, match="got another hook point"):
        CALLS[name](at, hook_point=OTHER)
    CALLS[name](at, hook_point=OTHER, allow_mismatch=True)


@pytest.mark.parametrize("name", ["steer", "attribute", "evaluate", "patch"])
def test_another_name_of_the_same_hook_point_is_no_other(name, trained, tmp_path):
    CALLS[name](replace(trained, out=tmp_path / "out"), hook_point="blocks.1.hook_out")


@pytest.mark.parametrize("name", ["export_store", "harvest_untrained", "report", "output_scores"])
def test_a_store_of_another_sae_is_refused(name, trained, tmp_path):
    other = sl.SAE(trained.sae.cfg, seed=5)
    other.provenance = trained.sae.provenance
    with pytest.raises(ValueError, match="must be the one that was harvested"):
        CALLS[name](replace(trained, sae=other, out=tmp_path / "out"))
    with pytest.raises(ValueError, match="must be the one that was harvested"):
        sl.analysis.dead_features(trained.store, other)
    wide = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64))
    with pytest.raises(ValueError, match="must be the one that was harvested, 48 features"):
        sl.Intervention(wide, {60: 1.0}, unit="max", store=trained.store, hook_point=HOOK)


def test_weights_tell_models_of_one_name_and_names_do_not_part_equal_weights() -> None:
    def origin_of(model: Any) -> Any:
        tokens = sl.tokenize(model, ["Once upon a time"], ctx_len=8)
        return ActivationReader.make(model, tokens, [HOOK], TokenMask(), None).origins(tokens, 8, {})[HOOK]

    def renamed(model: Any) -> Any:
        model.cfg.model_name = "checkpoint-1000"
        return model

    mine, other, third = (renamed(sl.lm.tiny_model(seed=seed, n_layers=n)) for seed, n in ((0, 2), (1, 2), (0, 3)))
    origin = origin_of(mine)
    match_weights(origin, mine)
    for stranger in (other, third):
        with pytest.raises(ValueError, match=r"another model of that name .*checkpoint-1000 with other weights"):
            match_weights(origin, stranger)
    match_weights(replace(origin, model_sketch=None), other)  # files of before say the name alone
    match_weights(origin, mine.to(torch.bfloat16))
    match_weights(replace(origin, model="of_the_same_weights"), mine)
    laid_out = origin.versions | {"transformers": "5.0.0"}
    match_weights(replace(origin, versions=laid_out), third)  # parameters may have other shapes there
    with pytest.raises(ValueError, match="with other weights"):
        match_weights(replace(origin, versions=laid_out), other)


def test_a_sketch_leaves_the_model_alone_and_says_nothing_of_quantized_weights() -> None:
    model = sl.lm.tiny_model()
    before = sketch_weights(model)
    with sl.steer(model, sl.Direction(torch.ones(32), HOOK), 1.0):
        assert sketch_weights(model) == before
    with torch.no_grad():
        hook_points_of(model).components["blocks.0.mlp.out"].weight.add_(0.01)
    after = sketch_weights(model)
    assert before is not None and after is not None and not is_same_weights(before, after)
    assert sketch_weights(torch.nn.Linear(4, 4, device="meta")) is None


def test_weights_that_are_not_finite_are_refused_everywhere(tmp_path: Path) -> None:
    model = sl.lm.tiny_model()
    tokens = sl.tokenize(model, ["The fox met the hen."] * 4, ctx_len=8)
    sae = sl.SAE(sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=4)))
    at = {"hook_point": HOOK}
    enter(sl.steer(model, sae, {3: 1.0}, **at))  # seen to be whole
    with torch.no_grad():
        sae.W_enc[0, 0] = torch.nan
    for use in (
        lambda: sl.evaluate(sae, model, tokens, **at),
        lambda: sl.harvest(sae, model, tokens, tmp_path / "store", **at, **QUIET),
        lambda: enter(sl.steer(model, sae, {3: 1.0}, **at)),
        lambda: sl.analysis.logit_lens(sae, model, [3]),
        lambda: sl.universality.seed_stability([sae, sae]),
    ):
        with pytest.raises(ValueError, match="weights must be finite, got NaN or infinite ones in W_enc"):
            use()
    assert not (tmp_path / "store").exists()


def test_a_store_of_another_sae_gives_no_maxima(tmp_path: Path) -> None:
    model = sl.lm.tiny_model()
    tokens = sl.tokenize(model, ["The fox met the hen."] * 4, ctx_len=8)
    cfg = sl.SAEConfig(d_in=32, d_sae=48, activation=sl.TopK(k=4))
    mine, other = sl.SAE(cfg, seed=0), sl.SAE(cfg, seed=1)
    store = sl.harvest(mine, model, tokens, tmp_path, hook_point=HOOK, **QUIET)
    fires = int(store.statistics.fires.sum(1).argmax())
    how = {"unit": "max", "store": store, "hook_point": HOOK}
    enter(sl.steer(model, mine, {fires: 1.0}, **how))
    with pytest.raises(ValueError, match="`sae` must be the one that was harvested"):
        enter(sl.steer(model, other, {fires: 1.0}, **how))
