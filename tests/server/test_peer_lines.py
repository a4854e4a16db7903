"""A peer's actions are logged, but it cannot decide how long the log becomes."""

import logging

from fedlora_server.peer_lines import MOST_OF_A_KIND, MOST_PEERS, PeerFilter, PeerLines


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_peer_has_a_line_of_each_kind_a_minute_and_the_next_says_how_many_were_not_said():
    clock = Clock()
    lines = PeerLines(clock)
    assert [lines.admit("north", "lost"), lines.admit("north", "joined"), lines.admit("south", "lost")] == ["", "", ""]
    assert all(lines.admit("north", "lost") is None for _ in range(1234))
    clock.now = 59.9
    assert lines.admit("north", "lost") is None
    clock.now = 60.0
    assert lines.admit("north", "lost") == " (1,235 more like it since the last such line)"
    clock.now = 120.0
    assert lines.admit("north", "lost") == ""


def test_a_million_names_have_no_million_lines_and_take_no_memory():
    clock = Clock()
    lines = PeerLines(clock)
    said = [lines.admit(f"name {i}", "joined") for i in range(3 * MOST_PEERS)]
    assert sum(line is not None for line in said) == MOST_OF_A_KIND
    assert lines.admit("north", "lost") == "", "another kind is said"
    clock.now = 61.0
    left_out = 3 * MOST_PEERS - MOST_OF_A_KIND
    assert lines.admit("north", "joined") == f" ({left_out:,} such lines about others were left out)"
    for minute in range(100):
        clock.now = 100.0 + 61 * minute
        for i in range(MOST_OF_A_KIND):
            lines.admit(f"{minute} {i}", "joined")
    assert len(lines._said) <= MOST_PEERS and len(lines._unsaid) <= MOST_PEERS


def test_lines_of_a_log_that_are_about_a_peer_are_said_sparingly_and_others_always(caplog):
    log = logging.getLogger("fedlora_server.anything")
    with caplog.filtering(PeerFilter(PeerLines())):
        for _ in range(3):
            log.warning("the stream of %s was ended", "north", extra={"peer": "ipv4:10.0.0.1", "kind": "ended"})
            log.warning("something else")
    assert caplog.messages == ["the stream of north was ended", *["something else"] * 3]
