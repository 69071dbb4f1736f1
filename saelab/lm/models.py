"""`load_model`: a language model from the Hub, a folder or an object, or one that is built in, and its back end."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from saelab._lazy import uncollected
from saelab.lm.hook_points import hook_points_of, is_close
from saelab.lm.huggingface import AnyModel, HuggingFaceModel, as_model, is_bridge, plain_of
from saelab.lm.loading_guards import hidden_bars, no_processes, offline
from saelab.lm.model_checks import (
    Model,
    admit_config,
    admit_folder,
    admit_object,
    admit_tokenizer,
    admit_weights,
    has_processed_weights,
    warn_of_hooks,
)
from saelab.lm.module_names import UnknownLayers
from saelab.lm.tokenizers import copy_tokenizer
from saelab.lm.unwrapped import make_probe, run, set_attention, strip
from saelab.stores.jobs import hidden
from saelab.stores.sharing import shareable

logger = logging.getLogger(__name__)
Processing = Literal["none", "folded"]
Backend = Literal["auto", "transformer_lens", "huggingface"]
BUILT_IN = ("tales", "tales-b", "othello")
WORLD_MODELS = Path(__file__).parents[1] / "synthetic" / "models"
"""folder of the built-in models"""


def load_model(
    name_or_path: str | Path | AnyModel,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    weight_processing: str = "none",
    tokenizer: Any = None,
    backend: str = "auto",
    progress: bool = True,
) -> Model:
    """A causal language model in evaluation mode, as a `HuggingFaceModel` or a `TransformerBridge`.

    Both have the same names of hook points and the same numbers there; attention patterns and other values inside of
    Hugging Face's modules have hook points in a bridge alone. Of a multimodal model the language tower is used; nothing
    is installed or started for the rest.

    Args:
        name_or_path: "tales", "tales-b" or "othello" (the models of `saelab.synthetic`, part of the package; "./tales"
            is a folder of that name), a Hub id, a local folder (the network is not used), "tiny" for `tiny_model()`, a
            Hugging Face model object (unchanged; its weights are shared), or a bridge (returned as it is).
        device: None is the best one present (the CPU for built-in models); not allowed for an object, which keeps its
            own.
        dtype: dtype of the weights; None is float32; not allowed for an object.
        weight_processing: "none" keeps Hugging Face's own weights; "folded" folds norms and centers what is written to
            the residual stream, as TransformerLens 2 did by default and many public SAEs expect.
        tokenizer: replaces the model's; may be left out for an object whose folder has one.
        backend: "transformer_lens" is a bridge, "huggingface" Hugging Face's own modules without transformer_lens.
            "auto" is the second, unless the names of a model's layers are known to transformer_lens alone, which the
            log then says, or weights are to be folded.
        progress: whether to show progress bars.

    Raises:
        FileNotFoundError: for a missing folder.
        TypeError: for an object of another kind.
        ValueError: for a wrong id, for what is not a complete causal model with its tokenizer, for a device or dtype
            together with an object, and for a backend that cannot do what is asked.

    >>> model = sl.load_model(sl.lm.tiny_model())
    >>> model.cfg.n_layers
    3
    """
    for name, value, known in (("weight_processing", weight_processing, Processing), ("backend", backend, Backend)):
        if value not in get_args(known):
            raise ValueError(f"`{name}` must be one of {get_args(known)}, got '{value}'.")
    if weight_processing == "none":
        return _find_model(name_or_path, device, dtype, tokenizer, backend, progress)
    if backend == "huggingface":
        raise ValueError(
            "`weight_processing` 'folded' needs transformer_lens, got backend='huggingface'. Take 'auto' or "
            "'transformer_lens', or raw weights."
        )
    if isinstance(name_or_path, nn.Module | HuggingFaceModel):
        raise ValueError(
            "`weight_processing` 'folded' needs a name or a folder, got an object, whose weights it changes."
        )
    return _fold(_find_model(name_or_path, device, dtype, tokenizer, "transformer_lens", progress))


def _fold(model: Model) -> Model:
    """The model with folded weights; ValueError where its predictions then differ from Hugging Face's."""
    hf_model, _ = strip(model.original_model)
    set_attention(hf_model, "eager")
    probe = make_probe(model)
    expected = run(hf_model, probe).log_softmax(-1)
    model.enable_compatibility_mode()
    if not has_processed_weights(model):
        raise RuntimeError(
            f"`enable_compatibility_mode` must process the weights and say so, got this {model.cfg.architecture} as it "
            "was. Take a release of transformer-lens that saelab was tested with (see README)."
        )
    error = float((run(model.original_model, probe).log_softmax(-1) - expected).norm() / expected.norm())
    if not error <= (1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05):
        raise ValueError(
            f"Folding weights must leave predictions as they are, but those of this {model.cfg.architecture} are "
            f"{error:.1%} away from Hugging Face's then. Take `weight_processing='none'`."
        )
    return model


def _find_model(
    name_or_path: Any, device: Any, dtype: torch.dtype | None, tokenizer: Any, backend: str, progress: bool
) -> Model:
    if isinstance(name_or_path, nn.Module | HuggingFaceModel):
        if device is not None or dtype is not None:
            raise ValueError(
                f"`device` and `dtype` go with a name or a folder, got them with a {type(name_or_path).__name__}. "
                "Move or cast the object first."
            )
        return _open_object(getattr(name_or_path, "_orig_mod", name_or_path), tokenizer, backend)  # behind `compile`
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"`name_or_path` must be a name, a folder, a TransformerBridge or a Hugging Face model, got a "
            f"{type(name_or_path).__name__}. Load models with saelab, or with transformers' `AutoModelForCausalLM`."
        )
    name = str(name_or_path)
    folder = Path(name_or_path).expanduser()
    if isinstance(name_or_path, str) and name in (*BUILT_IN, "tiny"):
        if folder.is_dir():
            warnings.warn(
                f"'{name}' is saelab's own model; the folder of that name here is not read. "
                f"Write './{name}' for the folder.",
                UserWarning,
                stacklevel=3,
            )
        if name == "tiny" and tokenizer is not None:
            raise ValueError("`tokenizer` must be left out for 'tiny', which has its own, got one.")
        if name == "tiny":
            made, tokenizer, name = _make_tiny()
            return _open(made.to(device or "cpu", dtype or torch.float32), tokenizer, name, backend)
        folder, device = WORLD_MODELS / name, device or "cpu"
    if folder.is_dir():
        name = str(folder)
        admit_folder(folder, tokenizer is not None)
    elif isinstance(name_or_path, Path) or not _could_be_id(name):
        raise FileNotFoundError(f"`name_or_path` must be an existing folder or a Hub id, got '{name}': no such folder.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with hidden_bars() if hidden(progress) else nullcontext():
        hf_model = _read_weights(name, folder.is_dir(), dtype or torch.float32)
        with offline() if folder.is_dir() else nullcontext(), _named(name, folder.is_dir()):
            tokenizer = tokenizer or _load_tokenizer(name)
        return _open(hf_model.to(device), tokenizer, name, backend)


def _could_be_id(name: str) -> bool:
    """Whether a string may be a Hub id: "name" or "owner/name"."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _read_weights(name: str, local: bool, dtype: torch.dtype) -> Any:
    """The Hugging Face model of a name or folder, of the class that its configuration names; `local` keeps
    huggingface_hub off the network.
    """
    import transformers

    with (
        offline() if local else nullcontext(),
        no_processes(),
        torch.random.fork_rng(devices=[]),  # layers are drawn at random before their weights are put in place
    ):
        with _named(name, local):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        admit_config(config)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None or not kind.can_generate():
            kind = transformers.AutoModelForCausalLM
        with _named(name, local):
            hf_model, found = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    admit_weights(name, found["missing_keys"])
    return hf_model.eval()


def _open_object(model: Any, tokenizer: Any, backend: str) -> Model:
    """A model object as it is, or in the backend that is asked for."""
    if isinstance(model, HuggingFaceModel):
        if tokenizer is None and backend != "transformer_lens":
            return model
        chosen = "transformer_lens" if backend == "transformer_lens" else "huggingface"
        return _open_object(model.original_model, tokenizer or model.tokenizer, chosen)
    if is_bridge(model):
        opened = plain_of(model) if backend == "huggingface" else model
        hook_points_of(opened)  # raises what is wrong with it
        return opened
    admit_object(model)
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if tokenizer is None and not Path(name).is_dir():
        raise ValueError(
            f"A model object needs its tokenizer, got none and '{name}' is no folder. "
            "Pass `tokenizer=AutoTokenizer.from_pretrained(...)`."
        )
    return _open(model, tokenizer or _load_tokenizer(name), name, backend, is_own=False)


def _open(hf_model: Any, tokenizer: Any, name: str, backend: str, *, is_own: bool = True) -> Model:
    """A Hugging Face model in the backend that is asked for; ValueError for one that saelab cannot run.

    Args:
        hf_model: the Hugging Face model.
        tokenizer: its tokenizer.
        name: its name or folder.
        backend: one of `Backend`.
        is_own: whether nobody else has the model, so that its attention may be computed in the fastest way.
    """
    if backend != "transformer_lens":
        model = HuggingFaceModel(hf_model, tokenizer, name)
        if is_own:
            _choose_attention(hf_model, make_probe(model))
        try:
            hook_points_of(model)
            return model
        except UnknownLayers as error:
            if backend == "huggingface":
                raise
            logger.warning("%s runs through a TransformerBridge: %s", Path(name).name, error)
    bridge = _wrap(hf_model, tokenizer, name)
    hook_points_of(bridge)  # raises what is wrong with it
    return bridge


def _choose_attention(hf_model: Any, probe: Tensor) -> None:
    """Fused attention, where it computes what the eager one does."""
    set_attention(hf_model, "eager")
    expected = run(hf_model, probe)
    if not (set_attention(hf_model, "sdpa") and is_close(run(hf_model, probe), expected)):
        set_attention(hf_model, "eager")


def _load_tokenizer(name: str) -> Any:
    """The tokenizer as it is, whereas the bridge would make it put BOS before every text; ValueError without one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


@contextmanager
def _named(name: str, local: bool) -> Iterator[None]:
    """Context manager that turns any error of the libraries into a ValueError that begins with what was to be
    loaded.
    """
    with _explained(
        f"{'a model folder that can be read' if local else 'a Hub id that can be reached, or a folder'}", name
    ):
        yield


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]  # some messages are very long
        raise ValueError(f"`name_or_path` must be {what}, got '{name}': {reason}") from error


def _wrap(hf_model: Any, tokenizer: Any, name: str) -> Any:
    """A bridge around a copy of the module tree, so that the Hugging Face model keeps its own modules."""
    with uncollected():
        from transformer_lens.model_bridge import TransformerBridge

    warn_of_hooks(hf_model)
    twin: Any = strip(hf_model)[0]
    twin.config.architectures = twin.config.architectures or [type(hf_model).__name__]  # by which it finds its adapter
    twin.set_attn_implementation("eager")  # hooks on attention scores need it; older bridges leave it to the model
    weight = next(hf_model.parameters())
    with (
        offline(),
        no_processes(),
        torch.random.fork_rng(devices=[]),
        _explained("a model that transformer_lens has a bridge for", name),
    ):
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=twin, tokenizer=copy_tokenizer(tokenizer, name), device=weight.device, dtype=weight.dtype
        )
    admit_tokenizer(bridge)
    return bridge.eval()


def tiny_model(
    *,
    architecture: Literal["llama", "gpt2"] = "llama",
    d_model: int = 32,
    n_layers: int = 3,
    ctx_len: int = 256,
    seed: int = 0,
    backend: str = "auto",
) -> Model:
    """A small random causal model with a byte-level tokenizer, for tests, examples and the demo.

    Nothing is downloaded. The vocabulary is the 256 bytes and the special tokens `<s>`, `</s>` and `<pad>` ("llama"),
    or one `<|endoftext|>` as all three ("gpt2"). It is untrained: its loss is about ln(vocabulary). The same seed gives
    the same weights; the global random state is not changed.

    Args:
        architecture: "llama" or "gpt2".
        d_model: width of the residual stream; a multiple of 8, for 4 heads of even width.
        n_layers: number of layers.
        ctx_len: maximum context length in tokens.
        seed: seed of the weights.
        backend: as for `load_model`.

    >>> model = sl.lm.tiny_model(n_layers=2, seed=1)
    >>> model.tokenizer.decode(model.tokenizer("a tin can", add_special_tokens=False)["input_ids"])
    'a tin can'
    """
    return _open(*_make_tiny(architecture, d_model, n_layers, ctx_len, seed), backend)


def _make_tiny(
    architecture: str = "llama", d_model: int = 32, n_layers: int = 3, ctx_len: int = 256, seed: int = 0
) -> tuple[Any, Any, str]:
    """The Hugging Face model of `tiny_model`, its tokenizer and its name."""
    tokenizer = _byte_tokenizer(("<|endoftext|>",) * 3 if architecture == "gpt2" else ("<s>", "</s>", "<pad>"))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.1, **special}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf_model = _random_hf_model(architecture, d_model, n_layers, ctx_len, sizes)
    return hf_model.eval(), tokenizer, f"tiny-{architecture}-{d_model}x{n_layers}-seed{seed}"


def _random_hf_model(architecture: str, d_model: int, n_layers: int, ctx_len: int, sizes: dict[str, Any]) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if architecture == "gpt2":
        config = GPT2Config(n_embd=d_model, n_layer=n_layers, n_head=4, n_positions=ctx_len, **sizes)
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=d_model,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * d_model,
            max_position_embeddings=ctx_len,
            tie_word_embeddings=True,
            **sizes,
        )
    )


def _byte_tokenizer(special: tuple[str, str, str]) -> Any:
    """A tokenizer with a token for every byte; texts begin with the first special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad = special
    words = [*dict.fromkeys(special), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, words.index(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


class ModelDescription(NamedTuple):
    """Name of a model, how its weights were processed, versions of the libraries, and which of them runs it: what
    activations depend on.
    """

    name: str
    weight_processing: Processing
    versions: dict[str, str]
    backend: str


def describe_model(model: AnyModel) -> ModelDescription:
    """The model's name, weight processing, library versions and backend, as recorded in the provenance of activations.

    Of a local folder the name is its last part only, so that shared files do not reveal paths of the machine. "none"
    means raw Hugging Face weights; "folded" means that the bridge's compatibility mode folded and centered them, so
    that activations differ from the raw ones.

    >>> sl.lm.describe_model(sl.lm.tiny_model()).weight_processing
    'none'
    """
    model = as_model(model)
    versions = {name: _version(name) for name in ("saelab", "torch", "transformer-lens", "transformers")}
    name = str(model.cfg.model_name)
    if Path(name).parent == WORLD_MODELS:  # built-in models keep their name wherever the package is installed
        name = Path(name).name
    processing: Processing = "folded" if has_processed_weights(model) else "none"
    backend = "huggingface" if isinstance(model, HuggingFaceModel) else "transformer_lens"
    return ModelDescription(shareable(name), processing, versions, backend)


def is_same_model(one: str, other: str) -> bool:
    """Whether two names refer to one model: the last part is compared, ignoring case, and TransformerLens' aliases are
    resolved.

    One model can be in several folders (the Hub's cache among them), under several owners on the Hub, and under short
    names.

    >>> is_same_model("google/gemma-2-2b", "/data/gemma-2-2b/"), is_same_model("gpt2-small", "openai-community/gpt2")
    (True, True)
    """
    short, long = _last_part(one), _last_part(other)
    return short == long or _official_names().get(short, short) == _official_names().get(long, long)


def _last_part(name: str) -> str:
    path = Path(name)
    if path.parent.name == "snapshots":  # .../models--owner--name/snapshots/revision
        return path.parents[1].name.rpartition("--")[2].lower()
    return (path.name or path.resolve().name).lower()


@cache
def _official_names() -> dict[str, str]:
    """The model's own name for each of TransformerLens' short names."""
    from transformer_lens.supported_models import MODEL_ALIASES

    return {alias.lower(): _last_part(name) for name, aliases in MODEL_ALIASES.items() for alias in aliases}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
