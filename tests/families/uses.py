"""What saelab is used for, each use held against Hugging Face's own modules or a derivative measured on them."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import saelab as sl
from saelab.lm.cache import find_border
from saelab.lm.lens import read_out

N = 6
POINT = "blocks.1.hook_out"
PROMPTS = ["Hello you", "Hi", "a longer beginning"]
SHIFT = 4 * torch.arange(32.0).cos()


class Wrong(AssertionError):
    """A number or a text is not what it has to be."""


class Family:
    """A random Hugging Face model, and saelab's of the same weights."""

    def __init__(self, theirs: Any) -> None:
        from saelab.lm.models import _byte_tokenizer

        self.theirs = theirs
        self.model = sl.load_model(theirs, tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")))
        self.ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))

    def run(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.theirs(ids, use_cache=False).logits

    def layer(self) -> Any:
        """Hugging Face's own module of block 1."""
        wrapper = self.model.blocks[1]
        paths = [path for path, module in self.model.original_model.named_modules() if module is wrapper]
        return self.theirs.get_submodule(paths[0].replace("._original_component", ""))

    def widened(self) -> "Family":
        """Hugging Face's model in float64, its experts one by one: their grouped products know no float64."""
        wide = Family.__new__(Family)
        wide.theirs, wide.model, wide.ids = copy.deepcopy(self.theirs), self.model, self.ids
        if wide.theirs._can_set_experts_implementation():
            wide.theirs.set_experts_implementation("eager")
        wide.theirs.double()
        return wide

    @contextmanager
    def by_hand(self, edit: Callable[[Tensor], Tensor]):
        """The edit on what block 1 hands on, by a hook of PyTorch's."""

        def hook(_module: Any, _args: Any, out: Any) -> Any:
            return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

        with self.layer().register_forward_hook(hook):
            yield

    def write(self, prompt: str, n: int = N) -> tuple[int, ...]:
        """Greedy text of Hugging Face's forwards over the whole text, without any cache."""
        ids = torch.tensor([self.model.tokenizer(prompt)["input_ids"]])
        for _ in range(n):
            ids = torch.cat([ids, self.run(ids)[:, -1:].argmax(-1)], 1)
        return tuple(ids[0].tolist())


def _same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-3) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))
    if not error <= tolerance:
        raise Wrong(f"{what} {error:.1e} away")


def _texts(family: Family, prompts: list[str], **options: Any) -> list[tuple[int, ...]]:
    made = sl.generate(family.model, prompts, N, temperature=0, stop_at_eos=False, progress=False, **options)
    return [one.all_ids for one in made]


def use_logits(family: Family) -> None:
    """Logits, of right-padded rows too."""
    _same(sl.logits(family.model, family.ids), family.run(family.ids), "logits")
    padded = torch.cat([family.ids[:1, :7], torch.full((1, 5), 2)], 1)
    rows = torch.cat([padded, family.ids[1:]])
    _same(sl.logits(family.model, rows)[:1, :7], family.run(family.ids[:1, :7]), "right-padded logits")


def use_hooks(family: Family) -> None:
    """The residual stream at every block, and block 1's against a hook of PyTorch's."""
    seen: list[Tensor] = []
    with family.by_hand(lambda x: seen.append(x.clone()) or x):
        family.run(family.ids)
    _same(sl.capture(family.model, family.ids, [POINT])[POINT], seen[0], POINT)
    agreement = sl.verify_hooks(family.model)
    if not agreement.ok:
        raise Wrong("verify_hooks: " + ", ".join(f"{e:.0e}" for e in (*agreement.captured, *agreement.bridge)))


def use_stream(family: Family) -> None:
    """The block's input, attention and MLP add up to its output, where the family has these hook points."""
    names = [f"blocks.1.hook_{part}" for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    before, attention, mlp, after = sl.capture(family.model, family.ids, names).values()
    _same(before + attention + mlp, after, "resid_pre + attn_out + mlp_out")


def use_cached(family: Family) -> None:
    """Greedy text of one prompt, with a cache and without."""
    expected = family.write(PROMPTS[0])
    for use_cache in (True, False):
        if _texts(family, PROMPTS[:1], use_cache=use_cache) != [expected]:
            raise Wrong(f"text with use_cache={use_cache}")


def use_batched(family: Family) -> None:
    """Greedy texts of unequal prompts together."""
    expected = [family.write(prompt) for prompt in PROMPTS]
    for use_cache in (True, False):
        if _texts(family, PROMPTS, use_cache=use_cache) != expected:
            raise Wrong(f"texts of a batch with use_cache={use_cache}")


def use_borders(family: Family) -> None:
    """Texts over the borders of windows and position schemes, at 12 and 16 tokens; not over the context's own."""
    long = ["fourteen bytes", "twenty bytes of text", "short"]
    border = find_border(family.theirs)
    expected = [family.write(prompt) for prompt in long]
    for use_cache in (True, False):
        if _texts(family, long, use_cache=use_cache) != expected:
            raise Wrong(f"texts over a border with use_cache={use_cache} {border or ''}".strip())


def use_steering(family: Family) -> None:
    """Steered logits, and texts cached, uncached, in a batch."""
    with family.by_hand(lambda x: x + SHIFT.to(x) / SHIFT.norm() * 10):
        expected = [family.write(prompt) for prompt in PROMPTS]
        logits = family.run(family.ids)
    with sl.steer(family.model, sl.Direction(SHIFT, POINT), 10.0, where=sl.Where(special=True)):
        _same(sl.logits(family.model, family.ids), logits, "steered logits")
        for use_cache in (True, False):
            if _texts(family, PROMPTS, use_cache=use_cache) != expected:
                raise Wrong(f"steered texts with use_cache={use_cache}")


def use_splice(family: Family) -> None:
    """Logits with block 1's output replaced."""
    with family.by_hand(lambda x: 0.5 * x + SHIFT.to(x)):
        expected = family.run(family.ids)
    with sl.splice(family.model, {POINT: lambda x: 0.5 * x + SHIFT.to(x)}):
        _same(sl.logits(family.model, family.ids), expected, "spliced logits")


def use_loss(family: Family) -> None:
    """Next-token losses: Hugging Face's own logits, by hand."""
    found = sl.next_token_loss(sl.logits(family.model, family.ids), family.ids)
    log_probs = family.run(family.ids).double().log_softmax(-1)[:, :-1]
    _same(found, -log_probs.gather(2, family.ids[:, 1:, None])[..., 0], "losses")


def _make_sae() -> sl.SAE:
    return sl.SAE(sl.SAEConfig(d_in=32, d_sae=64, activation=sl.TopK(k=4)), seed=0)


def use_evaluation(family: Family) -> None:
    """The clean loss of `evaluate`, of an untrained SAE: Hugging Face's own logits, by hand."""
    rows = torch.arange(len(family.ids))[:, None].expand_as(family.ids)
    tokens = sl.Tokens(ids=family.ids.int(), doc_ids=rows.int(), packed=False)
    options: dict[str, Any] = {"hook_point": POINT, "n_bootstrap": 0, "baselines": False, "progress": False}
    found = sl.evaluate(_make_sae(), family.model, tokens, **options).ce_clean
    log_probs = family.run(family.ids).double().log_softmax(-1)[:, :-1]
    expected = -log_probs.gather(2, family.ids[:, 1:, None]).mean()
    _same(torch.tensor(found), expected, "clean loss")


def use_attribution(family: Family) -> None:
    """The effect of the largest active feature before the last token: a central difference on Hugging Face's model."""
    sae = _make_sae()
    found = sl.attribute(family.model, sae, PROMPTS[0], 7, hook_point=POINT, progress=False)
    ids = torch.tensor([family.model.tokenizer(PROMPTS[0])["input_ids"]])
    inner = [i for i, place in enumerate(found.positions) if 0 < place < ids.shape[1] - 1]
    node = max(inner, key=lambda i: abs(float(found.effects[i])))
    place, along = int(found.positions[node]), sae.directions()[int(found.features[node])].detach()
    wide = family.widened()

    def by_hand(size: float) -> float:
        def push(x: Tensor) -> Tensor:
            return torch.cat([x[:, :place], x[:, place : place + 1] + size * along.to(x), x[:, place + 1 :]], 1)

        with wide.by_hand(push):
            return float(wide.run(ids)[0, -1].log_softmax(-1)[7])

    measured = -float(found.codes[node]) * (by_hand(2e-3) - by_hand(-2e-3)) / 4e-3
    if not abs(float(found.effects[node]) - measured) <= 1e-2 * abs(measured) + 1e-4:
        raise Wrong(f"effect {found.effects[node]:.4f} for {measured:.4f}")


def use_gradient(family: Family) -> None:
    """The gradient that attribution goes by, at block 1: central differences."""
    along = torch.randn(32, generator=torch.Generator().manual_seed(2))
    target = 7

    def run(step: Tensor) -> Tensor:
        def push(x: Tensor) -> Tensor:
            return torch.cat([x[:, :4], x[:, 4:5] + step * along.to(x), x[:, 5:]], 1)

        with sl.splice(family.model, {POINT: push}):
            return sl.logits(family.model, family.ids[:1], grad=True)[0, -1, target]

    step = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(run(step), step)
    wide = family.widened()

    def by_hand(size: float) -> Tensor:
        def push(x: Tensor) -> Tensor:
            return torch.cat([x[:, :4], x[:, 4:5] + size * along.to(x), x[:, 5:]], 1)

        with wide.by_hand(push):
            return wide.run(wide.ids[:1])[0, -1, target]

    measured = (by_hand(2e-3) - by_hand(-2e-3)) / 4e-3  # some families compute parts in float32 whatever they get
    if not abs(float(slope) - float(measured)) <= 1e-2 * abs(float(measured)) + 1e-4:
        raise Wrong(f"gradient {float(slope):.4f} for {float(measured):.4f}")


def use_lens(family: Family) -> None:
    """`read_out`: the measured derivative at the last block, where the norm's scale stays as it is."""
    model, last = family.model, f"blocks.{family.model.cfg.n_layers - 1}.hook_out"
    x = sl.capture(model, family.ids[:1], [last])[last][0, -1].double()
    along = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for centred in (False, True):
        mid = x - x.mean() if centred else x
        way = along - along.mean(1, keepdim=True) if centred else along
        way = way - (way @ mid)[:, None] * mid / (mid @ mid)
        found = read_out(model, way.float()).double() / mid.square().mean().sqrt()
        cap = _find_cap(family.theirs.config)
        if cap:
            found = found * (1 - (sl.logits(model, family.ids[:1])[0, -1].double() / cap).square())
        measured = torch.stack([_slope(model, family.ids[:1], last, row) for row in way])
        error = float((found - measured).norm() / measured.norm().clamp(min=1e-9))
        if error < 5e-3:
            return
    raise Wrong(f"read_out {error:.1e} away from the measured derivative")


def _find_cap(config: Any) -> float | None:
    text = config.get_text_config()
    return getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)


def _slope(model: Any, ids: Tensor, point: str, along: Tensor, step: float = 1e-2) -> Tensor:
    sides = []
    for size in (step, -step):

        def push(x: Tensor, by: Tensor = size * along) -> Tensor:
            x[:, -1] += by.to(x)
            return x

        with sl.splice(model, {point: push}):
            sides.append(sl.logits(model, ids)[0, -1].double())
    return (sides[0] - sides[1]) / (2 * step)


def use_foreign(family: Family) -> None:
    """A hook of transformer_lens' own on block 1 takes part in logits and in a steered text."""
    with family.by_hand(lambda x: x + SHIFT.to(x)):
        expected, text = family.run(family.ids), family.write(PROMPTS[0])
    family.model.blocks[1].hook_out.add_hook(lambda x, hook: x + SHIFT.to(x))
    try:
        _same(sl.logits(family.model, family.ids), expected, "logits with a foreign hook")
        if _texts(family, PROMPTS[:1]) != [text]:
            raise Wrong("text with a foreign hook")
    finally:
        family.model.reset_hooks()


USES: dict[str, Callable[[Family], None]] = {
    "logits": use_logits, "hooks": use_hooks, "stream": use_stream, "text": use_cached, "batch": use_batched,
    "borders": use_borders, "steering": use_steering, "splicing": use_splice, "loss": use_loss,
    "evaluation": use_evaluation, "gradient": use_gradient, "attribution": use_attribution, "lens": use_lens,
    "foreign hook": use_foreign,
}  # fmt: skip
