"""Who has finished training: each member says so itself, signed, and others pass its statement on as it is.

What is signed names the run, the member and its incarnation, so that a statement counts in no other run, for nobody else,
and no more once the member was launched again. It is not sent: both ends make it of the fields and of their own run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import msgpack

from p2pcodistill.errors import FloodedError, MalformedError, SignatureError, UnknownPeerError
from p2pcodistill.gossip.membership import MAX_CREDIBLE_INCARNATION
from p2pcodistill.gossip.messages import Finished
from p2pcodistill.identity import PublicIdentity

SIGNATURE_DOMAIN = b"p2pcodistill finished 1\0"
MAX_STATEMENTS = 20
"""So many of a member are taken from one of its hellos to the next, each under a higher incarnation: it signs another one
for each past life that it is told of."""


def finished_text(run: str, member: str, incarnation: int) -> bytes:
    """What `member` signs when its training in `run` is over."""
    packed: bytes = msgpack.packb((run, member, incarnation))
    return SIGNATURE_DOMAIN + packed


@lru_cache(maxsize=4096)
def _verify(public: PublicIdentity, signature: bytes, text: bytes) -> None:
    """Raise SignatureError unless it verifies; what did once is not verified again, by no site in this process."""
    public.verify(signature, text)


class Finishing:
    """Whose training is over, this site's own included.

    `sign` makes the signature of this site's identity, `known_incarnation` is the highest under which a member is known to
    have published.
    """

    def __init__(
        self,
        site: str,
        run: str,
        members: Mapping[str, PublicIdentity],
        *,
        sign: Callable[[bytes], bytes],
        known_incarnation: Callable[[str], int],
    ) -> None:
        self._site, self._run, self._members = site, run, members
        self._sign, self._known_incarnation = sign, known_incarnation
        self._statements: dict[str, Finished] = {}  # each verified, but for this site's own
        self._incarnations: dict[str, int] = {}  # of each member's last hello
        self._heard: dict[str, int] = {}  # the highest of each member that was heard of until its last hello
        self._num_statements: dict[str, int] = {}  # taken since each member's last hello

    @property
    def has_finished(self) -> bool:
        """Whether this site's own training is over."""
        return self._site in self._statements

    def finish(self, incarnation: int) -> Finished:
        """This site's training is over, under this incarnation; what there is to say of it."""
        signature = self._sign(finished_text(self._run, self._site, incarnation))
        statement = self._statements[self._site] = Finished(self._site, incarnation, signature)
        return statement

    def greet(self, peer: str, incarnation: int) -> None:
        """`peer` itself said hello under this incarnation: what was heard of it under another one counts no more."""
        statement = self._statements.get(peer)
        said = -1 if statement is None else statement.incarnation
        self._heard[peer] = max(said, self._incarnations.get(peer, -1), self._heard.get(peer, -1))
        self._incarnations[peer] = incarnation
        self._num_statements.pop(peer, None)
        if statement is not None and said != incarnation:
            del self._statements[peer]

    def hear(self, peer: str, statement: Finished) -> bool:
        """`peer` brings this statement, its own or another's. Whether it is news.

        Raises UnknownPeerError, MalformedError, FloodedError or SignatureError.
        """
        member, incarnation = statement.member, statement.incarnation
        public = self._members.get(member)
        if public is None:
            raise UnknownPeerError(f"{peer} says that {member!r} has finished, who is no member of the run")
        known = self._statements.get(member)
        is_known = known is not None and known.incarnation >= incarnation
        # A new machine may finish under a lower incarnation than the old one did: under that of its hello, or a new one.
        is_past = incarnation <= self._heard.get(member, -1) and incarnation != self._incarnations[member]
        if is_known or is_past or member == self._site or self._is_over(statement):
            return False  # whoever passes it on may be behind
        if incarnation > max(MAX_CREDIBLE_INCARNATION, self._launched(member)):
            raise MalformedError(
                f"{peer} says that {member} has finished under incarnation {incarnation}, which cannot be"
            )
        num_statements = self._num_statements.get(member, 0)
        if num_statements >= MAX_STATEMENTS:
            if peer == member:
                raise FloodedError(f"{peer} has said more than {MAX_STATEMENTS} times that it has finished")
            return False  # whoever passes it on did not sign them
        try:
            _verify(public, statement.signature, finished_text(self._run, member, incarnation))
        except SignatureError:
            raise SignatureError(
                f"{peer} says that {member} has finished, which {member} has not signed"
            ) from None
        self._statements[member] = statement
        self._num_statements[member] = num_statements + 1
        return True

    def statement_of(self, member: str) -> Finished | None:
        """What there is to pass on of `member`, or to say of this site itself; None while it trains."""
        statement = self._statements.get(member)
        return None if statement is None or self._is_over(statement) else statement

    def is_finished(self, member: str) -> bool:
        """Whether the training of `member` is over, as far as is known."""
        return self.statement_of(member) is not None

    def _is_over(self, statement: Finished) -> bool:
        """Whether its member was launched again since."""
        return statement.incarnation < self._launched(statement.member)

    def _launched(self, member: str) -> int:
        """The highest incarnation of which `member` is known to have been launched, since its last hello or at all."""
        return max(self._incarnations.get(member, 0), self._known_incarnation(member))
