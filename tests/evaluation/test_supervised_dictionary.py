"""Supervised dictionaries, sparse edits and removal, where the truth is planted; the name prompts of tales."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from unchecked import unchecked

import saelab as sl
from saelab.evaluation.feature_classifiers import encode_csr
from saelab.evaluation.sparse_control import ORIGINAL, EditTask, edit_sparsely, evaluate_sparse_control, weigh_codes
from saelab.evaluation.supervised_dictionary import (
    additive_share,
    fit_supervised_dictionary,
    mark_values,
    score_attributes,
)
from saelab.lm.hook_points import hook_points_of
from saelab.probing.concept_removal import erase_concept
from saelab.probing.linear_directions import (
    FeatureErasure,
    choose_sides,
    draw_directions,
    draw_like,
    erase_direction,
    erase_least,
)
from saelab.synthetic.tasks import NAME_EDITS, name_edits
from saelab.synthetic.vocabulary import VOCABULARY

LAST, FIRST = "blocks.2.hook_resid_post", "blocks.0.hook_resid_pre"


def make_rows(n=200, seed=0):
    """Two attributes that go together, and the activations that they add up to."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    who = rng.integers(0, 4, n)
    when = np.where(rng.random(n) < 0.6, who % 2, rng.integers(0, 2, n))
    u, v = torch.randn(4, 10, generator=generator), torch.randn(2, 10, generator=generator)
    return u[who] + v[when] + 1.0, [{"who": f"p{a}", "when": f"t{b}"} for a, b in zip(who, when, strict=True)], (u, v)


def test_least_squares_find_planted_vectors_where_means_count_twice():
    x, attributes, (u, v) = make_rows()
    fits = {method: fit_supervised_dictionary(x, attributes, method) for method in ("means", "least-squares")}
    least = fits["least-squares"]
    torch.testing.assert_close(least.decode(least.encode(attributes)), x, rtol=1e-4, atol=1e-4)
    rows = dict(zip(least.names, least.rows, strict=True))
    torch.testing.assert_close(rows["who", "p0"] - rows["who", "p3"], u[0] - u[3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows["when", "t0"] - rows["when", "t1"], v[0] - v[1], rtol=1e-4, atol=1e-4)
    means = fits["means"]
    assert float((means.decode(means.encode(attributes)) - x).norm() / x.norm()) > 0.1
    place = means.names.index(("who", "p2"))
    of_p2 = torch.tensor([one["who"] == "p2" for one in attributes])
    torch.testing.assert_close(means.rows[place], x[of_p2].mean(0) - x.mean(0), rtol=1e-4, atol=1e-4)


def test_sums_explain_planted_sums_and_of_shuffled_ones_as_much_as_chance():
    """Of 4 x 2 combinations' 7 degrees of freedom the sums have 3 + 1, so of any others they explain 4/7 on average."""
    x, attributes, _ = make_rows(400)
    found = additive_share(x, attributes, n_shuffles=400)
    assert found.explained == pytest.approx(1, abs=1e-6) and (found.n_combinations, found.n_values) == (8, 6)
    assert found.shuffled < found.shuffled_high < 1
    assert abs(found.shuffled - 4 / 7) < 5 * 0.25 / 20  # a standard deviation of a share below 0.25, of 400
    pairs = [tuple(sorted(one.items())) for one in attributes]
    x = x + torch.tensor([[3.0 if one == pairs[0] else 0.0] for one in pairs])  # one combination is no sum
    means = torch.stack([x[[pair == kind for pair in pairs]].mean(0) for kind in sorted(set(pairs))])
    design = torch.tensor(
        [[float(name in kind) for name in sorted({p for k in pairs for p in k})] for kind in sorted(set(pairs))]
    )
    centered, design = means - means.mean(0), design - design.mean(0)
    rest = centered - design @ torch.linalg.lstsq(design, centered, driver="gelsd").solution
    other = additive_share(x, attributes, n_shuffles=0)
    assert other.explained == pytest.approx(1 - float(rest.square().sum() / centered.square().sum()), abs=1e-5)
    assert other.explained < 0.99 and np.isnan(other.shuffled)
    with pytest.raises(ValueError, match="`n_shuffles` must be at least 0, got -1"):
        additive_share(x, attributes, n_shuffles=-1)


def test_an_edit_of_an_attribute_is_the_other_prompt():
    x, attributes, _ = make_rows()
    other = [one | {"who": f"p{(int(one['who'][1]) + 1) % 4}"} for one in attributes]
    wanted = x.clone()
    u = make_rows()[2][0]
    who = torch.tensor([int(one["who"][1]) for one in attributes])
    wanted += u[(who + 1) % 4] - u[who]
    edited = fit_supervised_dictionary(x, attributes, "least-squares").edit(x, attributes, other)
    torch.testing.assert_close(edited, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="must have values that were there"):
        fit_supervised_dictionary(x, attributes).encode([{"who": "nobody", "when": "t0"}])
    with pytest.raises(ValueError, match="must say the same things of each of the 200 rows"):
        fit_supervised_dictionary(x, [*attributes[:-1], {"who": "p0"}])


def test_sparse_edits_take_the_features_that_matter_first():
    rows = torch.eye(6)
    z = torch.tensor([[3.0, -1.0, 2.0, 0.0, 0.0, 1.0], [0.0] * 6])
    goal = torch.tensor([[0.0, 1.0, 2.0, 4.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.5]])
    found = edit_sparsely(z, goal, rows, goal - z, [0, 1, 2, 3, 5])
    assert not found[0].chosen.any() and not found[0].change.any()
    assert found[1].chosen[0].nonzero().tolist() == [[3]] and found[2].chosen[0].nonzero().tolist() == [[0], [3]]
    torch.testing.assert_close(found[3].change, goal - z)  # a sign turned counts once
    assert found[5].chosen.sum(1).tolist() == [3, 1]  # nothing that does not help
    # a feature that leads away is left alone
    away = edit_sparsely(torch.zeros(1, 6), -torch.eye(6)[:1], rows, torch.eye(6)[:1], [3])[3]
    assert not away.chosen.any()
    # nor is one taken twice, however far the goal
    twice = edit_sparsely(torch.zeros(1, 6), torch.eye(6)[:1], rows, 9 * torch.eye(6)[:1], [4])[4]
    torch.testing.assert_close(twice.change, torch.eye(6)[:1])


def test_weights_are_shares_of_the_reconstruction():
    generator = torch.Generator().manual_seed(0)
    z, rows = torch.randn(5, 8, generator=generator), torch.randn(8, 6, generator=generator)
    weights = weigh_codes(z, rows)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    torch.testing.assert_close(weights[2, 3], z[2, 3] * rows[3] @ (z[2] @ rows) / (z[2] @ rows).square().sum())


def test_found_split_and_occluded_values_are_told_apart():
    """Value a has a feature, b the negative side of one, c is split over three, d lies in x alone, the rest nowhere."""
    rng, n = np.random.default_rng(0), 1400
    value = rng.integers(0, 7, n)
    truth = {"letter": value[:, None] == np.arange(7)}
    z = torch.zeros(n, 7)
    z[value == 0, 0] = 1.0
    z[value == 1, 1], z[value != 1, 1] = -2.0, 0.5
    z[torch.from_numpy(value == 2), torch.from_numpy(rng.integers(2, 5, n))[value == 2]] = 1.0
    z[rng.random(n) < 0.3, 5] = 1.0  # 6 never fires
    x = torch.from_numpy(rng.standard_normal((n, 8))).float()
    for v in range(4):
        x[value == v, v] += 6.0
    one = score_attributes(z, x, truth, np.arange(n) < n // 2, "here")[0]
    assert (one.n_found, one.n_split, one.n_occluded, one.n_values) == (2, 1, 1, 7)
    assert one.f1_always == pytest.approx(1 / 4, abs=0.03) and one.f1 < one.f1_union < one.f1_probe
    assert one.place == "here"
    # of a value that holds of nearly all, a feature that always fires is no evidence
    mostly = {"often": (rng.random(n) < 0.8)[:, None]}
    often = score_attributes(torch.ones(n, 1), x, mostly, np.arange(n) < n // 2)[0]
    assert often.f1 > 0.85 and often.n_found == 0 == often.n_split


def test_values_may_be_joined():
    attributes = [{"giver": "Ann", "receiver": "Tom"}, {"giver": "Tom", "receiver": "Eve"}]
    truth = mark_values(attributes, {"either": ("giver", "receiver")})
    assert truth["giver"].tolist() == [[True, False], [False, True]]
    assert truth["either"].tolist() == [[True, False, True], [False, True, True]]  # Ann, Eve, Tom


LETTERS = "abcdefgh"


def letter_task(tiny, order):
    """Prompts of one letter; edited, of the letter four further on. At the end all rests on the letter."""
    ids = torch.tensor([tiny.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in LETTERS])[order]
    other = ids.roll(-4, 0)
    versions = {ORIGINAL: ids, "letter": other}
    rows = {
        name: torch.cat([torch.full((len(v), 1), 0), v, torch.full((len(v), 2), 9)], 1) for name, v in versions.items()
    }
    letters = [LETTERS[i] for i in order]
    x = sl.lm.logits(tiny, rows[ORIGINAL][:, :2])[:, -1].argmax(-1)
    y = sl.lm.logits(tiny, rows["letter"][:, :2])[:, -1].argmax(-1)
    return EditTask(
        model=tiny,
        hook_point=LAST,
        ids=rows,
        lengths=torch.full((len(ids),), 2),
        places=torch.full((len(ids), 1), -1),
        place_names=("end",),
        attributes={
            ORIGINAL: [{"letter": a} for a in letters],
            "letter": [{"letter": a} for a in letters[4:] + letters[:4]],
        },
        answers=x,
        other_answers=torch.where(y == x, (x + 1) % 259, y),
    )


@pytest.fixture(scope="module")
def task(tiny):
    return letter_task(tiny, list(range(8)))


@pytest.fixture(scope="module")
def control(task):
    """An SAE whose only latent at each letter is that letter's, and one that was never trained."""
    x = task.activations[ORIGINAL][:, 0]
    centered = x - x.mean(0)
    exact = sl.SAE(sl.SAEConfig(d_in=32, d_sae=8, activation=sl.TopK(k=1), normalizer="none", dictionary="free"))
    with torch.no_grad():
        exact.W_dec.copy_(centered)
        exact.b_dec.copy_(x.mean(0))
        exact.W_enc.copy_(torch.linalg.pinv(centered) * 8 / 7)
        exact.b_enc.zero_()
    untrained = sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.AbsTopK(k=4), normalizer="none"))
    return evaluate_sparse_control(task, task, {"exact": exact, "untrained": untrained}, ks=(0, 1, 2))


def test_a_dictionary_of_the_attributes_reaches_the_ceiling(control):
    for name in ("supervised means", "supervised least-squares", "exact"):
        row = control[name]
        assert row.sufficiency == pytest.approx(1, abs=1e-3) and row.necessity == pytest.approx(1, abs=1e-3)
        assert row.edit("letter", 2).agreement == 1 and row.edit("letter", 2).unexplained < 1e-6
        assert row.edit("letter", 2).magnitude == pytest.approx(1, abs=1e-3)
        assert row.edit("letter", 0).magnitude == 0 and row.l0 == 1
    assert control.changed["letter"] > 0.5 and control.right == {"letter": 1.0}
    assert control["exact"].edit("letter", 0).agreement == pytest.approx(1 - control.changed["letter"])


def test_one_that_was_never_trained_does_not(control):
    row = control["untrained"]
    assert abs(row.sufficiency - 1) > 0.05 and row.edit("letter", 2).unexplained > 0.1
    assert row.l0 == 4 and row.n_live <= 64


def test_a_feature_for_each_letter_is_found(control):
    one = control["exact"].attributes[0]
    assert (one.n_found, one.n_split, one.n_occluded, one.f1) == (8, 0, 0, 1.0)
    assert not control["supervised means"].attributes
    text = str(control)
    assert "no edit" in text and "untrained, letter at end" in text and control.to_dict()["rows"][2]["name"] == "exact"
    with pytest.raises(KeyError, match=r"must be one of: .*'exact'; .*got 'nothing'"):
        control["nothing"]


@unchecked()
def test_tasks_must_match(task):
    with pytest.raises(ValueError, match="Versions must be 'original' and edits of one shape"):
        replace(task, ids={ORIGINAL: task.ids[ORIGINAL], "letter": task.ids["letter"][:, :-1]})
    with pytest.raises(ValueError, match="`place_names` must name 1 places"):
        replace(task, place_names=("a", "b"))
    with pytest.raises(ValueError, match="must rebuild activations of width 32"):
        evaluate_sparse_control(task, task, {"narrow": sl.SAE(sl.SAEConfig(d_in=16, d_sae=32))})
    with pytest.raises(ValueError, match="the same vectors at every token, got layer_norm"):
        evaluate_sparse_control(
            task, task, {"normed": sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, normalizer="layer_norm"))}
        )


def test_name_prompts_differ_in_what_they_say():
    for versions in name_edits(5, seed=4):
        first = versions[ORIGINAL]
        assert list(versions) == [ORIGINAL, *NAME_EDITS]
        for edit, prompt in versions.items():
            assert len(prompt.ids) == len(first.ids) and prompt.giver_at == first.giver_at
            words = [VOCABULARY[i] for i in prompt.ids.tolist()]
            assert words[prompt.giver_at] == prompt.attributes["giver"] and words[-1] == "to"
            assert prompt.attributes["receiver"] in words and prompt.answer != prompt.other_answer
            changed = {name for name in first.attributes if first.attributes[name] != prompt.attributes[name]}
            assert changed == {ORIGINAL: set(), "roles": {"giver", "receiver", "order"}}.get(edit, {edit})
        assert versions["roles"].answer == first.other_answer
        assert len((versions["roles"].ids != first.ids).nonzero()) == 1
        assert len((versions["order"].ids != first.ids).nonzero()) == 2


# taking a concept out

N_WORDS, ATOMS = 240, 6


@pytest.fixture(scope="module")
def planted():
    """A model whose first residual stream is planted: word w has atom a where bit a of its number is set.

    Atom 0 is the concept; the SAE has one latent for each atom, and for no atom its opposite on the other side.
    """
    model = sl.lm.tiny_model(seed=3)
    atoms = torch.linalg.qr(torch.randn(32, ATOMS, generator=torch.Generator().manual_seed(0))).Q.T
    generator = torch.Generator().manual_seed(1)
    bits = torch.rand(N_WORDS, ATOMS, generator=generator) < 0.5
    with torch.no_grad():
        table = hook_points_of(model).components["embed"].weight
        table[3 : 3 + N_WORDS] = (2.0 * bits.float() - 1) @ atoms + 0.02 * torch.randn(N_WORDS, 32, generator=generator)
    ids = torch.randint(3, 3 + N_WORDS, (40, 16), generator=generator)
    doc_ids = torch.arange(40, dtype=torch.int32)[:, None].expand(-1, 16).contiguous()
    tokens = sl.Tokens(ids=ids.int(), doc_ids=doc_ids, special_ids=(0, 1, 2), source="planted", bos=False, packed=False)
    labels = {f"bit {a}": bits[ids - 3, a] for a in range(ATOMS)}
    cfg = sl.SAEConfig(d_in=32, d_sae=32, activation=sl.AbsTopK(k=ATOMS), normalizer="none")
    sae = sl.SAE(cfg)
    with torch.no_grad():
        sae.W_dec[:ATOMS] = atoms
        sae.W_dec[ATOMS:] = torch.linalg.svd(atoms).Vh.repeat(2, 1)[ATOMS:32]
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return model, tokens, labels, sae


@pytest.fixture(scope="module")
def removal(planted):
    model, tokens, labels, sae = planted
    options = {"hook_point": FIRST, "read_at": FIRST, "ranking": "f", "n_random": 1}
    return erase_concept(model, tokens, labels, "bit 0", sae, k=1, **options)


def test_the_planted_feature_is_chosen_and_what_it_leaves_is_chance_or_less(removal):
    assert removal.features == (0,) and removal.signs == (1,) and len(removal.rows[0].others) == ATOMS - 1
    first = removal["untouched"]
    rare = 6 / (N_WORDS / 3) / 2  # see below
    assert first.concept.accuracy > 1 - rare and first.accuracy_of_others > 1 - rare and first.size == 0 == first.n
    # one side alone leaves the other, so absence is still encoded; and nothing is taken from tokens without the concept
    assert removal["features"].concept.accuracy > 1 - rare and removal["features"].size == 0


@pytest.mark.parametrize("method", ["means", "erasure"])
def test_directions_leave_nothing_of_the_concept_and_all_of_the_others(removal, method):
    row, n = removal[method], N_WORDS / 3
    # Tokens of a word are one activation, so words are the sample: of 240, half of the documents show about two thirds,
    # and at least n of each answer. The cut between two orders of chance that is best in training is off by half a
    # Kolmogorov-Smirnov distance, below 2.2 * sqrt(2 / n) but in 1 of 10,000 samples; AUROC has n's standard error.
    assert row.concept.accuracy < 0.5 + 2.2 * (2 / n) ** 0.5 / 2 and row.n == 1
    assert abs(row.concept.auroc - 0.5) < 4 * ((2 * n + 1) / (12 * n * n)) ** 0.5
    # A word not seen in training lies beyond the last one seen with 1 / n; balanced, that costs half of it.
    rare = 6 / n / 2
    assert row.accuracy_of_others > 1 - rare and abs(removal.harmed(method)[0][1]) < rare
    assert removal["random direction"].concept.accuracy > 1 - rare
    assert removal["random direction"].n == 1


def test_both_sides_of_a_signed_feature_are_the_whole_concept(planted):
    model, tokens, labels, sae = planted
    x = sl.lm.capture(model, tokens.ids, [FIRST])[FIRST]
    both = FeatureErasure(sae, (0, 0), (1, -1))(x)
    atom = sae.W_dec[0].detach()
    assert float((both @ atom).abs().max()) < 0.15 < 0.9 < float((x @ atom).abs().min())
    one = FeatureErasure(sae, (0,), (1,))(x)
    assert torch.equal(one[~labels["bit 0"]], x[~labels["bit 0"]])
    with sl.steer(model, sae, [0], mode="ablate", hook_point=FIRST):
        steered = sl.lm.capture(model, tokens.ids, ["blocks.0.hook_in"])["blocks.0.hook_in"]
    torch.testing.assert_close(both, steered, rtol=1e-4, atol=1e-4)


def test_codes_of_a_normalizer_that_measures_tokens_are_taken_out_in_their_own_size():
    sae = sl.SAE(sl.SAEConfig(d_in=16, d_sae=24, activation=sl.AbsTopK(k=4), normalizer="layer_norm"), seed=1)
    x = 3 * torch.randn(9, 16, generator=torch.Generator().manual_seed(0)) + 2
    z = sae.encode(x).detach()
    j = int((z < 0).sum(0).argmax())
    rest = torch.where((torch.arange(24) == j) & (z < 0), 0, z)
    assert not torch.equal(rest, z)
    by_hand = x + (sae.decode(rest, x=x) - sae.decode(z, x=x)).detach()
    torch.testing.assert_close(FeatureErasure(sae, (j,), (-1,))(x), by_hand)


def test_nothing_stays_behind_and_losses_are_those_of_the_text(planted, removal):
    model, tokens, labels, _ = planted
    losses = sl.lm.next_token_loss(sl.lm.logits(model, tokens.ids), tokens.ids)
    from saelab.stores.corpus import split_documents

    held = torch.from_numpy(~split_documents(tokens.doc_ids.flatten().numpy(), 0.5, 0)).view_as(tokens.ids)
    has = labels["bit 0"][:, 1:] | labels["bit 0"][:, :-1]
    first = removal["untouched"]
    assert first.loss_without == pytest.approx(float(losses[held[:, 1:] & ~has].mean()), rel=1e-4)
    assert first.loss_with == pytest.approx(float(losses[held[:, 1:] & has].mean()), rel=1e-4)
    assert removal.n_predictions == int((held[:, 1:] & ~has).sum())
    with sl.splice(model, {FIRST: removal.edits["erasure"]}):
        assert float((sl.lm.next_token_loss(sl.lm.logits(model, tokens.ids), tokens.ids) - losses).abs().max()) > 1e-3
    assert "edits" not in removal.to_dict() and "random direction" in str(removal) and len(removal.edits) == 4


def test_random_sides_fire_as_often_and_are_others(planted):
    model, tokens, labels, sae = planted
    x = sl.lm.capture(model, tokens.ids, [FIRST])[FIRST].flatten(0, 1)
    codes = encode_csr(sae, x)
    features, signs = choose_sides(
        codes, labels["bit 0"].flatten().numpy(), 1, "effect", (sae.W_dec @ sae.W_dec[0]).detach().numpy()
    )
    assert features == (0,) and signs in ((1,), (-1,)), "its two sides pull alike, and noise decides"
    drawn = {draw_like(codes, features, signs, np.random.default_rng(i)) for i in range(8)}
    assert len(drawn) > 1 and all(pair != (features, signs) for pair in drawn)
    with pytest.raises(ValueError, match="`k` must be at most the number of sides"):
        choose_sides(codes, labels["bit 0"].flatten().numpy(), 100, "f", np.zeros(32))


def test_directions_go_to_what_is_usual_or_to_zero():
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(300, generator=generator) < 0.3
    x = torch.randn(300, 8, generator=generator) + 5.0
    x[y, 0] += 4.0
    for to, left in (("usual", float(x[~y, 0].mean())), ("zero", 0.0)):
        edit = erase_direction(x, y, FIRST, "means", to=to)
        v = edit.read[0]
        torch.testing.assert_close(edit(x) @ v, (edit.center @ v).expand(300), rtol=1e-4, atol=1e-4)
        assert float(edit.center[0]) == pytest.approx(left, abs=1e-5)
    several = erase_direction(x, y, FIRST, "probe", 3)
    torch.testing.assert_close(several.read @ several.read.T, torch.eye(3), rtol=1e-4, atol=1e-4)
    drawn = draw_directions(several, 1)
    torch.testing.assert_close(drawn.read @ drawn.read.T, torch.eye(3), rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn.center, several.center)
    with pytest.raises(ValueError, match="between means must be 1"):
        erase_direction(x, y, FIRST, "means", 2)


def test_the_least_erasure_is_the_smallest_that_makes_the_means_equal():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    y = torch.rand(2000, generator=generator) < 0.4
    x = (torch.randn(2000, 6, generator=generator) + 1.5 * y[:, None].float()) @ mix
    least, means = erase_least(x, y)(x), erase_direction(x, y, FIRST, "means")(x)
    torch.testing.assert_close(least[y].mean(0), least[~y].mean(0), rtol=1e-3, atol=1e-3)
    scale = torch.linalg.inv(torch.cov(x.T))
    cost = [float(torch.einsum("ni,ij,nj->n", d, scale, d).mean()) for d in (least - x, means - x)]
    assert cost[0] < cost[1]


@unchecked()
def test_removal_refuses_what_makes_no_sense(planted):
    model, tokens, labels, sae = planted
    for change, match in (
        ({"concept": "bit 9"}, "`concept` must be one of the labels, got 'bit 9'"),
        ({"hook_point": None}, "`hook_point` must be given"),
        ({"methods": ("magic",)}, "`methods` must be of"),
        ({"sae": None, "methods": ("features",)}, "'features' with an SAE"),
        ({"labels": {}}, "Labels must have at least one name"),
        ({"n_random": -1}, "`n_random` must be at least 0, got -1"),
        ({"labels": {"bit 0": labels["bit 0"] & (tokens.doc_ids == 0)}}, "must hold, and not hold, of 20 tokens"),
    ):
        options = {"concept": "bit 0", "labels": labels, "sae": sae, "hook_point": FIRST} | change
        with pytest.raises(ValueError, match=match):
            erase_concept(model, tokens, **options)


def test_a_task_of_a_raw_model_is_that_of_the_loaded_one():
    """A Hugging Face model as it is, which other functions take, too."""
    model = sl.lm.tiny_model(seed=3)
    ids = torch.tensor([[0, 70], [0, 71], [0, 72], [0, 73]])
    names, answers = [{"letter": name} for name in "abcd"], sl.lm.logits(model, ids)[:, -1].argmax(1)
    given = {
        "hook_point": "blocks.1.hook_resid_post",
        "ids": {ORIGINAL: ids, "letter": ids.flip(0)},
        "lengths": torch.full((4,), 2),
        "places": torch.full((4, 1), -1),
        "place_names": ("end",),
        "attributes": {ORIGINAL: names, "letter": names[::-1]},
        "answers": answers,
        "other_answers": (answers + 1) % 100,
        "asks": ("letter",) * 4,
    }
    raw, loaded = EditTask(model=model.original_model, **given), EditTask(model=model, **given)
    assert isinstance(raw.model, type(loaded.model))
    x = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0))
    for at in (None, x):
        np.testing.assert_allclose(np.asarray(raw.predict(at)), np.asarray(loaded.predict(at)), atol=1e-6)
