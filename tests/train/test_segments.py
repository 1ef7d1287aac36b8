"""Messages through memory that two ranks share; both ends of a line are in this process."""

import gc
import os

import pytest
import torch

import sparseflash as sf
from sparseflash.distributed import peers, segments
from sparseflash.distributed.segments import Hello, Line, Room, rooms

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs anonymous files, of Linux")


def two():
    return Line(os.getpid()), Line(os.getpid())


def message(generator):
    x = torch.randn(2, 9, 3, 40, generator=generator).transpose(1, 2)  # not contiguous
    return [x, torch.randn(5, generator=generator).bfloat16(), torch.arange(3) > 1, x[:, :, 2:7].double()]


def send(one, other, tensors):
    """One way; the other end sends nothing. It learns what the first has let go."""
    said, answer = one.put(tensors), other.put([])
    found = other.take(said, rooms(tensors))
    assert one.take(answer, []) == []
    return found


def test_a_message_arrives_as_it_was(generator):
    one, other = two()
    for n in range(5):
        tensors = [x.clone() if n % 2 else x for x in message(generator)]
        found = send(one, other, tensors)
        assert [x.dtype for x in found] == [x.dtype for x in tensors]
        assert all(torch.equal(x, y) for x, y in zip(found, tensors))
        assert all(x.data_ptr() % segments.ALIGN == 0 for x in found)


def test_a_slot_is_filled_again_once_its_last_tensor_is_gone(generator):
    one, other = two()
    for _ in range(10):
        send(one, other, message(generator))
    assert len(one.slots) == 2
    held = [send(one, other, message(generator))[1] for _ in range(4)]
    copies = [x.clone() for x in held]
    for _ in range(10):
        send(one, other, message(generator))
    assert all(torch.equal(x, y) for x, y in zip(held, copies))
    assert len(one.slots) <= 6
    del held
    send(one, other, [])  # what was let go is told
    assert not any(slot.used for slot in one.slots)


def test_more_are_given_back_than_one_exchange_tells(generator):
    one, other = two()
    held = [send(one, other, message(generator)) for _ in range(3 * segments.RELEASED)]
    del held
    for _ in range(4):
        send(one, other, [])
    assert not any(slot.used for slot in one.slots)


def test_a_slot_grows_while_older_tensors_stay(generator):
    one, other = two()
    small = send(one, other, [torch.ones(10)])
    for n in (1 << 18, 1 << 19, 1 << 18, 1 << 20):
        x = torch.randn(n, generator=generator)
        assert torch.equal(send(one, other, [x])[0], x)
    assert small[0].tolist() == [1.0] * 10


def test_both_ways_at_once(generator):
    one, other = two()
    for _ in range(4):
        left, right = message(generator), message(generator)
        said, answer = one.put(left), other.put(right)
        assert all(map(torch.equal, one.take(answer, rooms(right)), right))
        assert all(map(torch.equal, other.take(said, rooms(left)), left))


def test_another_size_than_expected_is_an_error():
    one, other = two()
    said = one.put([torch.ones(100)])
    with pytest.raises(sf.RankError, match="a message of 448 bytes; expected 832"):
        other.take(said, [Room((200,), torch.float32, torch.device("cpu"))])


def test_files_are_closed_with_their_line():
    before = len(os.listdir("/proc/self/fd"))
    one, other = two()
    for _ in range(3):
        send(one, other, [torch.ones(1000)])
    assert len(os.listdir("/proc/self/fd")) > before
    del one, other
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_who_reads_the_word_shares_the_memory(monkeypatch):
    hello = Hello()
    assert Hello().reaches(hello.said)
    other = hello.said.clone()
    other[2] += 1  # another machine: that process has another file there, or none
    assert not Hello().reaches(other)
    said, file = hello.said.clone(), os.open(__file__, os.O_RDONLY)
    said[1] = file  # a file that may only be read
    assert not Hello().reaches(said)
    os.close(file)
    hello.close()
    hello.close()
    assert not Hello().reaches(hello.said)
    for stub in (
        lambda name: os.open("/none", os.O_RDONLY),
        None,
    ):  # a container that forbids it; another system
        if stub is None:
            monkeypatch.delattr(os, "memfd_create")
        else:
            monkeypatch.setattr(os, "memfd_create", stub)
        assert not Hello().reaches(hello.said) and Hello().said[1] == -1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_on_devices_go_through_the_process_group(device, monkeypatch):
    """`meta` stands for a card: a group may have carried tensors of the CPU before."""
    sent = []
    monkeypatch.setattr(peers.dist, "P2POp", lambda op, x, *_: x)
    monkeypatch.setattr(peers.dist, "batch_isend_irecv", lambda ops: sent.extend(ops) or [None] * len(ops))
    monkeypatch.setattr(peers.Peers, "everywhere", lambda self, rank: rank)
    monkeypatch.setattr(peers.Peers, "lines", {1: Line(os.getpid())})
    one = object.__new__(peers.Peers)
    one.group = None
    x = torch.ones(1 << 16, device=device)
    one.start([(1, x)], [(1, room) for room in rooms([x])])
    sizes = [len(y) for y in sent]
    assert sizes == ([segments.TOLD] * 2 if device == "cpu" else [1 << 16] * 2)
