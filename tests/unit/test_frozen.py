"""The frozen-number check: what follows the metadata is found, what is noise is not taken for it. Needs no device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.collatz import Collatz
from graphexec import BackendConfig, CaptureError, ConfigError, GraphKey, check_frozen, create_runtime
from graphexec.backends.frozen import capture_twice
from graphexec.backends.stepping import open_pipeline
from graphexec.capture.frozen import FrozenCheck, compare_captures
from graphexec.pipeline import Pipeline
from graphexec.runtime import Stream
from graphexec.runtime.arguments import Argument, NodeArguments
from graphexec.runtime.base import Pool
from graphexec.runtime.breaks import Cuts
from graphexec.runtime.cpu import CpuGraph
from tests.support.instant_program import InstantProgram, WatchedRuntime, small_limits

KEY = GraphKey("decode", 4, 4, "plain")
OTHER_ARGUMENTS = (Argument(bytes(8), (0,)), Argument((64).to_bytes(8, "little")))


def kernel(*arguments: Argument | bytes, name: str = "scale", grid: int = 8) -> NodeArguments:
    wrapped = tuple(each if isinstance(each, Argument) else Argument(each) for each in arguments)
    return NodeArguments(name, "kernel", (grid, 1, 1, 128, 1, 1, 0), wrapped)


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


UNREAD = NodeArguments("packed", "kernel", (1, 1, 1, 32, 1, 1, 0), None, "its arguments are packed")
BEFORE = kernel(*OTHER_ARGUMENTS, name="prepare")


def check(*third_nodes: Sequence[NodeArguments] | NodeArguments) -> FrozenCheck:
    """Compares four captures, each of a node that never changes and of those given."""
    captures = [[BEFORE, *(nodes if isinstance(nodes, Sequence) else [nodes])] for nodes in third_nodes]
    one, two, three, four = captures
    return compare_captures(KEY, (one, two), (three, four))


def check_argument(*values: Argument | bytes) -> FrozenCheck:
    return check(*(kernel(*OTHER_ARGUMENTS, value) for value in values))


def test_captures_that_agree_have_no_leak_and_all_their_nodes_are_checked() -> None:
    agreed = check_argument(*[number(5)] * 4)
    assert agreed == FrozenCheck(KEY, (), checked=2, unchecked=())
    agreed.raise_for_leaks()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_number_that_follows_the_metadata_is_a_leak_that_names_kernel_and_argument(size: int) -> None:
    found = check_argument(*[number(5, size)] * 2, *[number(9, size)] * 2)
    shown = "0x0500 or 0x0900" if size == 2 else "5 or 9"
    assert found.leaks == (f"node 1, scale, argument 2: bytes 0 to {min(size, 4) - 1} of {size} hold {shown}",)
    with pytest.raises(CaptureError, match=r"graph of the decode step, bucket 4.*node 1, scale, argument 2.*the key"):
        found.raise_for_leaks()


def test_a_number_inside_a_struct_is_found_where_it_is() -> None:
    def struct(value: int) -> bytes:
        return number(1, 8) + number(2) + number(value) + number(3, 8)

    found = check_argument(*[struct(300)] * 2, *[struct(70000)] * 2)
    assert found.leaks == ("node 1, scale, argument 2: bytes 12 to 15 of 24 hold 300 or 70000",)


@given(st.lists(st.binary(min_size=7, max_size=7), min_size=4, max_size=4), st.booleans())
def test_padding_is_no_leak_whatever_it_holds_but_what_stands_beside_it_is(noise: list[bytes], leaks: bool) -> None:
    """Unless the padding is the same twice under either metadata, which nobody can tell from a number."""
    noise[1] = bytes(byte ^ 0xFF for byte in noise[0])
    values = [1, 1, 2, 2] if leaks else [1] * 4
    found = check_argument(*(bytes([value]) + each for value, each in zip(values, noise, strict=True)))
    assert bool(found.leaks) == leaks
    assert found.noise == ("node 1, scale, argument 2: bytes 1 to 7 of 8",)


def test_a_number_of_four_bytes_that_changes_with_every_capture_is_a_leak() -> None:
    """A counter of steps, or a seed that the host draws; four bytes have no room for padding."""
    found = check_argument(*(number(value) for value in (7, 10, 8, 9)))
    assert found.leaks == ("node 1, scale, argument 2: bytes 0 to 3 of 4 hold 7 or 10 or 8 or 9",)
    assert found.noise == ()


def test_bytes_that_differ_under_the_same_metadata_do_not_pass_for_checked() -> None:
    found = check_argument(*(number(value, 8) for value in (7, 10, 8, 9)))
    assert found.leaks == ()
    assert found.noise == ("node 1, scale, argument 2: bytes 0 to 0 of 8",)


def test_addresses_are_masked_and_what_stands_beside_them_in_a_struct_is_not() -> None:
    def struct(value: int) -> Argument:
        return Argument(bytes(8) + number(value, 8), (0,))

    assert check_argument(*[struct(5)] * 4).leaks == ()
    assert check_argument(*[struct(5)] * 2, *[struct(6)] * 2).leaks == (
        "node 1, scale, argument 2: bytes 8 to 11 of 16 hold 5 or 6",
    )


@pytest.mark.parametrize("others", [bytes(8), number(7, 8), Argument(bytes(8), (0,))])
def test_what_the_hosts_memory_left_in_padding_is_no_leak_and_not_checked(others: Argument | bytes) -> None:
    left = Argument(bytes(16), (), (8,))
    beside = others if isinstance(others, bytes) else others.data
    other = Argument(bytes(8) + beside, (8,) if isinstance(others, Argument) else ())
    for captures in ([left] * 4, [left, left, other, other], [other, other, left, left]):
        found = check_argument(*captures)
        assert found.leaks == ()
        assert found.noise == ("node 1, scale, argument 2: bytes 8 to 15 of 16",)


def test_an_address_instead_of_none_is_a_leak() -> None:
    (leak,) = check_argument(*[Argument(bytes(8), (0,))] * 2, *[Argument(bytes(8))] * 2).leaks
    assert leak == "node 1, scale, argument 2: bytes 0 to 7 of 8 hold an address or 0"


def test_a_grid_that_follows_the_metadata_is_a_leak() -> None:
    (leak,) = check(*[kernel(grid=3)] * 2, *[kernel(grid=5)] * 2).leaks
    assert leak == (
        "node 1, scale, is launched with grid (3, 1, 1), block (128, 1, 1), 0 bytes of shared memory "
        "or grid (5, 1, 1), block (128, 1, 1), 0 bytes of shared memory"
    )


def test_a_fill_of_another_size_is_a_leak() -> None:
    fills = [NodeArguments("memset", "memset", (size, 1, 4), (Argument(bytes(4)),)) for size in (3, 3, 5, 5)]
    assert check(*fills).leaks == ("node 1, memset, is launched with sizes (3, 1, 4) or sizes (5, 1, 4)",)


def test_another_kernel_is_a_leak_and_its_arguments_are_not_compared() -> None:
    found = check(*[kernel(number(1))] * 2, *[kernel(number(2), name="scale_wide")] * 2)
    assert found.leaks == ("node 1, scale, is kernel scale or kernel scale_wide",)


def test_another_number_of_nodes_is_a_leak_that_names_where_they_part() -> None:
    once, more = [kernel(name="scale")], [kernel(name="shift"), kernel(name="scale")]
    found = check(once, once, more, more)
    assert found.leaks == ("captures have 2 and 3 nodes; node 1 is scale or shift",)
    assert found.checked == 0
    assert check(once, once, [*once, *once], [*once, *once]).leaks == (
        "captures have 2 and 3 nodes; node 2 is nothing or scale",
    )


def test_what_cannot_be_read_is_listed_and_never_counted_as_checked() -> None:
    found = check(*[UNREAD] * 4)
    assert found.leaks == ()
    assert found.checked == 1
    assert found.unchecked == ("node 1, packed: its arguments are packed",)
    assert check(kernel(name="packed"), kernel(name="packed"), UNREAD, UNREAD).checked == 1


def test_of_a_node_that_cannot_be_read_the_sizes_are_compared_all_the_same() -> None:
    larger = replace(UNREAD, sizes=(2, 1, 1, 32, 1, 1, 0))
    found = check(UNREAD, UNREAD, larger, larger)
    assert len(found.leaks) == len(found.unchecked) == 1
    assert "node 1, packed, is launched with grid (1, 1, 1)" in found.leaks[0]


def test_on_the_cpu_the_check_is_refused_and_the_other_one_is_named() -> None:
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match="needs CUDA.*check_capturable"):
        check_frozen(Collatz(device), BackendConfig(), create_runtime(device))


def test_a_graph_on_the_cpu_has_nothing_to_read_and_says_so() -> None:
    (node,) = CpuGraph(lambda: None, "step").arguments()
    assert node.arguments is None
    assert node.why_unread


class ReadableRuntime(WatchedRuntime):
    """Whose graphs hold what the program says while it is captured; `log` has captures, readings and frees in order."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[NodeArguments] = []
        self.log: list[str] = []

    def capture(self, work: Callable[[], None], stream: Stream, pool: Pool, cuts: Cuts = Cuts.NONE) -> CpuGraph:
        self.log.append("capture")
        self.given = []
        super().capture(work, stream, pool, cuts)
        return ReadableGraph(self, self.given)


class ReadableGraph(CpuGraph):
    def __init__(self, runtime: ReadableRuntime, nodes: list[NodeArguments]) -> None:
        super().__init__(lambda: None, "readable")
        self._runtime, self._nodes = runtime, nodes

    def arguments(self) -> list[NodeArguments]:
        self._runtime.log.append("read")
        return self._nodes

    def close(self) -> None:
        self._runtime.log.append("free")


class Opened:
    """A program on a runtime whose graphs can be read, and the pipeline that the check would open."""

    def __init__(self) -> None:
        self.runtime = ReadableRuntime()
        self.program = InstantProgram(small_limits(), self.runtime)
        self.pipeline: Pipeline = open_pipeline(BackendConfig(), self.runtime, self.program)

    def check(self, given: Callable[[], NodeArguments]) -> FrozenCheck:
        self.program.on_capture = lambda key: self.runtime.given.append(given())
        with self.runtime.activated():
            return compare_captures(KEY, *capture_twice(self.program, self.pipeline, KEY))


@pytest.fixture
def opened() -> Iterator[Opened]:
    opened = Opened()
    yield opened
    opened.pipeline.close()


def test_each_graph_is_freed_before_the_next_is_captured(opened: Opened) -> None:
    opened.check(kernel)
    assert opened.runtime.log == ["capture", "read", "free"] * 4


def test_the_step_runs_under_both_metadata_before_its_first_capture(opened: Opened) -> None:
    opened.check(lambda: kernel(number(len(opened.program.ran))))
    assert opened.program.ran == [KEY, KEY]


def test_metadata_that_the_step_reads_on_the_host_are_found(opened: Opened) -> None:
    slots = opened.program.state_of_slots.slots
    assert opened.check(lambda: kernel(number(int(slots.seq_lens[0])))).leaks
    assert opened.check(lambda: kernel(grid=1 + int(slots.seq_lens.sum()))).leaks
    assert not opened.check(lambda: kernel(number(int(slots.query_lens.sum())))).leaks


def test_a_counter_of_the_host_is_found(opened: Opened) -> None:
    opened.program.redraws_offset = True
    assert opened.check(lambda: kernel(number(opened.program.offset.value))).leaks


@pytest.mark.parametrize(
    "drift",
    [[1, 1, 1, 2], [1, 1, 2, 2], [1, 2, 2, 2], [1, 2, 1, 2], [1, 2, 3, 4]],
    ids=["late", "halfway", "early", "alternating", "steady"],
)
def test_what_changes_with_time_is_not_taken_for_what_follows_the_metadata(opened: Opened, drift: list[int]) -> None:
    """Padding that holds what an earlier call left there."""
    values = iter(drift)
    found = opened.check(lambda: kernel(number(next(values), 8)))
    assert found.leaks == ()
    assert found.noise


def test_a_capture_that_fails_says_so_and_leaves_nothing_behind(opened: Opened) -> None:
    def refuse() -> NodeArguments:
        raise RuntimeError("the step reads the device")

    with pytest.raises(CaptureError, match="the step reads the device"):
        opened.check(refuse)
    assert opened.check(kernel).leaks == ()
