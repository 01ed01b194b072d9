"""The cache of prefixes by hand: what is found, what goes first, and what its entries weigh."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from n3c.runtime.generation.prefix_cache import Entry, PrefixCache
from support.fake_engine import Row

EIGHT = Row(committed=[0])
"""A snapshot of eight bytes."""


def kept(cache: PrefixCache, *cuts: int, sequence: Sequence[int]) -> Entry:
    """Keep the states of a sequence at each of `cuts`, one after the other."""
    entry = cache.longest(())
    for cut in cuts:
        entry = cache.keep(entry, sequence, cut, EIGHT)
    return entry


def test_the_longest_prefix_leaves_a_token_to_read() -> None:
    cache = PrefixCache(memory=1000, drafts=False)
    kept(cache, 2, 4, 6, sequence=[1, 2, 3, 4, 5, 6])
    for prompt, tokens in (
        ([1, 2, 3, 4, 5, 6, 7], 6),
        ([1, 2, 3, 4, 5, 6], 4),
        ([1, 2, 3, 4, 9], 4),
        ([1, 2, 9, 4, 5], 2),
        ([1, 2], 0),
        ([9, 2, 3], 0),
    ):
        entry = cache.longest(prompt)
        assert entry.tokens == tokens
        assert len(list(cache.path(entry))) == tokens / 2
    assert (cache.hits, cache.tokens_found, cache.bytes) == (4, 16, 24)


def test_of_two_continuations_the_longer_one_is_found() -> None:
    cache = PrefixCache(memory=1000, drafts=False)
    kept(cache, 1, sequence=[1, 2, 3])
    kept(cache, 3, sequence=[1, 2, 3])
    assert cache.longest([1, 2, 3, 4]).tokens == 3
    assert cache.longest([1, 2, 4]).tokens == 1


def test_with_drafts_the_token_that_follows_counts() -> None:
    cache = PrefixCache(memory=1000, drafts=True)
    kept(cache, 2, sequence=[1, 2, 3])
    assert cache.longest([1, 2, 3, 4]).tokens == cache.longest([1, 2, 3]).tokens == 2
    assert cache.longest([1, 2, 4, 4]).tokens == 0


def test_what_is_known_is_kept_once() -> None:
    cache = PrefixCache(memory=1000, drafts=False)
    assert kept(cache, 2, sequence=[1, 2]) is kept(cache, 2, sequence=[1, 2, 3])
    assert cache.bytes == 8


def test_the_least_recently_used_goes_first_and_none_that_others_continue() -> None:
    cache = PrefixCache(memory=32, drafts=False)
    kept(cache, 2, 4, sequence=[1, 2, 3, 4])
    kept(cache, 2, sequence=[5, 6])
    kept(cache, 2, sequence=[7, 8])
    assert cache.bytes == 32  # what just fits stays
    assert cache.longest([5, 6, 0]).tokens == 2
    kept(cache, 2, sequence=[9, 9])  # the leaf [1, 2, 3, 4] goes, [1, 2] before it stays
    assert cache.bytes == 32
    found = {prompt: cache.longest([*prompt, 0]).tokens for prompt in ((1, 2, 3, 4), (5, 6), (7, 8), (9, 9))}
    assert found == {(1, 2, 3, 4): 2, (5, 6): 2, (7, 8): 2, (9, 9): 2}
    for number in range(4):
        kept(cache, 2, sequence=[20 + number, 0])
    assert [cache.longest([*prompt, 0]).tokens for prompt in ((1, 2), (5, 6), (7, 8), (9, 9))] == [0] * 4


def test_an_entry_that_went_is_held_no_more() -> None:
    cache = PrefixCache(memory=8, drafts=False)
    gone = kept(cache, 2, sequence=[1, 2])
    assert cache.holds(gone) and cache.holds(cache.longest(()))
    kept(cache, 2, sequence=[3, 4])
    assert not cache.holds(gone)
    assert not list(cache.path(gone))


@pytest.mark.parametrize("memory", [0, 7])
def test_nothing_is_kept_without_memory(memory: int) -> None:
    cache = PrefixCache(memory=memory, drafts=False)
    kept(cache, 2, sequence=[1, 2])
    assert (cache.bytes, cache.longest([1, 2, 3]).tokens) == (0, 0)


def test_other_weights_forget_everything() -> None:
    cache = PrefixCache(memory=1000, drafts=False)
    gone = kept(cache, 2, sequence=[1, 2])
    cache.clear()
    assert (cache.bytes, cache.longest([1, 2, 3]).tokens, cache.holds(gone)) == (0, 0, False)
