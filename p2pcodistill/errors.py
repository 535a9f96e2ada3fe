"""The whole exception tree.

Two branches. `UserError`: somebody can mend it by changing a file, a flag or the machine; the command line prints
its message as one line and exits with status 2. `RefusedError`: something that arrived from outside is not accepted; the
node counts it, shows it and goes on. The class says which check failed, the message names the file, key or peer.
"""


class P2PCodistillError(Exception):
    """Root of every error this package raises on purpose."""


# --- mended by the person who runs the command


class UserError(P2PCodistillError):
    """The command cannot do what was asked; the message says what to change."""


class ConfigError(UserError):
    """A configuration file or a command-line value is not acceptable."""


class IdentityError(UserError):
    """An identity file or a public identity is missing, unreadable, exposed or malformed."""


class TopologyError(UserError):
    """A topology cannot be built, or does not fit the members of the run."""


class DataError(UserError):
    """Training data is missing, empty or too small."""


class RunFolderError(UserError):
    """A run folder is in use, or belongs to another configuration."""


class AddressError(UserError):
    """An address does not parse, or cannot be bound."""


class GroupError(UserError):
    """The site's workers cannot be started, or failed more often than the node may restart them."""


class NamespaceError(UserError):
    """Network namespaces cannot be made on this machine, or by this user."""


# --- refused: from the network or from a file that somebody else wrote


class RefusedError(P2PCodistillError):
    """Something from outside is refused. `reason` is a stable word that telemetry counts."""

    reason = "refused"


class MalformedError(RefusedError):
    """Bytes that do not parse as what they claim to be."""

    reason = "malformed"


class OversizedError(RefusedError):
    """A declared or actual size is over its cap; raised before anything of that size is allocated."""

    reason = "oversized"


class SignatureError(RefusedError):
    """A signature does not verify under the origin's key."""

    reason = "bad-signature"


class ReplayedError(RefusedError):
    """A version that is not newer than what is already known, or that belongs to another run."""

    reason = "replayed"


class SchemaMismatchError(RefusedError):
    """Names, shapes or dtypes of the tensors differ from the ones pinned for that origin."""

    reason = "wrong-schema"


class NonFiniteError(RefusedError):
    """A checkpoint holds NaN or infinity."""

    reason = "non-finite"


class ChecksumError(RefusedError):
    """Content does not match its hash or checksum."""

    reason = "bad-checksum"


class HelloMismatchError(RefusedError):
    """A peer belongs to another run, member list, topology or protocol version."""

    reason = "hello-mismatch"


class UnresolvedError(RefusedError):
    """A peer's host name that does not resolve to an address."""

    reason = "unresolved"


class UnknownPeerError(RefusedError):
    """A key that is not on the allow-list, or a message about someone who is not a neighbour."""

    reason = "unknown-peer"


class QuarantinedError(RefusedError):
    """A peer that has sent too much that was refused is not listened to for a while."""

    reason = "quarantined"


class RevokedError(RefusedError):
    """A member whose key is no longer trusted at this site."""

    reason = "revoked"


class FloodedError(RefusedError):
    """A peer sends more messages than any honest one has to say."""

    reason = "flooding"
