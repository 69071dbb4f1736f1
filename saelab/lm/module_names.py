"""Hook points of a plain Hugging Face model: TransformerLens' names for its modules, read from its module tree.

Families of models call the same parts by a few dozen names. Parts that the tables below do not know keep Hugging Face's
own name, so that every module has its two hook points, `hook_in` and `hook_out`, and a norm `hook_normalized` too.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from saelab.lm.norms import find_neutral

_ROOT: dict[str, tuple[str, ...]] = {
    "ln_final": ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "embedding_norm",
                 "ln_out", "layer_norm"),
    "pos_embed": ("wpe", "embed_positions", "positions_embed", "position_embeddings"),
    "embed_ln": ("word_embeddings_layernorm", "emb_norm", "embed_layer_norm"),
    "rotary_emb": ("pos_emb",),
}  # fmt: skip
_BLOCK: dict[str, tuple[str, ...]] = {
    "attn": ("self_attn", "self_attention", "attention"),
    "mlp": ("feed_forward", "block_sparse_moe", "ffn"),
    "ln1": ("input_layernorm", "ln_1", "operator_norm", "attn_norm", "self_attn_layer_norm", "attention_layernorm",
            "norm_1", "ln_attn", "attention_norm"),
    "ln1_post": ("post_self_attn_layernorm",),
    "ln2": ("pre_mlp_layernorm", "ln_2", "pre_feedforward_layernorm", "ffn_norm", "mlp_norm", "final_layer_norm",
            "feedforward_layernorm", "pre_ff_layernorm", "norm_2", "ln_mlp", "post_attention_layernorm"),
    "ln2_post": ("post_mlp_layernorm", "post_feedforward_layernorm"),
    "mlp_hc": ("ffn_hc",),
}  # fmt: skip
_GATED: dict[str, tuple[str, ...]] = {
    "gate": ("gate_proj", "w1"),
    "in": ("up_proj", "dense_h_to_4h", "c_fc", "fc_in", "w3", "Wi", "fc1"),
    "out": ("down_proj", "dense_4h_to_h", "c_proj", "fc_out", "w2", "Wo", "fc2"),
}
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "attn": {
        "q": ("q_proj",),
        "k": ("k_proj",),
        "v": ("v_proj",),
        "qkv": ("query_key_value", "c_attn", "qkv_proj", "Wqkv"),
        "o": ("o_proj", "out_proj", "dense", "c_proj", "Wo"),
        "gate": ("gate_proj", "g_proj"),
        "q_norm": ("q_layernorm", "query_layernorm"),
        "k_norm": ("k_layernorm", "key_layernorm"),
    },
    "mlp": _GATED,
    "moe": {"gate": ("router",)},
    "shared_mlp": {"out": ("output_linear",)},
    "shared_expert": _GATED,
    "shared_experts": _GATED,
    "mixer": {"inner_norm": ("norm",)},
    "mamba": {"inner_norm": ("norm",)},
    "conv": {"in": ("in_proj",), "out": ("out_proj",)},
    "channel_mix": {"in": ("key",), "out": ("value",)},
}
"""by component, Hugging Face's names of each of its parts"""
_SCAN = {
    "hook_conv": "conv1d.hook_out", "hook_in_proj": "in_proj.hook_out", "hook_inner_norm": "inner_norm.hook_out",
    "hook_dt_proj": "dt_proj.hook_out", "hook_ssm_dt": "dt_proj.hook_out", "hook_x_proj": "x_proj.hook_out",
    "hook_ssm_out": "hook_out",
}  # fmt: skip
_SHORT: dict[str, dict[str, str]] = {
    "attn": {"hook_q": "q.hook_out", "hook_k": "k.hook_out", "hook_v": "v.hook_out", "hook_z": "o.hook_in"},
    "mixer": _SCAN,
    "mamba": _SCAN,
    "experts": {"hook_pre": "hook_in", "hook_post": "hook_out"},
    "conv": {"hook_conv": "conv.hook_out", "hook_in_proj": "in.hook_out", "hook_gated": "out.hook_in"},
    "linear_attn": {
        "hook_linear_attn_in": "hook_in",
        "hook_linear_attn_out": "hook_out",
        "hook_ssm_out": "hook_out",
    },
}
"""by component, short names of the hook points of its parts"""
_MLPS = ("mlp", "moe", "shared_mlp", "shared_expert", "shared_experts", "channel_mix")


class UnknownLayers(ValueError):
    """The layers of a model were not found."""


def text_config(model: Any) -> Any:
    """The part of a Hugging Face model's configuration that is about text."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def count_layers(config: Any) -> int:
    """Number of layers by a configuration; 0 where it does not say."""
    names = ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), 0)


def name_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of a Hugging Face model by TransformerLens' names of its components ("blocks.0.attn.q").

    `UnknownLayers`, a ValueError, for a model without a list of as many layers as its configuration has.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    >>> list(name_modules(hf_model))[:5]
    ['embed', 'unembed', 'pos_embed', 'ln_final', 'blocks.0']
    """
    decoder, listed, layers = _find_layers(model)
    found: dict[str, nn.Module] = {"embed": model.get_input_embeddings()}
    if (head := _find_head(model)) is not None:
        found["unembed"] = head
    named = {id(part) for part in found.values()}
    for child, part in decoder.named_children():
        if id(part) not in named and child != listed and not isinstance(part, nn.Dropout):
            found.setdefault(_turn(_ROOT).get(child, child), part)
    for i, layer in enumerate(layers):
        found[f"blocks.{i}"] = layer
        found |= _name_block(layer, f"blocks.{i}")
    return found


def _turn(table: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {theirs: ours for ours, several in table.items() for theirs in several}


def _find_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds a model's layers, the name of their list in it, and the list."""
    n_layers = count_layers(text_config(model))
    get: Any = getattr(model, "get_decoder", None)
    inside = get() if get is not None else None
    for root in (inside, model):
        level = [root] if isinstance(root, nn.Module) else []
        while level:  # the least deep list of that length
            for module in level:
                for name, part in module.named_children():
                    if isinstance(part, nn.ModuleList) and len(part) == n_layers:
                        return module, name, part
            level = [part for module in level for part in module.children()]
    raise UnknownLayers(
        f"A model must have one list of its layers ({n_layers} by its configuration) to have hook points, got a "
        f"{type(model).__name__} without. Take backend='transformer_lens', or another model."
    )


def _find_head(model: Any) -> nn.Module | None:
    """The module that makes the logits."""
    head = model.get_output_embeddings()
    if head is None:
        known = ("lm_head", "embed_out", "head", "decoder")
        head = next((part for name in known if (part := getattr(model, name, None)) is not None), None)
    return head if isinstance(head, nn.Module) else None


def _name_block(layer: nn.Module, prefix: str) -> dict[str, nn.Module]:
    children, names = dict(layer.named_children()), _turn(_BLOCK)
    if {"pre_feedforward_layernorm", "pre_mlp_layernorm", "post_feedforward_layernorm"} & set(children):
        names["post_attention_layernorm"] = "ln1_post"
    if "shared_mlp" in children:
        names["block_sparse_moe"] = "moe"
    if "mamba" in children and "self_attn" not in children:
        names["mamba"] = "mixer"
    if "Rwkv" in type(layer).__name__:
        names |= {"attention": "time_mix", "feed_forward": "channel_mix"}
    found: dict[str, nn.Module] = {}
    for child, part in children.items():
        if isinstance(part, nn.Dropout):  # several parts may share it, and it does nothing
            continue
        if child in ("fc1", "fc2"):  # of an MLP without a module of its own
            found[f"{prefix}.mlp.{_turn(_GATED)[child]}"] = part
            continue
        inner = part.attention if child == "attn" and hasattr(part, "attention") else part  # GPT-Neo's
        found |= _name_part(found, inner, prefix, child, names)
    return found


def _name_part(
    taken: Mapping[str, nn.Module], part: Any, prefix: str, child: str, names: Mapping[str, str]
) -> dict[str, nn.Module]:
    """A module, and those in it, by name."""
    name = names.get(child, child)
    path = f"{prefix}.{child if f'{prefix}.{name}' in taken else name}"
    found: dict[str, nn.Module] = {path: part}
    own = _turn(_PARTS.get(name, {}))
    for inner, module in part.named_children():
        if not isinstance(module, nn.Dropout):
            found |= _name_part(found, module, path, inner, own)
    return found


def name_hook_points(components: Mapping[str, nn.Module], model: Any, probe: Tensor) -> dict[str, str]:
    """Canonical names of hook points by all their names, TransformerLens' short ones among them.

    Args:
        components: modules by name, from `name_modules`.
        model: the Hugging Face model.
        probe: (batch, n) token ids for one forward pass, which tells where the middle of the residual stream is.
    """
    found = {f"{name}.{side}": f"{name}.{side}" for name in components for side in ("hook_in", "hook_out")}
    width = getattr(text_config(model), "hidden_size", None)
    norms = [name for name, module in components.items() if find_neutral(module, width) is not None]
    found |= {f"{name}.hook_normalized": f"{name}.hook_normalized" for name in norms}
    found["hook_embed"] = f"{'embed_ln' if 'embed_ln' in components else 'embed'}.hook_out"
    found |= {f"hook_{name}": f"{name}.hook_out" for name in ("pos_embed", "unembed") if name in components}
    middles = _find_middles(components, model, probe)
    for block in [name for name in components if name.startswith("blocks.") and name.count(".") == 1]:
        found |= {f"{block}.hook_resid_pre": f"{block}.hook_in", f"{block}.hook_resid_post": f"{block}.hook_out"}
        if block in middles:
            found[f"{block}.hook_resid_mid"] = f"{middles[block]}.hook_in"
        for short, path in _name_outputs(components, block):
            found[f"{block}.{short}"] = path
    holders = {path.rpartition(".")[0] for path in components}
    for name in {name for name in holders - set(components) if name.endswith(".mlp")}:  # OPT's, which is no module
        found |= {f"{name}.{side}": f"{name}.{part}.{side}" for part, side in (("in", "hook_in"), ("out", "hook_out"))}
    for name in {*components, *holders}:
        for short, canonical in _list_short(components, name):
            if f"{name}.{canonical}" in found:
                found[f"{name}.{short}"] = f"{name}.{canonical}"
    if any(name.endswith(".mlp.experts") for name in components):  # blocks without experts among others with them
        dense = [name for name in found if re.fullmatch(r"blocks\.\d+\.mlp\.(gate|in|out)\.hook_(in|out)", name)]
        found |= {re.sub(r"mlp\.(gate|in|out)", r"mlp.dense_\1", name): name for name in dense}
    return found


def _name_outputs(components: Mapping[str, nn.Module], block: str) -> Iterator[tuple[str, str]]:
    """What attention and MLP add to the residual stream: behind the norm that follows them, and without the residual
    stream that some families (BLOOM, MPT) add inside of them.
    """
    for part, norm, last in (("attn", "ln1_post", "o"), ("mlp", "ln2_post", "out")):
        module = components.get(f"{block}.{part}")
        adds = module is not None and "residual" in inspect.signature(module.forward).parameters
        order = [norm, *([] if adds else [part]), f"{part}.{last}"]
        if behind := next((path for name in order if (path := f"{block}.{name}") in components), None):
            yield f"hook_{part}_out", f"{behind}.hook_out"
    for part in ("mixer", "time_mix", "channel_mix"):
        if f"{block}.{part}" in components:
            yield f"hook_{part}_in", f"{block}.{part}.hook_in"
            yield f"hook_{part}_out", f"{block}.{part}.hook_out"


def _list_short(components: Mapping[str, nn.Module], name: str) -> Iterator[tuple[str, str]]:
    kind = name.rpartition(".")[2]
    yield from _SHORT.get(kind, {}).items()
    if kind not in _MLPS:
        return
    if f"{name}.out" in components:
        yield "hook_post", "out.hook_in"
    if f"{name}.gate" in components and f"{name}.in" in components:
        yield "hook_pre", "gate.hook_out"
        yield "hook_pre_linear", "in.hook_out"
    elif f"{name}.in" in components:
        yield "hook_pre", "in.hook_out"
    elif f"{name}.experts" in components or kind == "moe":  # what all experts together get and give
        yield "hook_pre", "hook_in"
        yield "hook_post", "hook_out"


@torch.no_grad()
def _find_middles(components: Mapping[str, nn.Module], model: Any, probe: Tensor) -> dict[str, str]:
    """By block the component that reads the residual stream between attention and MLP, where there is such a place.

    That is the second norm, where that runs before the MLP and reads something other than the block does, or the MLP,
    where norms come behind attention and MLP. Blocks whose two parts read the same stream have none.
    """
    wanted = {
        path: name
        for path in components
        if (parts := path.split("."))[0] == "blocks" and len(parts) in (2, 3, 4)
        for name in [".".join(parts[2:])]
        if name in ("", "ln2", "mlp", "mlp.in")
    }
    calls: dict[str, list[tuple[str, Any]]] = {}

    def keep(path: str) -> Any:
        block = ".".join(path.split(".")[:2])

        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            calls.setdefault(block, []).append((wanted[path], None if x is None else x.clone()))

        return hook

    with ExitStack() as stack:
        for path in wanted:
            stack.enter_context(components[path].register_forward_pre_hook(keep(path), with_kwargs=True))
        model(probe, use_cache=False)
    return {
        block: f"{block}.{name}" for block, seen in calls.items() if (name := _choose_middle(components, block, seen))
    }


def _choose_middle(components: Mapping[str, nn.Module], block: str, seen: list[tuple[str, Any]]) -> str | None:
    start = next((x for name, x in seen if not name), None)
    inner = [(name, x) for name, x in seen if name]
    if not inner or start is None:
        return None
    first, x = inner[0]
    if first == "ln2":
        return None if x is None or (x.shape == start.shape and torch.equal(x, start)) else first
    is_behind = any(name == "ln2" for name, _ in inner[1:]) or f"{block}.ln1_post" in components
    return first if is_behind else None
