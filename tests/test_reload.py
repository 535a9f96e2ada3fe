"""What a site's file that was read again means."""

import pytest

from p2pcodistill.config import NodeConfig, PeerConfig
from p2pcodistill.errors import AddressError, ConfigError
from p2pcodistill.identity import Identity
from p2pcodistill.reload import compare

TOKYO, OSLO = (
    PeerConfig(
        name=name, public_identity=str(Identity.generate().public), address=f"tcp://{name}.example:5600"
    )
    for name in ("tokyo", "oslo")
)
OLD = NodeConfig(name="berlin", peers=(TOKYO, OSLO), revoked=("oslo",))


def moved(peer: PeerConfig, address: str | None) -> PeerConfig:
    return peer.model_copy(update={"address": address})


def test_nothing_has_changed():
    found = compare(OLD, OLD)
    assert found.config == OLD
    assert not (found.revoked or found.restored or found.addresses or found.needs_restart)


def test_members_are_revoked_and_restored_and_peers_move():
    new = OLD.model_copy(
        update={"revoked": ("tokyo", "tokyo"), "peers": (moved(TOKYO, None), moved(OSLO, "tcp://[::1]:1"))}
    )
    found = compare(OLD, new)
    assert (found.revoked, found.restored) == (("tokyo",), ("oslo",))
    assert found.addresses == {"tokyo": None, "oslo": "tcp://[::1]:1"}
    assert found.config.revoked == ("tokyo",)
    assert found.config.peers == new.peers
    assert not found.needs_restart


def test_what_needs_a_restart_is_named_and_ignored():
    paris = moved(TOKYO, None).model_copy(update={"name": "paris"})
    new = OLD.model_copy(
        update={"linger_s": 1.0, "topology": "ring", "peers": (TOKYO, paris), "revoked": ("paris",)}
    )
    found = compare(OLD, new)
    assert set(found.needs_restart) == {"linger_s", "topology", "peers"}
    assert found.config == OLD.model_copy(update={"revoked": ()})
    assert (found.revoked, found.restored) == ((), ("oslo",))


def test_caps_and_keys_of_peers_need_a_restart():
    capped = TOKYO.model_copy(update={"max_upload_mbit": 1.0, "address": "tcp://127.0.0.1:2"})
    found = compare(OLD, OLD.model_copy(update={"peers": (capped, OSLO)}))
    assert found.needs_restart == ("peers",)
    assert found.addresses == {"tokyo": "tcp://127.0.0.1:2"}
    assert found.config.peers[0] == moved(TOKYO, "tcp://127.0.0.1:2")


def test_a_file_that_cannot_be_changes_nothing():
    with pytest.raises(ConfigError, match="'paris' is none of this site's peers"):
        compare(OLD, OLD.model_copy(update={"revoked": ("paris",)}))
    with pytest.raises(AddressError, match="port 0"):
        compare(OLD, OLD.model_copy(update={"peers": (moved(TOKYO, "tcp://tokyo.example:0"), OSLO)}))
