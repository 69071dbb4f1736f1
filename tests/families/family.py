"""A random Hugging Face model beside saelab's of the same weights, and what is done to it by hand."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import saelab as sl
from saelab.lm.generation import GREEDY
from saelab.lm.hook_points import hook_points_of
from saelab.lm.huggingface import HuggingFaceModel
from saelab.lm.model_checks import Model
from saelab.lm.models import _byte_tokenizer

N = 6
"""tokens of a text"""
WIDTH = 32
SHIFT = 4 * torch.arange(float(WIDTH)).cos()
Edit = Callable[[Tensor], Tensor]


class Wrong(AssertionError):
    """A number or a text is not what it has to be."""


class Family:
    """A random Hugging Face model, and saelab's of the same weights."""

    def __init__(self, theirs: Any, backend: str = "auto") -> None:
        self.theirs = theirs
        # A plain model would be the object itself: hooks and settings of the one must not be felt by the other.
        given = theirs if backend == "transformer_lens" else copy.deepcopy(theirs)
        self.model: Model = sl.load_model(given, tokenizer=_byte_tokenizer(("<s>", "</s>", "<pad>")), backend=backend)
        self.ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
        self._take_eager_attention()

    def _take_eager_attention(self) -> None:
        """Compare with Hugging Face's eager attention, the definition, where its other one computes something else.

        In transformers 5.9 the fused attention of Gemma 2 leaves the soft cap out, and that of GLM's sparse one is not
        causal.
        """
        given, fused = self.theirs.config._attn_implementation, self.run(self.ids)
        self.theirs.set_attn_implementation("eager")
        if (self.run(self.ids) - fused).abs().max() <= 1e-4 * fused.abs().max():
            self.theirs.set_attn_implementation(given)
        elif isinstance(self.model, HuggingFaceModel):  # computes as its owner has chosen
            self.model.original_model.set_attn_implementation("eager")

    @property
    def blocks(self) -> list[str]:
        """The blocks' names, in order: "blocks.0", or the first of several stacks."""
        found = [
            match
            for name in hook_points_of(self.model).points
            if (match := re.fullmatch(r"(\w*blocks\.\d+)\.hook_out", name))
        ]
        stack = sorted({match[1].partition(".")[0] for match in found}, key=lambda name: (name != "blocks", name))[0]
        names = {match[1] for match in found if match[1].startswith(f"{stack}.")}
        return sorted(names, key=lambda name: int(name.rpartition(".")[2]))

    @property
    def point(self) -> str:
        """Behind block 1."""
        return f"{self.blocks[1]}.hook_out"

    @property
    def width(self) -> int | None:
        """Width of what block 1 hands on, where that is one vector a token."""
        seen: list[Tensor] = []
        try:
            with self.by_hand(lambda x: seen.append(x) or x):
                self.run(self.ids)
        except (StopIteration, KeyError):
            return None
        return seen[0].shape[-1] if seen and seen[0].ndim == 3 else None

    def run(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.theirs(ids, use_cache=False).logits

    def module(self, component: str) -> nn.Module:
        """Hugging Face's own module behind a component of the bridge; KeyError where that only groups others."""
        wrapper, own = hook_points_of(self.model).components[component], dict(self.theirs.named_modules())
        inside = next(path for path, module in self.model.original_model.named_modules() if module is wrapper)
        return own[inside.replace("._original_component", "")]

    def widened(self) -> "Family":
        """Hugging Face's model in float64, its experts one by one: their grouped products know no float64.

        In float32 where the model has no other way (masks filled with the lowest float32 number).
        """
        wide = Family.__new__(Family)
        wide.theirs, wide.model, wide.ids = copy.deepcopy(self.theirs), self.model, self.ids
        if wide.theirs._can_set_experts_implementation():
            wide.theirs.set_experts_implementation("eager")
        wide.theirs.double()
        try:
            wide.run(self.ids)
        except RuntimeError:
            wide.theirs.float()
        return wide

    @contextmanager
    def by_hand(self, edit: Edit, block: int = 1) -> Iterator[None]:
        """The edit on what a block hands on, by a hook of PyTorch's."""

        def hook(_module: Any, _args: Any, out: Any) -> Any:
            return type(out)([edit(out[0]), *out[1:]]) if isinstance(out, tuple | list) else edit(out)

        with self.module(self.blocks[block]).register_forward_hook(hook):
            yield

    @contextmanager
    def hooked(self, edit: Edit) -> Iterator[None]:
        """The edit on what block 1 hands on, by a hook of the user's on saelab's model."""
        if not isinstance(self.model, HuggingFaceModel):
            self.model.hook_dict[self.point].add_hook(lambda x, hook: edit(x))
            try:
                yield
            finally:
                self.model.reset_hooks()
            return

        def hook(_module: Any, _args: Any, out: Any) -> Any:
            return type(out)([edit(out[0]), *out[1:]]) if isinstance(out, tuple | list) else edit(out)

        with hook_points_of(self.model).components[self.blocks[1]].register_forward_hook(hook):
            yield

    def watch(self, modules: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
        """The first tensor that comes out of Hugging Face's own modules, where that is one vector a token."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable:
            def hook(_module: Any, _args: Any, out: Any) -> None:
                x = out[0] if isinstance(out, tuple | list) else out
                if (
                    isinstance(x, Tensor)
                    and x.is_floating_point()
                    and x.shape[-1] == WIDTH
                    and x.numel() == ids.numel() * WIDTH
                ):
                    seen[name] = x.detach().clone().view(*ids.shape, WIDTH)

            return hook

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(module.register_forward_hook(keep(name)))
            self.run(ids)
        return seen

    def is_text(self, found: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> bool:
        """Whether greedy texts are the expected ones, up to where two tokens are equally likely but for rounding."""
        return all(self._is_one(*pair) for pair in zip(found, expected, strict=True))

    def _is_one(self, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        at = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), None)
        if at is None:
            return True
        logits = self.run(torch.tensor([expected[:at]]))[0, -1]
        return bool(logits[expected[at]] - logits[found[at]] < 1e-5 * (logits.max() - logits.min()))

    def write(self, prompt: str, n: int = N) -> tuple[int, ...]:
        """Greedy text of Hugging Face's forwards over the whole text, without any cache."""
        ids = torch.tensor([self.model.tokenizer(prompt)["input_ids"]])
        for _ in range(n):
            ids = torch.cat([ids, self.run(ids)[:, -1:].argmax(-1)], 1)
        return tuple(ids[0].tolist())


def same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-3) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))
    if not error <= tolerance:
        raise Wrong(f"{what} {error:.1e} away")


def texts_of(family: Family, prompts: list[str], n: int = N, **options: Any) -> list[tuple[int, ...]]:
    made = sl.generate(family.model, prompts, n, sampling=GREEDY, stop_at_eos=False, progress=False, **options)
    return [one.all_ids for one in made]
