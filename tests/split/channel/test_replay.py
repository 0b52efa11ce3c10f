"""A request is carried out at most once, whoever asks how often, and over restarts."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from dpdl.errors import BudgetExceededError, ChannelError, ParameterError
from dpdl.split import frames
from dpdl.split.answering import Answerer
from dpdl.split.channel import Packet
from dpdl.split.replay import ReplayGuard


def asking(step: int = 1, *, session: str = "a", kind: str = "step", x: float = 1.0) -> Packet:
    return Packet(kind=kind, header={"session": session, "step": step}, tensors={"x": torch.tensor(x)})


class Drawing:
    """Answers with fresh randomness, so that a second call could not go unnoticed."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __call__(self, packet: Packet) -> Packet:
        self.calls.append((packet.header["session"], packet.kind, packet.header["step"]))
        return Packet(kind=packet.kind, tensors={"noise": torch.randn(3)})


def ask(guard: ReplayGuard, packet: Packet, *, peer: str = "") -> bytes:
    return Answerer(guard)(frames.encode(packet), peer=peer)


def refused(guard: ReplayGuard, packet: Packet, *, peer: str = "") -> str:
    reply = frames.decode(ask(guard, packet, peer=peer))
    assert reply.kind == "error", reply
    assert reply.header["error"] == "ChannelError"
    return str(reply.header["message"])


def test_asked_again_it_gets_the_same_bytes_and_the_handler_is_not_called() -> None:
    handler = Drawing()
    guard = ReplayGuard(handler)
    first = ask(guard, asking())
    assert ask(guard, asking()) == first
    assert len(handler.calls) == 1
    assert ask(guard, asking(2)) != first
    assert ask(guard, asking(1, kind="predict")) != first
    assert ask(guard, asking(1, session="b")) != first
    assert ask(guard, asking()) == first
    assert len(handler.calls) == len(set(handler.calls)) == 4


def test_it_is_a_handler_itself() -> None:
    guard = ReplayGuard(Drawing())
    assert torch.equal(guard(asking()).tensors["noise"], guard(asking()).tensors["noise"])


def test_other_content_under_the_same_address_is_refused() -> None:
    handler = Drawing()
    guard = ReplayGuard(handler)
    first = ask(guard, asking(x=1.0))
    assert "with other content" in refused(guard, asking(x=1.5))
    assert ask(guard, asking(x=1.0)) == first
    assert len(handler.calls) == 1


def test_two_at_once_get_one_answer() -> None:
    handler = Drawing()

    def slow(packet: Packet) -> Packet:
        time.sleep(0.2)
        return handler(packet)

    guard = ReplayGuard(slow)
    replies: list[bytes] = []
    threads = [threading.Thread(target=lambda: replies.append(ask(guard, asking()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handler.calls) == 1
    assert len(replies) == 6
    assert len(set(replies)) == 1


def test_handlers_are_called_one_at_a_time() -> None:
    inside: list[int] = []
    most: list[int] = []

    def handler(packet: Packet) -> Packet:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return Packet(kind=packet.kind)

    guard = ReplayGuard(handler)
    threads = [threading.Thread(target=ask, args=(guard, asking(session=str(n)))) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_steps_go_up_by_one_and_never_back() -> None:
    handler = Drawing()
    guard = ReplayGuard(handler, keep=2, consecutive=["step"])
    for step in (5, 6, 7, 8):
        ask(guard, asking(step))
    assert "after step 8 comes 9" in refused(guard, asking(10))
    assert "comes too late" in refused(guard, asking(5))
    assert "comes too late" in refused(guard, asking(4))
    assert [step for _, _, step in handler.calls] == [5, 6, 7, 8]
    assert frames.decode(ask(guard, asking(7))).kind == "step"  # still kept
    ask(guard, asking(3, kind="probe"))
    assert frames.decode(ask(guard, asking(9, kind="probe"))).kind == "probe"  # may leave some out
    assert "too late" in refused(guard, asking(8, kind="probe"))


def test_only_the_last_replies_are_kept() -> None:
    guard = ReplayGuard(Drawing(), keep=1)
    for step in range(50):
        ask(guard, asking(step))
    assert guard._store._rows.execute("SELECT COUNT(*), MAX(step) FROM replies").fetchone() == (1, 49)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"session": "a"},
        {"step": 1},
        {"session": "a", "step": -1},
        {"session": "a", "step": True},
        {"session": "a", "step": 1.0},
        {"session": 1, "step": 1},
    ],
)
def test_a_request_without_an_address_is_refused(header: dict[str, object]) -> None:
    handler = Drawing()
    assert "no address" in refused(ReplayGuard(handler), Packet(kind="step", header=header))  # type: ignore[arg-type]
    assert not handler.calls


def test_a_refusal_is_a_reply_like_any_other() -> None:
    calls: list[Packet] = []

    def handler(packet: Packet) -> Packet:
        calls.append(packet)
        raise BudgetExceededError("spent")

    guard = ReplayGuard(handler)
    first = ask(guard, asking())
    assert frames.decode(first).header == {"error": "BudgetExceededError", "message": "spent"}
    assert ask(guard, asking()) == first
    assert len(calls) == 1


def test_a_handler_that_fails_is_not_called_again() -> None:
    calls: list[Packet] = []

    def handler(packet: Packet) -> Packet:
        calls.append(packet)
        raise ZeroDivisionError("bug, after noise was drawn")

    guard = ReplayGuard(handler)
    with pytest.raises(ZeroDivisionError):
        ask(guard, asking())
    assert "did not come to an end" in refused(guard, asking())
    assert len(calls) == 1


def test_a_session_is_of_the_one_who_began_it() -> None:
    handler = Drawing()
    guard = ReplayGuard(handler)
    first = ask(guard, asking(), peer="radiology")
    assert "another party's" in refused(guard, asking(), peer="pathology")
    assert "another party's" in refused(guard, asking(2), peer="pathology")
    assert "another party's" in refused(guard, asking(kind="predict"), peer="pathology")
    assert ask(guard, asking(), peer="radiology") == first
    assert len(handler.calls) == 1


def test_nobody_can_fill_the_disk_with_sessions() -> None:
    handler = Drawing()
    guard = ReplayGuard(handler, max_streams=3)
    for name in "abc":
        ask(guard, asking(session=name))
    assert "3 pairs" in refused(guard, asking(session="d"))
    assert frames.decode(ask(guard, asking(2, session="c"))).kind == "step"
    assert len(handler.calls) == 4


def test_nobody_can_lock_others_out() -> None:
    guard = ReplayGuard(Drawing(), max_streams=2)
    for name in "ab":
        ask(guard, asking(session=name), peer="south")
    assert "'south'" in refused(guard, asking(session="c"), peer="south")
    assert frames.decode(ask(guard, asking(session="d"), peer="north")).kind == "step"
    assert "at most 256" in refused(guard, asking(session="x" * 257), peer="north")


def test_a_client_is_the_one_that_its_certificate_names() -> None:
    handler = Drawing()
    guard = ReplayGuard(handler, relays=["hop"])
    hello = Packet(kind="hello", header={"session": "a", "step": 0, "client": "north"})
    assert "'south', as its certificate says" in refused(guard, hello, peer="south")
    assert not handler.calls
    for peer, session in (("north", "a"), ("hop", "b"), ("", "c")):
        packet = Packet(kind="hello", header={**hello.header, "session": session})
        assert frames.decode(ask(guard, packet, peer=peer)).kind == "hello"


def test_a_restarted_server_answers_what_it_has_answered(tmp_path: Path) -> None:
    path = tmp_path / "replies.db"
    handler = Drawing()
    guard = ReplayGuard(handler, path)
    first = ask(guard, asking())
    guard.close()
    guard = ReplayGuard(handler, path)
    assert ask(guard, asking()) == first
    assert "other content" in refused(guard, asking(x=2.0))
    assert "too late" in refused(guard, asking(0))
    assert len(handler.calls) == 1
    guard.close()
    guard.close()
    assert "Cannot operate on a closed" in refused(guard, asking(2))


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        ask(ReplayGuard(Drawing(), tmp_path / "replies.db"), asking())
    finally:
        os.umask(previous)
    files = list(tmp_path.iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}, files


def test_two_servers_cannot_share_a_file(tmp_path: Path) -> None:
    first = ReplayGuard(Drawing(), tmp_path / "replies.db")
    program = (
        "import sys; from dpdl.split.replay import ReplayGuard\n"
        "try: ReplayGuard(print, sys.argv[1])\n"
        "except Exception as error: print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "replies.db")], capture_output=True, text=True, check=True
    )
    assert "locked" in said.stdout
    assert "one server at a time" in said.stdout
    first.close()


def test_what_is_not_our_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and longer than a header would be " * 10)
    before = text.read_bytes()
    with pytest.raises(ChannelError, match="not a database"):
        ReplayGuard(Drawing(), text)
    assert text.read_bytes() == before
    other = tmp_path / "other.db"
    import sqlite3

    with sqlite3.connect(other) as rows:
        rows.execute("CREATE TABLE things (x)")
    rows.close()
    with pytest.raises(ChannelError, match="something else"):
        ReplayGuard(Drawing(), other)
    with pytest.raises(ChannelError, match="cannot be opened"):
        ReplayGuard(Drawing(), tmp_path / "missing" / "replies.db")


def test_arguments_are_checked() -> None:
    for name in ("keep", "max_streams"):
        with pytest.raises(ParameterError, match=name):
            ReplayGuard(Drawing(), **{name: 0})


def test_what_cannot_be_written_down_is_not_begun(tmp_path: Path) -> None:
    handler = Drawing()
    guard = ReplayGuard(handler, tmp_path / "replies.db")
    ask(guard, asking())
    guard._store._rows.execute("PRAGMA query_only = ON")  # as a disk that takes nothing more
    assert "could not be written" in refused(guard, asking(2))
    assert len(handler.calls) == 1
    guard._store._rows.execute("PRAGMA query_only = OFF")
    ask(guard, asking(2))
    assert len(handler.calls) == 2


PROGRAM = """
import os, signal, sys
import torch
from dpdl.split import frames
from dpdl.split.answering import Answerer
from dpdl.split.channel import Packet
from dpdl.split.replay import ReplayGuard

path, log, when = sys.argv[1:]

def handler(packet):
    with open(log, "a") as file:
        file.write(f"{packet.header['step']}\\n")
    if when == "in the handler" and packet.header["step"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return Packet(kind=packet.kind, tensors={"noise": torch.randn(3)})

guard = ReplayGuard(handler, path)
answer = Answerer(guard)
for step in (1, 2):
    request = Packet(kind="step", header={"session": "a", "step": step}, tensors={"x": torch.tensor(1.0)})
    reply = answer(frames.encode(request))
    open(f"{log}.{step}", "wb").write(reply)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["after the reply", "in the handler"])
def test_a_killed_server_sends_again_and_draws_nothing_again(tmp_path: Path, when: str) -> None:
    path, log = tmp_path / "replies.db", tmp_path / "log"
    ended = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(log), when], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    handler = Drawing()
    guard = ReplayGuard(handler, path)
    assert log.read_text() == "1\n2\n"
    assert ask(guard, asking(1)) == Path(f"{log}.1").read_bytes()
    if when == "in the handler":
        assert "did not come to an end" in refused(guard, asking(2))
    else:
        assert ask(guard, asking(2)) == Path(f"{log}.2").read_bytes()
    assert not handler.calls
