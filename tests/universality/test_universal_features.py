"""Lists of universal features of stores of documents: pairs that fire on the same documents, named by their words."""

from documents_planted import PLANTED, plant_store

import saelab as sl
from saelab.universality import list_universal


def test_features_of_documents_are_told_by_their_words(tmp_path):
    one, other = (plant_store(tmp_path / name)[0] for name in "ab")
    found = sl.compare(one, other, progress=False)
    table = list_universal(found, one, other)
    assert len(table.rows) == len(PLANTED)
    for row in table.rows:
        (words,) = [words for key, words in row.items() if key.startswith("words") and key.endswith("_a")]
        assert words["+"][0].strip().lower() == PLANTED[row["a"]] and row["a"] == row["b"], row
