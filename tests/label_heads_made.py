"""Documents whose labels have their evidence in one token each, for heads that label documents."""

import numpy as np

N_DOCUMENTS, N_TOKENS, D = 240, 16, 20
DOCUMENTS = np.repeat(np.arange(N_DOCUMENTS), N_TOKENS)
SIDES = {"a": (3, 1), "b": (7, 1), "c": (11, -1)}


def make_documents():
    """Codes, labels and the token with the evidence of each: a code of a size that is nowhere else, negative for c."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(len(DOCUMENTS), D)) * (rng.random((len(DOCUMENTS), D)) < 0.1)
    truth, at = rng.random((N_DOCUMENTS, len(SIDES))) < 0.3, {}
    for c, (name, (feature, sign)) in enumerate(SIDES.items()):
        codes[:, feature] = np.clip(codes[:, feature], -0.5, 0.5)
        for i in np.flatnonzero(truth[:, c]):
            at[name, int(i)] = int(i) * N_TOKENS + int(rng.integers(N_TOKENS))
            codes[at[name, int(i)], feature] = 4.0 * sign
    return codes, {name: truth[:, c] for c, name in enumerate(SIDES)}, at
