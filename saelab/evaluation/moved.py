"""Truth about tokens put elsewhere: what concepts' labels would be if they had nothing to do with the text."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped

from saelab.functional.permuting import INSIDE, exchange_groups, permute_within

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


def move_truth(truth: "csr_matrix", story_ids: Shaped[np.ndarray, "n_tokens"], seed: int) -> "csr_matrix":
    """The labels of all concepts put elsewhere, as `permute_labels` does it: tokens permuted within stories, or stories
    exchanged where a concept is mostly a matter of whole stories.

    Concepts that are moved in one way keep what they have to do with each other: what excludes another still does.

    Args:
        truth: (n_tokens, n_concepts), counts of 0 and 1.
        story_ids: the story of each token.
        seed: of both orders.

    >>> from scipy.sparse import csr_matrix
    >>> truth = csr_matrix(np.eye(4, 2, dtype=np.int32))
    >>> move_truth(truth, np.array([0, 0, 1, 1]), seed=0).sum(0).tolist()
    [[1, 1]]
    """
    from scipy.sparse import csr_matrix, diags

    _, numbers, sizes = np.unique(story_ids, return_inverse=True, return_counts=True)
    n_tokens = len(numbers)
    of_story = csr_matrix((np.ones(n_tokens, np.int64), (numbers, np.arange(n_tokens))), shape=(len(sizes), n_tokens))
    true = (of_story @ truth).toarray()
    rates = true.sum(0) / n_tokens
    inside = (true * (1 - true / sizes[:, None])).sum(0) / np.maximum(n_tokens * rates * (1 - rates), 1e-30)
    rng = np.random.default_rng(seed)
    orders = permute_within(numbers, rng), exchange_groups(numbers, rng)
    masks = (
        diags((inside >= INSIDE).astype(np.int32), dtype=np.int32),
        diags((inside < INSIDE).astype(np.int32), dtype=np.int32),
    )
    moved = csr_matrix(sum(truth[order] @ mask for order, mask in zip(orders, masks, strict=True)).astype(np.int32))
    moved.eliminate_zeros()
    return moved
