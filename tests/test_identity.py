"""Identities: round trips, files that others can read, mistyped keys, signatures."""

import stat

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from p2pcodistill.errors import IdentityError, SignatureError
from p2pcodistill.identity import Identity, PublicIdentity, check_site_name


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity.from_secrets(b"s" * 32, b"c" * 32)


def test_saved_identity_is_private_and_loads_again(tmp_path, identity):
    path = tmp_path / "berlin.key"
    identity.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load(path) == identity


def test_saving_never_overwrites(tmp_path, identity):
    path = tmp_path / "berlin.key"
    identity.save(path)
    with pytest.raises(IdentityError, match="exists already"):
        Identity.generate().save(path)
    assert Identity.load(path) == identity


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_file_that_others_can_read_is_refused(tmp_path, identity, mode):
    path = tmp_path / "berlin.key"
    identity.save(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match="chmod 600"):
        Identity.load(path)


def test_a_missing_or_damaged_file_says_what_to_do(tmp_path, identity):
    with pytest.raises(IdentityError, match="p2pcodistill keygen berlin"):
        Identity.load(tmp_path / "berlin.key")
    path = tmp_path / "damaged.key"
    identity.save(path)
    path.write_text(path.read_text()[:-8])
    with pytest.raises(IdentityError, match=r"damaged\.key.*copy it again"):
        Identity.load(path)


def test_repr_does_not_show_secrets(identity):
    assert repr(identity.signing_secret) not in repr(identity)
    assert "signing_secret" not in repr(identity)


def test_public_identity_round_trips_as_one_line(identity):
    text = str(identity.public)
    assert text.isprintable() and " " not in text and "#" not in text
    assert PublicIdentity.parse(f"  {text}\n") == identity.public


@given(st.data())
def test_every_single_mistyped_character_is_noticed(identity, data):
    text = str(identity.public)
    index = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("ABCxyz019-_#=! é"))
    mistyped = text[:index] + letter + text[index + 1 :]
    if mistyped == text:
        assert PublicIdentity.parse(mistyped) == identity.public
    else:
        with pytest.raises(IdentityError):
            PublicIdentity.parse(mistyped)


@given(st.text(max_size=200))
def test_arbitrary_text_is_no_public_identity(text):
    with pytest.raises(IdentityError):
        PublicIdentity.parse(text)


def test_signatures_verify_only_under_the_right_key_and_message(identity):
    signature = identity.sign(b"weights")
    identity.public.verify(signature, b"weights")
    for wrong in (b"", signature[:-1], bytes(64)):
        with pytest.raises(SignatureError):
            identity.public.verify(wrong, b"weights")
    with pytest.raises(SignatureError):
        identity.public.verify(signature, b"other weights")
    with pytest.raises(SignatureError):
        Identity.generate().public.verify(signature, b"weights")


def test_the_curve_key_is_the_one_that_zeromq_derives(identity):
    secret = z85.encode(identity.curve_secret)
    assert zmq.curve_public(secret) == z85.encode(identity.public.curve_key)


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "x" * 64, "é", ".hidden"])
def test_names_that_cannot_name_a_site(name):
    with pytest.raises(IdentityError, match="cannot name a site"):
        check_site_name(name)
