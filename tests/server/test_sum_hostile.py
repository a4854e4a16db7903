"""Clients that break the protocol of secure sums: what they send is refused or left out, and the others go on."""

import time
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedlora.secure_sum.packages import SUM
from fedlora.wire import pb
from fedlora_server.client_sampling import Ended
from tests.federation import layout_of
from tests.server.test_sum_round import federation, secure_plan
from tests.sum_clients import NAMES, SumClient

HOSTILE = "site-003"


def hold_with(there, clients, hostile):
    """Let a hostile client join three honest ones, hold a round, and return it and the survivors."""
    clients[HOSTILE] = hostile(there.engine.address, HOSTILE, there.plan).start()
    there.await_ready(4)
    return there.opened()


class Garbling(SumClient):
    """A client whose answers of one kind are changed."""

    kind = ""

    def answer(self, request):
        answer = super().answer(request)
        kind = answer.WhichOneof("kind") if answer is not None else None
        if kind == self.kind:
            self.garble(getattr(answer, kind))
        return answer


class FalseKeys(Garbling):
    """A client whose package holds a key that it has not signed."""

    kind = "package"

    def garble(self, package):
        package.keys.mask_key = bytes(31) + b"\1"


class FewShares(Garbling):
    """A client whose package lacks the shares for another member."""

    kind = "package"

    def garble(self, package):
        del package.sealed[0]


class FalseSignature(Garbling):
    """A client that signs something else than whose uploads are in the sum."""

    kind = "agreement"

    def garble(self, agreement):
        agreement.signature = agreement.signature[:-1] + bytes([agreement.signature[-1] ^ 1])


class FewReveals(Garbling):
    """A client that reveals no share of one survivor's mask."""

    kind = "reveal"

    def garble(self, reveal):
        del reveal.seeds[0]


@pytest.mark.parametrize("hostile", [FalseKeys, FewShares, FalseSignature, FewReveals])
def test_an_answer_that_the_protocol_does_not_allow_is_left_out(hostile, tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        under_way, survivors = hold_with(there, clients, hostile)
        assert under_way.unopened == 0 and under_way.refused == {HOSTILE: "invalid-tensors"}
        assert survivors == NAMES[:3 if hostile.kind == "package" else 4]


class FalseShares(Garbling):
    """A client that reveals false shares of the survivors' masks."""

    kind = "reveal"

    def garble(self, reveal):
        for part in reveal.seeds:
            part.content = bytes(32)


def test_false_shares_open_no_sum(tmp_path):
    with federation(tmp_path, 2, plan=secure_plan(3)) as (there, clients):
        clients["site-002"] = FalseShares(there.engine.address, "site-002", there.plan).start()
        there.await_ready(3)
        with pytest.raises(Ended, match="wait-timeout") as ended:
            there.opened()
        assert "3 attempts ended unopened" in ended.value.why and "shares do not fit together" in ended.value.why


VALUES = layout_of("frozen-a").num_trained


@pytest.mark.parametrize("upload", [
    {SUM: np.zeros(VALUES - 1, "<u4")}, {SUM: np.zeros(VALUES, "<u8")}, {"total": np.zeros(VALUES, "<u4")},
    {SUM: np.zeros(VALUES, "<u4"), "more": np.zeros(1, "<u4")}], ids=["shorter", "wider", "named", "two"])
def test_an_upload_that_is_no_vector_of_the_round_is_refused(upload, tmp_path):
    class Uploading(SumClient):
        def uploads(self, masked):
            return upload

    with federation(tmp_path, 3, round_timeout_s=2.0) as (there, clients):
        under_way, survivors = hold_with(there, clients, Uploading)
        assert survivors == NAMES[:3] and {HOSTILE} == {*under_way.refused, *under_way.lost}
        assert under_way.refused.get(HOSTILE, "invalid-tensors") == "invalid-tensors"


def ended_with(client, status):
    """Wait until one of the client's streams has ended with a status."""
    deadline = time.monotonic() + 20
    while status not in client.statuses:
        assert time.monotonic() < deadline, client.statuses
        time.sleep(0.02)
    client.leave()
    return True


class Nobody(SumClient):
    """A client that says nothing for its place in a roster."""

    def membership(self):
        return None


class Other(SumClient):
    """A client that gives another client's entry."""

    def membership(self):
        other = SumClient(self.address, "site-000", self._plan)
        return other.membership()


class Unsigned(SumClient):
    """A client that gives a sealing key which its certificate's key has not signed."""

    def membership(self):
        membership = super().membership()
        membership.sealing_key = bytes(31) + b"\2"
        return membership


class Damaged(SumClient):
    """A client whose certificate cannot be read."""

    def membership(self):
        membership = super().membership()
        membership.certificate = b"no certificate"
        return membership


class SelfSigned(SumClient):
    """A client whose entry has a certificate of its own key that no authority has issued."""

    def membership(self):
        key, now = self._signing, datetime.now(UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        end = now + timedelta(days=1)
        made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, end).sign(key, SHA256())
        membership = super().membership()
        membership.certificate = made.public_bytes(Encoding.PEM)
        return membership


@pytest.mark.parametrize("hostile", [Nobody, Other, Unsigned, Damaged, SelfSigned])
def test_a_client_without_an_entry_of_its_own_for_the_roster_loses_its_stream(hostile, tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        clients[HOSTILE] = hostile(there.engine.address, HOSTILE, there.plan).start()
        assert ended_with(clients[HOSTILE], grpc.StatusCode.INVALID_ARGUMENT)
        assert there.opened()[1] == NAMES[:3]


class Talking(SumClient):
    """A client that answers a hundred times what it is asked once."""

    def _on_frame(self, stream, frame):
        super()._on_frame(stream, frame)
        if frame.WhichOneof("kind") == "sum":
            for _ in range(100):
                stream.send(pb.ClientFrame(sum=pb.SumAnswer(roster=bytes(32))))


def test_a_client_that_answers_what_nobody_asked_loses_its_stream(tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        hold_with(there, clients, Talking)
        assert ended_with(clients[HOSTILE], grpc.StatusCode.INVALID_ARGUMENT)
