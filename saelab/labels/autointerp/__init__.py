"""Labels by a language model (automated interpretability): clients, requests, explainers, scorers."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.labels.autointerp.clients import (
        Answer as Answer,
        Client as Client,
        LocalClient as LocalClient,
        NotAnswered as NotAnswered,
        RetryLater as RetryLater,
        StructuredClient as StructuredClient,
    )
    from saelab.labels.autointerp.embeddings import Embedding as Embedding
    from saelab.labels.autointerp.endpoints import OpenAIClient as OpenAIClient
    from saelab.labels.autointerp.example_windows import (
        ExampleConfig as ExampleConfig,
        FeatureExamplesSplit as FeatureExamplesSplit,
    )
    from saelab.labels.autointerp.explainers import (
        Explainer as Explainer,
        LabelingResult as LabelingResult,
        LLMExplainer as LLMExplainer,
        Unlabeled as Unlabeled,
        estimate_labels as estimate_labels,
        explain_features as explain_features,
        score_labels as score_labels,
    )
    from saelab.labels.autointerp.requests import (
        CostEstimate as CostEstimate,
        Question as Question,
        Reply as Reply,
        RequestConfig as RequestConfig,
        RequestQueue as RequestQueue,
        TokenUsage as TokenUsage,
    )
    from saelab.labels.autointerp.response_cache import ExchangeReport as ExchangeReport, OfflineClient as OfflineClient
    from saelab.labels.autointerp.scorers import (
        Detection as Detection,
        Fuzzing as Fuzzing,
        Intruder as Intruder,
        LLMScorer as LLMScorer,
        PairwiseDetection as PairwiseDetection,
        Score as Score,
        Scorer as Scorer,
        ScoringTask as ScoringTask,
        Simulation as Simulation,
    )
    from saelab.labels.autointerp.token_prediction import (
        TokenBaseline as TokenBaseline,
        token_baseline as token_baseline,
    )

__getattr__, __dir__, __all__ = attach(__name__)
