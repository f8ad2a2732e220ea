"""Laws of the key grammar: whatever an id holds, no two keys collide, and a ledger stays in its slot."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from policies.redis_keys import epoch_key, exact_entry_key, generation_key, ledger_key, ledger_slot

# Ids made of the grammar's own separators and words are the ones that could collide.
ids = st.one_of(
    st.text(st.sampled_from(":{}%/|q07fb1t exactepoch3Aé\n\x00"), min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)
SLOTS = [1, 26, 48]
kinds = st.sampled_from(["exact", "epoch", "ledger", "generation"])


def _key(kind: str, owner: str, rest: tuple[str, ...]) -> str:
    match kind:
        case "exact":
            return exact_entry_key(owner, rest[0])
        case "epoch":
            return epoch_key(owner)
        case "ledger":
            return ledger_key(owner, *rest)
    return generation_key()


def _meaning(kind: str, owner: str, rest: tuple[str, ...]) -> tuple[object, ...]:
    match kind:
        case "exact":
            return kind, owner, rest[0]
        case "epoch":
            return kind, owner
        case "ledger":
            return kind, owner, rest
    return (kind,)


@given(kinds, ids, st.tuples(ids, ids), kinds, ids, st.tuples(ids))
def test_two_keys_are_equal_only_if_they_mean_the_same(
    kind: str, owner: str, rest: tuple[str, ...], other_kind: str, other_owner: str, other_rest: tuple[str, ...]
) -> None:
    same_meaning = _meaning(kind, owner, rest) == _meaning(other_kind, other_owner, other_rest)

    assert (_key(kind, owner, rest) == _key(other_kind, other_owner, other_rest)) == same_meaning


@given(ids, ids, ids, ids)
def test_a_separator_inside_an_id_cannot_move_a_boundary(tenant: str, middle: str, digest: str, kind: str) -> None:
    assert exact_entry_key(f"{tenant}:{middle}", digest) != exact_entry_key(tenant, f"{middle}:{digest}")
    assert ledger_key(tenant, f"{middle}:{digest}") != ledger_key(tenant, middle, digest)
    assert ledger_key(f"{tenant}:{kind}", middle) != ledger_key(tenant, kind, middle)


@given(ids, st.lists(ids, min_size=1, max_size=4), st.lists(ids, min_size=1, max_size=4))
def test_every_ledger_key_of_an_organisation_has_the_same_single_hash_tag(
    organisation: str, parts: list[str], other_parts: list[str]
) -> None:
    tag = f"{{q{ledger_slot(organisation):02d}}}"

    for key in (ledger_key(organisation, *parts), ledger_key(organisation, *other_parts)):
        assert tag in key
        assert (key.count("{"), key.count("}")) == (1, 1)


@given(ids)
def test_a_slot_is_one_of_64(organisation: str) -> None:
    assert 0 <= ledger_slot(organisation) < 64


def test_slots_are_the_same_in_every_process_and_release() -> None:
    # Written down, not computed: workers of two releases must agree, and Python's own hash() differs per process.
    assert [ledger_slot(name) for name in ("acme", "globex", "initech")] == SLOTS


@given(ids, ids)
def test_two_tenants_never_share_a_key_even_for_the_same_digest(tenant: str, other: str) -> None:
    assume(tenant != other)

    assert exact_entry_key(tenant, "00ff") != exact_entry_key(other, "00ff")
    assert epoch_key(tenant) != epoch_key(other)


@pytest.mark.parametrize("bad", ["", "\ud800"], ids=["empty", "lone surrogate"])
def test_an_id_that_cannot_be_written_is_refused(bad: str) -> None:
    with pytest.raises(ValueError):
        exact_entry_key(bad, "00ff")
    with pytest.raises(ValueError):
        ledger_key(bad, "tokens")


def test_ordinary_keys_read_as_the_grammar_says() -> None:
    assert exact_entry_key("acme-prod", "00ff") == "fb1:t:acme-prod:exact:00ff"
    assert epoch_key("acme-prod") == "fb1:t:acme-prod:epoch"
    assert ledger_key("acme", "tokens_minute", "acme-prod") == f"fb1:{{q{SLOTS[0]:02d}}}:acme:tokens_minute:acme-prod"
    assert generation_key() == "fb1:generation"
