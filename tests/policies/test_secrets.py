from __future__ import annotations

import stat
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.secrets import (
    KEY_PREFIX_CHARS,
    Purpose,
    RootSecret,
    RootSecretTooShort,
    base62,
    looks_like_key,
    new_key,
    root_secret_file,
)
from tests.policies.race import race

OLD, NEW = b"o" * 32, b"n" * 32
roots = st.binary(min_size=32, max_size=64)
twenty_bytes = st.binary(min_size=20, max_size=20)


def key_of(data: bytes, *, admin: bool = False) -> str:
    return new_key(admin=admin, random_bytes=lambda count: data[:count])


@given(twenty_bytes, st.booleans())
def test_every_new_key_looks_like_one_and_has_the_length_of_its_kind(data: bytes, admin: bool) -> None:
    key = key_of(data, admin=admin)

    assert looks_like_key(key.encode())
    assert len(key) == len("fb-admin-" if admin else "fb-") + 27


@given(twenty_bytes, twenty_bytes)
def test_a_key_carries_all_160_random_bits(data: bytes, other: bytes) -> None:
    assert (key_of(data) == key_of(other)) == (data == other)


def test_a_key_asks_for_160_random_bits() -> None:
    asked: list[int] = []

    def random_bytes(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    new_key(admin=False, random_bytes=random_bytes)

    assert asked == [20]


def test_the_visible_prefix_tells_at_most_seven_characters_of_the_secret_part() -> None:
    assert KEY_PREFIX_CHARS - len("fb-") == 7


@given(st.binary(max_size=40))
def test_what_is_no_key_does_not_look_like_one(data: bytes) -> None:
    assert not looks_like_key(data)
    assert not looks_like_key(key_of(b"k" * 20).encode() + data[:1] + b"\n")


@given(st.binary(min_size=16, max_size=16))
def test_base62_writes_the_number_in_the_base_it_says_and_always_equally_long(data: bytes) -> None:
    digits = string.digits + string.ascii_uppercase + string.ascii_lowercase

    text = base62(data)

    assert sum(digits.index(digit) * 62**place for place, digit in enumerate(reversed(text))) == int.from_bytes(data)
    assert len(text) == 22


@given(roots, st.binary(max_size=60))
def test_a_key_hash_is_the_same_every_time_and_differs_from_every_other_subkey(root: bytes, key: bytes) -> None:
    secret = RootSecret(root)

    assert secret.key_hash(key) == RootSecret(root).key_hash(key)
    assert len(secret.key_hash(key)) == 32
    assert secret.key_hash(key) not in (secret.subkey(purpose, key) for purpose in Purpose)


@given(st.lists(st.text(max_size=20), min_size=2, max_size=2, unique=True))
def test_no_two_tenants_share_a_cache_secret(tenants: list[str]) -> None:
    secret = RootSecret(OLD)

    assert secret.tenant_cache_secret(tenants[0]) != secret.tenant_cache_secret(tenants[1])


def test_each_purpose_has_its_own_subkey_and_each_root_its_own_of_each() -> None:
    subkeys = {root.subkey(purpose) for root in (RootSecret(OLD), RootSecret(NEW)) for purpose in Purpose}

    assert len(subkeys) == 2 * len(Purpose)


def test_derivation_stays_what_it_is_since_stored_hashes_depend_on_it() -> None:
    secret = RootSecret(bytes(range(32)))

    assert secret.key_hash(b"fb-x").hex() == "4c5191fce2f6022105e7412fabd1b93828a39206e663fc427d01d365080142d0"
    assert (
        secret.tenant_cache_secret("ten_demo").hex()
        == "b84438c26bfe2d48c5b8269439cfc065179ee79e0168ecc138dd2d95b7bd4dd8"
    )
    assert secret.id == "91f96c00b5bae049"


@given(st.binary(max_size=60))
def test_after_a_rotation_a_key_is_hashed_anew_and_still_found_under_the_old_secret(key: bytes) -> None:
    before, after = RootSecret(OLD), RootSecret(NEW, previous=(OLD,))

    assert after.key_hashes(key) == (after.key_hash(key), before.key_hash(key))
    assert after.key_hash(key) == RootSecret(NEW).key_hash(key) != before.key_hash(key)
    assert after.id != before.id


@pytest.mark.parametrize("text", [b"", b" \n", b"x" * 31, b"x" * 32 + b"\n" + b"y" * 31])
def test_a_root_secret_that_is_missing_or_too_short_is_refused(text: bytes) -> None:
    with pytest.raises(RootSecretTooShort):
        RootSecret.parse(text)


def test_a_secret_text_lists_the_current_one_first() -> None:
    parsed = RootSecret.parse(NEW + b"\n" + OLD + b"\n")

    assert parsed.key_hashes(b"k") == RootSecret(NEW, (OLD,)).key_hashes(b"k")


def test_the_root_secret_does_not_show_itself() -> None:
    secret = RootSecret(b"canary" * 8, previous=(b"linnet" * 8,))

    assert "canary" not in repr(secret) + str(secret)
    assert "linnet" not in repr(secret) + str(secret)


def test_a_new_secret_file_is_its_owners_alone_and_is_the_only_thing_left(tmp_path: Path) -> None:
    path = tmp_path / "root-secret"

    made = root_secret_file(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert len(bytes.fromhex(path.read_text())) == 32
    assert root_secret_file(path).id == made.id


def test_a_secret_file_that_is_there_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "root-secret"
    path.write_bytes(OLD)

    assert root_secret_file(path, random_bytes=lambda count: NEW[:count]).id == RootSecret(OLD).id
    assert path.read_bytes() == OLD


def test_a_secret_file_without_enough_in_it_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "root-secret"
    path.write_bytes(b"short")

    with pytest.raises(RootSecretTooShort):
        root_secret_file(path)

    assert path.read_bytes() == b"short"


def test_processes_that_start_at_once_agree_on_one_secret(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\n"
        "from policies.secrets import root_secret_file\n"
        "input()\n"
        "for number in range(20):\n"
        "    print(root_secret_file(pathlib.Path(sys.argv[1]) / str(number)).id)\n"
    )

    answers = [said.split() for said in race(script, str(tmp_path), racers=3)]

    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) == 20
    assert len(list(tmp_path.iterdir())) == 20
