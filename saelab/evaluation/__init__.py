"""Evaluation of SAEs: reconstruction, sparsity, effect on the language model's loss, scores on known concepts."""

from typing import TYPE_CHECKING

from saelab._lazy import attach

if TYPE_CHECKING:
    from saelab.evaluation.absorption import (
        AbsorptionScores as AbsorptionScores,
        ChildAbsorption as ChildAbsorption,
        ParentAbsorption as ParentAbsorption,
        score_absorption as score_absorption,
    )
    from saelab.evaluation.activation_spectrum import (
        RankScore as RankScore,
        Spectrum as Spectrum,
        spectrum as spectrum,
    )
    from saelab.evaluation.attribute_patching import (
        AttributePatch as AttributePatch,
        DisentanglementScores as DisentanglementScores,
        score_disentanglement as score_disentanglement,
    )
    from saelab.evaluation.compressibility import (
        DescriptionLength as DescriptionLength,
        MetaSAE as MetaSAE,
        description_length as description_length,
        meta_sae as meta_sae,
    )
    from saelab.evaluation.concept_edits import (
        ConceptEdit as ConceptEdit,
        ConceptEditScores as ConceptEditScores,
        score_scr as score_scr,
        score_tpp as score_tpp,
    )
    from saelab.evaluation.concepts import score_concepts as score_concepts
    from saelab.evaluation.dictionary_structure import (
        DictionaryStructure as DictionaryStructure,
        Identifiability as Identifiability,
        connectivity as connectivity,
        identifiability as identifiability,
        measure_structure as measure_structure,
        negative_interference as negative_interference,
        plausibility as plausibility,
    )
    from saelab.evaluation.disentanglement import InfoMEC as InfoMEC, infomec as infomec
    from saelab.evaluation.dissection import (
        DissectedConcept as DissectedConcept,
        DissectedSide as DissectedSide,
        Dissection as Dissection,
        DissectionRow as DissectionRow,
        dissect as dissect,
    )
    from saelab.evaluation.evaluation import evaluate as evaluate
    from saelab.evaluation.feature_classifiers import (
        CodeMatrix as CodeMatrix,
        concept_baselines as concept_baselines,
        encode_csr as encode_csr,
    )
    from saelab.evaluation.finetuning import finetune as finetune
    from saelab.evaluation.results import (
        BestFeature as BestFeature,
        ConceptScore as ConceptScore,
        ConceptScores as ConceptScores,
        Evaluation as Evaluation,
        PairScore as PairScore,
        ParentScore as ParentScore,
    )
    from saelab.evaluation.sensitivity import (
        SensitivityScores as SensitivityScores,
        score_sensitivity as score_sensitivity,
    )
    from saelab.evaluation.sparse_control import (
        DictionaryScore as DictionaryScore,
        EditScore as EditScore,
        EditTask as EditTask,
        SparseControlResult as SparseControlResult,
        evaluate_sparse_control as evaluate_sparse_control,
    )
    from saelab.evaluation.sparsity_choice import ChosenK as ChosenK, TriedK as TriedK, choose_k as choose_k
    from saelab.evaluation.supervised_dictionary import (
        AdditiveShare as AdditiveShare,
        Attributes as Attributes,
        AttributeScore as AttributeScore,
        Fit as Fit,
        SupervisedDictionary as SupervisedDictionary,
        additive_share as additive_share,
        fit_supervised_dictionary as fit_supervised_dictionary,
    )

__getattr__, __dir__, __all__ = attach(__name__)
