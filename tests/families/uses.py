"""What saelab is used for, each use held against Hugging Face's own modules or a derivative measured on them."""

from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import torch
from family import SHIFT, WIDTH, Edit, Family, Wrong, same, texts_of
from torch import Tensor

import saelab as sl
from saelab.lm.caching import find_border
from saelab.lm.hook_points import hook_points_of
from saelab.lm.model_checks import find_context
from saelab.lm.unembedding import read_out

PROMPTS = ["Hello you", "Hi", "a longer beginning"]
N_CTX = 64
"""positions that the configurations of table.py have, where they have any"""
UNIT = SHIFT / SHIFT.norm() * 10


def use_logits(family: Family) -> None:
    """Logits, of right-padded rows too."""
    same(sl.lm.logits(family.model, family.ids), family.run(family.ids), "logits")
    padded = torch.cat([family.ids[:1, :7], torch.full((1, 5), 2)], 1)
    rows = torch.cat([padded, family.ids[1:]])
    same(sl.lm.logits(family.model, rows)[:1, :7], family.run(family.ids[:1, :7]), "right-padded logits")


def use_hooks(family: Family) -> None:
    """The residual stream at every block, and block 1's against a hook of PyTorch's."""
    seen: list[Tensor] = []
    with family.by_hand(lambda x: seen.append(x.clone()) or x):
        family.run(family.ids)
    same(sl.lm.capture(family.model, family.ids, [family.point])[family.point], seen[0], family.point)
    agreement = sl.lm.verify_hooks(family.model)
    captured = all(error <= agreement.tolerance for error in agreement.captured)
    if not captured or not agreement.ok:
        raise Wrong("verify_hooks: " + ", ".join(f"{e:.0e}" for e in (*agreement.captured, *agreement.bridge)))


def use_stream(family: Family) -> None:
    """Outputs of block 1's parts are Hugging Face's; they add up to the block's own, each by a factor of the family's.

    A block hands on to the next what it gives out. Factors (multipliers of residuals, scalars of layers, halves of
    RWKV) are fitted: a dozen at most for 768 numbers, so that a part left out or a wrong one is seen.
    """
    home, block, ids = hook_points_of(family.model), family.blocks[1], family.ids
    flow = [f"{block}.hook_in", f"{block}.hook_out", f"{family.blocks[2]}.hook_in"]
    before, after, handed = sl.lm.capture(family.model, ids, flow).values()
    same(handed, (handed * after).sum() / after.square().sum() * after, "the next block's input")
    parts: dict[str, Any] = {}
    for name in home.components:
        if name.rpartition(".")[0] == block:
            with suppress(KeyError):
                parts[name] = family.module(name)
    outputs = family.watch(parts, ids)
    for name, expected in outputs.items():
        found = sl.lm.capture(family.model, ids, [f"{name}.hook_out"])[f"{name}.hook_out"]
        same(found, expected, f"{name}.hook_out")
    within = family.watch(dict(family.module(block).named_children()), ids)  # some parts have no hook point
    columns = torch.stack([x.double() for x in (before, *outputs.values(), *within.values())], -1).flatten(0, 1)
    grown = after.double()[..., None].flatten(0, 1)
    by_channel = columns.transpose(0, 1), grown.transpose(0, 1)  # factors of each channel, as Doge has them
    for parts, whole in ((columns.flatten(0, 1), grown.flatten(0, 1)), by_channel):
        left = whole - parts @ torch.linalg.lstsq(parts, whole, driver="gelsd").solution
        if left.norm() <= 1e-3 * (after - before).norm():
            return
    raise Wrong(f"the parts of {block} do not add up: {float(left.norm() / (after - before).norm()):.1e} left")


def use_cached(family: Family) -> None:
    """Greedy text of one prompt, with a cache and without."""
    expected = family.write(PROMPTS[0])
    for use_cache in (True, False):
        if not family.is_text(texts_of(family, PROMPTS[:1], use_cache=use_cache), [expected]):
            raise Wrong(f"text with use_cache={use_cache}")


def use_batched(family: Family) -> None:
    """Greedy texts of unequal prompts together."""
    expected = [family.write(prompt) for prompt in PROMPTS]
    for use_cache in (True, False):
        if not family.is_text(texts_of(family, PROMPTS, use_cache=use_cache), expected):
            raise Wrong(f"texts of a batch with use_cache={use_cache}")


def use_borders(family: Family) -> None:
    """Texts over the borders of windows and position schemes, at 12 and 16 tokens."""
    long = ["fourteen bytes", "twenty bytes of text", "short"]
    border = find_border(family.theirs)
    expected = [family.write(prompt) for prompt in long]
    for use_cache in (True, False):
        if not family.is_text(texts_of(family, long, use_cache=use_cache), expected):
            raise Wrong(f"texts over a border with use_cache={use_cache} {border or ''}".strip())


def use_context(family: Family) -> None:
    """Rows longer than the context: an error where Hugging Face has one, else the same; texts are right or refused."""
    ids = torch.randint(3, 250, (1, N_CTX + 8), generator=torch.Generator().manual_seed(3))
    try:
        expected = family.run(ids)
    except Exception:
        expected = None
    try:
        found = sl.lm.logits(family.model, ids)
    except Exception:
        if expected is not None:
            raise
    else:
        if expected is None:
            raise Wrong("logits behind the context, where Hugging Face has none")
        same(found, expected, "logits behind the context")
    prompt = "x" * (N_CTX - 4)
    if find_context(family.model) > N_CTX:
        if not family.is_text(texts_of(family, [prompt], 8), [family.write(prompt, 8)]):
            raise Wrong("a text behind 64 tokens")
        return
    try:
        texts_of(family, [prompt], 8)
    except ValueError as error:
        if "must fit the model's context" in str(error):
            return
        raise
    raise Wrong("a text longer than the context")


@contextmanager
def _steered(family: Family):
    with sl.steer(
        family.model, sl.Direction(SHIFT, family.point), 10.0, where=sl.interventions.TokenSelector(special=True)
    ):
        yield


def use_steering(family: Family) -> None:
    """Steered logits, and texts cached, uncached, in a batch."""
    with family.by_hand(lambda x: x + UNIT.to(x)):
        expected = [family.write(prompt) for prompt in PROMPTS]
        logits = family.run(family.ids)
    with _steered(family):
        same(sl.lm.logits(family.model, family.ids), logits, "steered logits")
        for use_cache in (True, False):
            if texts_of(family, PROMPTS, use_cache=use_cache) != expected:
                raise Wrong(f"steered texts with use_cache={use_cache}")


def use_generate(family: Family) -> None:
    """Hugging Face's own `generate` while steered, alone and padded on the left, cached or not: as edited by hand."""
    rows = [family.model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    n_pad = len(rows[0]) - len(rows[1])
    ids = torch.tensor([rows[0], [2] * n_pad + rows[1]])
    real = torch.ones_like(ids)
    real[1, :n_pad] = 0

    def push(x: Tensor) -> Tensor:
        moved = torch.ones(*x.shape[:2], *[1] * (x.ndim - 2), dtype=x.dtype)
        if x.shape[1] > 1 and len(x) > 1:  # one column alone comes behind a cache
            moved[1, :n_pad] = 0
        return x + moved * UNIT.to(x)

    alone = torch.tensor(rows[:1])
    for given, mask in ((alone, torch.ones_like(alone)), (ids, real)):
        for use_cache in (True, False):
            options: dict[str, Any] = {"attention_mask": mask, "use_cache": use_cache, "pad_token_id": 2}
            options |= {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
            with family.by_hand(push):
                expected = _generate(family.theirs, given, options)
            with _steered(family):
                found = _generate(family.model.original_model, given, options)
            if isinstance(found, Exception) and not isinstance(expected, Exception):
                if use_cache and "A forward may go on from a cache only where" in str(found):
                    continue  # as documented: run it without a cache
                raise found
            if isinstance(found, Tensor) and not (isinstance(expected, Tensor) and torch.equal(found, expected)):
                raise Wrong(f"generate of {len(given)} rows with use_cache={use_cache}")


def _generate(model: Any, ids: Tensor, options: dict[str, Any]) -> Tensor | Exception:
    """What Hugging Face's `generate` gives; it knows not every model in every way."""
    try:
        with torch.no_grad():
            return model.generate(ids, **options)
    except Exception as error:
        return error


def use_splice(family: Family) -> None:
    """Logits with block 1's output replaced."""
    with family.by_hand(lambda x: 0.5 * x + SHIFT.to(x)):
        expected = family.run(family.ids)
    with sl.splice(family.model, {family.point: lambda x: 0.5 * x + SHIFT.to(x)}):
        same(sl.lm.logits(family.model, family.ids), expected, "spliced logits")


def _make_sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=WIDTH, d_sae=64, activation=sl.TopK(k=4)), seed=0)


def _measure_loss(family: Family) -> Tensor:
    log_probs = family.run(family.ids).double().log_softmax(-1)[:, :-1]
    return -log_probs.gather(2, family.ids[:, 1:, None])[..., 0]


def _evaluate(family: Family, sae: sl.SAE) -> Tensor:
    rows = torch.arange(len(family.ids))[:, None].expand_as(family.ids)
    tokens = sl.Tokens(ids=family.ids.int(), doc_ids=rows.int(), packed=False)
    options: dict[str, Any] = {"hook_point": family.point, "n_bootstrap": 0, "baselines": False, "progress": False}
    found = sl.evaluate(sae, family.model, tokens, **options)
    return torch.tensor([found.ce_clean, found.ce_sae, found.ce_zero])


def _evaluate_by_hand(family: Family, sae: sl.SAE) -> Tensor:
    edits: list[Edit] = [lambda x: x, lambda x: sae(x).detach().to(x), torch.zeros_like]
    losses = []
    for edit in edits:
        with family.by_hand(edit):
            losses.append(_measure_loss(family).mean())
    return torch.stack(losses)


def use_evaluation(family: Family) -> None:
    """Losses, and those of `evaluate`: clean, through an untrained SAE, of zeros: Hugging Face's own, by hand."""
    same(sl.lm.next_token_loss(sl.lm.logits(family.model, family.ids), family.ids), _measure_loss(family), "losses")
    sae = _make_sae()
    same(_evaluate(family, sae), _evaluate_by_hand(family, sae), "losses of evaluate")


def use_attribution(family: Family) -> None:
    """The effect of the largest active feature before the last token: a central difference on Hugging Face's model."""
    sae = _make_sae()
    found = sl.interventions.attribute(family.model, sae, PROMPTS[0], 7, hook_point=family.point, progress=False)
    ids = torch.tensor([family.model.tokenizer(PROMPTS[0])["input_ids"]])
    inner = [i for i, place in enumerate(found.positions) if 0 < place < ids.shape[1] - 1]
    node = max(inner, key=lambda i: abs(float(found.effects[i])))
    place, along = int(found.positions[node]), sae.directions()[int(found.features[node])].detach()
    slope = _differ(family, ids, place, along, lambda logits: logits[0, -1].log_softmax(-1)[7])
    measured = -float(found.codes[node]) * slope
    if not abs(float(found.effects[node]) - measured) <= 1e-2 * abs(measured) + 1e-4:
        raise Wrong(f"effect {found.effects[node]:.4f} for {measured:.4f}")


def use_gradient(family: Family) -> None:
    """The gradient that attribution goes by, at block 1: central differences."""
    along, ids = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)), family.ids[:1]
    step = torch.zeros((), requires_grad=True)
    with sl.splice(family.model, {family.point: lambda x: _push(x, 4, step * along)}):
        (slope,) = torch.autograd.grad(sl.lm.logits(family.model, ids, grad=True)[0, -1, 7], step)
    measured = _differ(family, ids, 4, along, lambda logits: logits[0, -1, 7])
    if not abs(float(slope) - measured) <= 1e-2 * abs(measured) + 1e-4:
        raise Wrong(f"gradient {float(slope):.4f} for {measured:.4f}")


def _push(x: Tensor, place: int, by: Tensor) -> Tensor:
    return torch.cat([x[:, :place], x[:, place : place + 1] + by.to(x), x[:, place + 1 :]], 1)


def _differ(family: Family, ids: Tensor, place: int, along: Tensor, read: Callable[[Tensor], Tensor]) -> float:
    """A central difference of Hugging Face's logits along a direction behind block 1, at one token.

    The step is wide enough for families that compute parts in float32 whatever they get.
    """
    wide, sides = family.widened(), []
    for size in (2e-3, -2e-3):
        with wide.by_hand(lambda x, size=size: _push(x, place, size * along)):
            sides.append(float(read(wide.run(ids).double())))
    return (sides[0] - sides[1]) / 4e-3


def use_lens(family: Family) -> None:
    """`read_out`: the measured derivative at the last block, where the norm's scale stays as it is."""
    model, last = family.model, f"{family.blocks[-1]}.hook_out"
    x = sl.lm.capture(model, family.ids[:1], [last])[last][0, -1].double()
    along = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for centered in (False, True):
        mid = x - x.mean() if centered else x
        way = along - along.mean(1, keepdim=True) if centered else along
        way = way - (way @ mid)[:, None] * mid / (mid @ mid)
        found = read_out(model, way.float()).double() / mid.square().mean().sqrt()
        cap = _find_cap(family.theirs.config)
        if cap:
            found = found * (1 - (sl.lm.logits(model, family.ids[:1])[0, -1].double() / cap).square())
        measured = torch.stack([_slope(family, row, 1e-2 * float(mid.square().mean().sqrt())) for row in way])
        error = float((found - measured).norm() / measured.norm().clamp(min=1e-9))
        if error < 5e-3:
            return
    raise Wrong(f"read_out {error:.1e} away from the measured derivative")


def _find_cap(config: Any) -> float | None:
    text = config.get_text_config()
    return getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)


def _slope(family: Family, along: Tensor, step: float) -> Tensor:
    sides, last = [], family.ids.shape[1] - 1
    for size in (step, -step):
        with family.by_hand(lambda x, size=size: _push(x, last, size * along), block=-1):
            sides.append(family.run(family.ids[:1])[0, -1].double())
    return (sides[0] - sides[1]) / (2 * step)


def use_foreign(family: Family) -> None:
    """With hooks of the user's on the model, of transformer_lens' kind too, they take part in whatever saelab does."""
    home, sae = hook_points_of(family.model), _make_sae()
    sl.lm.capture(family.model, family.ids, [family.point])  # one that never fires runs nobody's hooks
    behind = home.components[family.blocks[2]]

    def turn(_module: Any, _args: Any, out: Any) -> Any:
        return type(out)([-out[0], *out[1:]]) if isinstance(out, tuple | list) else -out

    with family.by_hand(lambda x: x + SHIFT.to(x)), family.by_hand(lambda x: -x, block=2):
        plain, text, losses = family.run(family.ids), family.write(PROMPTS[0]), _evaluate_by_hand(family, sae)
        with family.by_hand(lambda x: x + UNIT.to(x)):
            moved, steered = family.run(family.ids), family.write(PROMPTS[0])
    with family.hooked(lambda x: x + SHIFT.to(x)), behind.register_forward_hook(turn):
        same(sl.lm.logits(family.model, family.ids), plain, "logits with foreign hooks")
        same(_evaluate(family, sae), losses, "losses with foreign hooks")
        if texts_of(family, PROMPTS[:1]) != [text]:
            raise Wrong("text with foreign hooks")
        with _steered(family):
            same(sl.lm.logits(family.model, family.ids), moved, "steered logits with foreign hooks")
            if texts_of(family, PROMPTS[:1]) != [steered]:
                raise Wrong("steered text with foreign hooks")
    same(sl.lm.logits(family.model, family.ids), family.run(family.ids), "logits when the hooks are gone")


USES: dict[str, Callable[[Family], None]] = {
    "logits": use_logits, "hooks": use_hooks, "stream": use_stream, "text": use_cached, "batch": use_batched,
    "borders": use_borders, "context": use_context, "steering": use_steering, "generate": use_generate,
    "splicing": use_splice, "evaluation": use_evaluation, "gradient": use_gradient, "attribution": use_attribution,
    "lens": use_lens, "foreign hook": use_foreign,
}  # fmt: skip
