"""Language models: loading, tokenizing, reading and editing activations, generation.

The only package that imports transformer_lens and transformers.
"""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.lm.caching import Caching as Caching
    from saelab.lm.conversations import Conversation as Conversation, Messages as Messages, Prompts as Prompts
    from saelab.lm.generation import (
        Generated as Generated,
        Generation as Generation,
        SamplingConfig as SamplingConfig,
        StreamedToken as StreamedToken,
        TokenStream as TokenStream,
        generate as generate,
        stream_tokens as stream_tokens,
    )
    from saelab.lm.hook_points import HookPoints as HookPoints, HookSite as HookSite, hook_points_of as hook_points_of
    from saelab.lm.hooks import (
        ForwardTokens as ForwardTokens,
        TokenTracker as TokenTracker,
        capture as capture,
        find_hook_point as find_hook_point,
        logits as logits,
        next_token_loss as next_token_loss,
    )
    from saelab.lm.huggingface import (
        AnyModel as AnyModel,
        HuggingFaceModel as HuggingFaceModel,
        as_model as as_model,
    )
    from saelab.lm.masks import (
        LabeledText as LabeledText,
        MaskResult as MaskResult,
        Names as Names,
        TokenMask as TokenMask,
        tokenize_labeled as tokenize_labeled,
    )
    from saelab.lm.model_checks import Model as Model, ModelConfig as ModelConfig, Sketch as Sketch
    from saelab.lm.models import (
        Backend as Backend,
        ModelDescription as ModelDescription,
        Processing as Processing,
        describe_model as describe_model,
        load_model as load_model,
        tiny_model as tiny_model,
    )
    from saelab.lm.token_labels import (
        Concept as Concept,
        LabelsLike as LabelsLike,
        TokenLabels as TokenLabels,
    )
    from saelab.lm.tokens import Tokens as Tokens, tokenize as tokenize
    from saelab.lm.unembedding import Unembedding as Unembedding
    from saelab.lm.unwrapped import Site as Site
    from saelab.lm.verification import HookAgreement as HookAgreement, verify_hooks as verify_hooks

__getattr__, __dir__, __all__ = attach(__name__)
