"""What texts tell others: names with blanks, addresses with keys, paths inside of words."""

import pytest

from saelab.stores.sharing import find_secrets, hide_password, shareable, shareable_parts, shareable_words

PATHS = (
    "/home/Ada Lovelace/models/tiny", "C:\\Users\\Ada Lovelace\\models\\tiny", "/Users/Ada Lovelace/models/tiny",
    "file:///home/Ada Lovelace/models/tiny", "~/Ada Lovelace/models/tiny",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_with_blanks_is_cut_to_its_last_part(path: str) -> None:
    assert shareable(path) == "tiny"
    assert shareable_parts({"of": [path]}) == {"of": ["tiny"]}


@pytest.mark.parametrize("path", PATHS[:3])
@pytest.mark.parametrize("before", ["harvest of ", "text:", "(", "path='"])
def test_a_home_with_blanks_is_cut_where_it_stands_among_words(path: str, before: str) -> None:
    assert shareable_words(f"{before}{path}, 3 tokens") == f"{before}tiny, 3 tokens"


def test_words_with_slashes_stay() -> None:
    for words in ("a/b and and/or", "</s> or <i>", "EleutherAI/pythia-70m", "1/2, 3/4", "blocks.0: TopK(k=2)"):
        assert shareable_words(words) == words


def test_an_address_has_no_query() -> None:
    url = "https://host.org/v1/text.txt?X-Amz-Signature=secret-word#part"
    assert shareable(url) == "https://host.org/v1/text.txt"
    assert shareable_words(f"text of {url}, 3 tokens") == "text of https://host.org/v1/text.txt, 3 tokens"
    assert hide_password(url) == "https://host.org/v1/text.txt?***"
    assert hide_password("https://ada:word@host.org/v1?key=secret-word") == "https://***@host.org/v1?***"
    assert find_secrets("https://host.org/v1?key=secret-word&api-version=3") == ["secret-word"]


def test_only_machines_are_private_hosts() -> None:
    for kept in ("hf://datasets/owner/name/a.txt", "s3://bucket/a.txt", "https://huggingface.co/a"):
        assert shareable(kept) == kept
    assert shareable("s3://name:word@bucket/a.txt") == "s3://bucket/a.txt"
    for hidden in ("http://gpu-7:8000/a", "http://10.0.0.1/a", "ws://[::1]:8000/a", "HTTP://Gpu.LAN/a"):
        assert shareable(hidden).lower().endswith("://local/a")
