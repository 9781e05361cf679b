"""Base of the elementwise optimizers: one kernel a method, on lists of tensors; the device decides what the lists hold.

On an accelerator a kernel gets all tensors of a group at once, so that each torch._foreach_* call is a few launches. On
a CPU the same calls over whole tensors would read and write the memory once per operation, so there the kernel gets
pieces that stay in the cache between its operations: views of a large tensor cut up, or many small tensors together.
The pieces are shared out among threads that meet once a step; torch's own threads would meet at every operation.
Nothing waits for the device: step counts are Python numbers, factors of whole tensors are tensors.
"""

import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.base import Method

# Elements of one kernel call: fewer cost calls, more leave the cache (both measured). Cuts are at multiples of the
# vector length, so that an element gets the same instruction, hence the same bits, as in an uncut tensor.
CALL = 262144
KEPT = 10  # calls whose proposals fit into the outer cache
SHARED = 32  # calls of a tensor, such as an embedding table, above which threads share it
GRAIN = 32768  # the most elements for which an operation of torch starts no threads

Group = Mapping[str, Any]
Tensors = tuple[Tensor, ...] | list[Tensor]
Row = Sequence[Tensor]  # parameter, gradient, state tensors
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class Lists:
    """Equally long lists: entry i of each is the same piece of the same parameter.

    `grads` is only read. `state` has one list a slot. `proposal` is what Scaled.propose returned, times the factors.
    """

    params: Tensors
    grads: Tensors
    state: Sequence[Tensors]
    proposal: Tensors = ()


@dataclass(slots=True)
class Cluster:
    """Whole tensors that are worked on together: `sizes` has their numbers of elements.

    Either several tensors, each an entry of the only lists, or one tensor, whose pieces are all entries of all lists.
    """

    sizes: list[int]
    calls: list[Lists]


class Elementwise(Method):
    """A method whose step at one element needs that element's gradient and state only.

    A subclass gives `slots`, the names of its state tensors (shape and dtype of the parameter, zero at the start), and
    `move`. Every parameter counts its own steps under "step", since it may miss its gradient in some of them.
    """

    slots: ClassVar[tuple[str, ...]]

    def update(self, group: dict[str, Any], members: list[nn.Parameter]) -> None:
        self.advance(group, members, self.slots, self.work)

    def advance(
        self,
        group: Group,
        members: Iterable[nn.Parameter],
        slots: tuple[str, ...],
        work: Callable[[Group, int, list[Cluster]], None],
    ) -> None:
        """Count a step of the members, and call `work` with those of equal device, dtype and step count.

        Raises:
            FrankensteinError: for a gradient that is sparse or complex.
        """
        buckets: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for p in members:
            grad = p.grad
            if grad is None or grad.layout != torch.strided or grad.is_complex():
                found = "none" if grad is None else f"{grad.dtype}, {grad.layout}, shape {tuple(grad.shape)}"
                raise FrankensteinError(f"{self.name}: gradient: found {found}: expected a real and dense one")
            state = self.state[p]
            if not state:
                state["step"] = 0
                state.update((slot, torch.zeros_like(p, memory_format=torch.preserve_format)) for slot in slots)
            state["step"] += 1
            tensors = (p, grad, *(state[slot] for slot in slots))
            buckets[p.device, p.dtype, type(p), state["step"]].append(tensors)
        for (device, _, _, step), rows in buckets.items():
            if device.type != "cpu":
                work(group, step, [_together(rows)])
                continue
            for row in rows:
                if not _has_flat_view(row):
                    work(group, step, [_together([row])])
            flat = [_flat_view(row) for row in rows if _has_flat_view(row)]
            if flat:
                work(group, step, _clusters(flat))

    def work(self, group: Group, step: int, clusters: list[Cluster]) -> None:
        """Move the tensors of the clusters."""
        share_out(partial(self.move, group, step), [lists for cluster in clusters for lists in cluster.calls])

    @abstractmethod
    def move(self, group: Group, step: int, lists: Lists) -> None:
        """Update `lists.state` and `lists.params` in place by torch._foreach_* operations; step counts from 1."""


class Scaled(Elementwise):
    """A method that multiplies something elementwise by one factor a tensor, found from sums over that tensor.

    `absorb` takes the gradients into the state, `propose` makes the something, `sums` and `factors` its factors, and
    `move` takes `lists.proposal`, which has them in it. Those of a large tensor are made twice rather than kept. Sums
    are added over pieces, so their last bit may depend on the cut, as it does on torch's threads.
    """

    def work(self, group: Group, step: int, clusters: list[Cluster]) -> None:
        largest_first = sorted(clusters, key=lambda cluster: -sum(cluster.sizes))
        shared = [cluster for cluster in largest_first if len(cluster.calls) > SHARED]
        alone = largest_first[len(shared) :]
        calls = [lists for cluster in shared for lists in cluster.calls]

        def first(item: Lists | Cluster) -> tuple[Tensors, ...]:
            if isinstance(item, Lists):
                return self._prepare(group, step, item, keep=False)
            self._move_cluster(group, step, item)
            return ()

        items: list[Lists | Cluster] = [*calls, *alone]
        sums = iter(share_out(first, items))
        factors = [self._factors(group, cluster, [next(sums) for _ in cluster.calls]) for cluster in shared]
        of_calls = [own for cluster, own in zip(shared, factors, strict=True) for _ in cluster.calls]
        share_out(lambda item: self._finish(group, step, *item), list(zip(calls, of_calls, strict=True)))

    def _move_cluster(self, group: Group, step: int, cluster: Cluster) -> None:
        keep = len(cluster.calls) <= KEPT
        sums = [self._prepare(group, step, lists, keep=keep) for lists in cluster.calls]
        factors = self._factors(group, cluster, sums)
        for lists in cluster.calls:
            self._finish(group, step, lists, factors)

    def _prepare(self, group: Group, step: int, lists: Lists, *, keep: bool) -> tuple[Tensors, ...]:
        """The sums over one call; its proposal stays where it is to be kept."""
        self.absorb(group, step, lists)
        lists.proposal = self.propose(group, step, lists)
        sums = self.sums(lists)
        if not keep:
            lists.proposal = ()
        return sums

    def _factors(self, group: Group, cluster: Cluster, sums: list[tuple[Tensors, ...]]) -> Tensors:
        return self.factors(group, cluster.sizes, *(_totals(cluster, parts) for parts in zip(*sums, strict=True)))

    def _finish(self, group: Group, step: int, lists: Lists, factors: Tensors) -> None:
        if not lists.proposal:
            lists.proposal = self.propose(group, step, lists)
        own_factors = factors if len(factors) > 1 else [factors[0]] * len(lists.params)
        torch._foreach_mul_(lists.proposal, own_factors)
        self.move(group, step, lists)
        lists.proposal = ()

    def absorb(self, group: Group, step: int, lists: Lists) -> None:
        """Update `lists.state` as far as the proposal needs it."""

    @abstractmethod
    def propose(self, group: Group, step: int, lists: Lists) -> Tensors:
        """New tensors; changes nothing."""

    @abstractmethod
    def sums(self, lists: Lists) -> tuple[Tensors, ...]:
        """Lists of 0-dim tensors, each a sum over the elements of an entry, of the proposal or of anything else."""

    @abstractmethod
    def factors(self, group: Group, sizes: list[int], *sums: Tensors) -> Tensors:
        """0-dim factors from the sums over whole tensors and their numbers of elements."""


def decay(tensors: Tensors, rate: float) -> None:
    """Multiply by 1 - rate."""
    if rate != 0:
        torch._foreach_mul_(tensors, 1 - rate)


def average(averages: Tensors, values: Tensors, beta: float) -> None:
    """a <- beta a + (1 - beta) x."""
    torch._foreach_lerp_(averages, values, 1 - beta)


def average_squares(averages: Tensors, values: Tensors, beta: float) -> None:
    """a <- beta a + (1 - beta) x^2."""
    torch._foreach_mul_(averages, beta)
    torch._foreach_addcmul_(averages, values, values, 1 - beta)


def roots(squares: Tensors, eps: float) -> Tensors:
    """sqrt(v) + eps, as new tensors.

    With c = sqrt(1 - beta2^t): m / (sqrt(v / c^2) + eps) = c m / roots(v, c eps), which saves a pass over v.
    """
    result = torch._foreach_sqrt(squares)
    torch._foreach_add_(result, eps)
    return result


def squared_norms(tensors: Tensors) -> Tensors:
    """Sum of squares of each tensor, 0-dim, at least float32."""
    norms = torch._foreach_norm(tensors, 2, torch.promote_types(tensors[0].dtype, torch.float32))
    torch._foreach_mul_(norms, norms)
    return norms


def share_out(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of `work` for every item, in the items' order, on as many threads as torch uses.

    Which thread takes which item varies from run to run: what is summed over items is to be summed in this order.
    """
    indices, threads = iter(range(len(items))), torch.get_num_threads()
    results: dict[int, Result] = {}

    @torch.no_grad()
    def take() -> None:
        for index in indices:  # one iterator for all threads: each index goes to one of them
            results[index] = work(items[index])

    helpers = [_pool(os.getpid(), threads).submit(take) for _ in range(min(threads, len(items)) - 1)]
    try:
        take()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()
    return [results[index] for index in range(len(items))]


def _lists(rows: Sequence[Row]) -> Lists:
    params, grads, *state = (list(column) for column in zip(*rows, strict=True))
    return Lists(params, grads, state)


def _together(rows: Sequence[Row]) -> Cluster:
    return Cluster([row[0].numel() for row in rows], [_lists(rows)])


def _has_flat_view(row: Row) -> bool:
    """Whether what is written to can be viewed as 1-D; a distributed tensor is left whole."""
    p, _, *state = row
    return type(p) in (Tensor, nn.Parameter) and all(t.is_contiguous() for t in (p, *state))


def _flat_view(row: Row) -> Row:
    """The row as 1-D views, of the gradient a copy where needed."""
    p, grad, *state = row
    return [p.view(-1), grad.reshape(-1), *(t.view(-1) for t in state)]


def _clusters(rows: Sequence[Row]) -> list[Cluster]:
    """Flat rows as calls of about CALL elements: small ones together, a large one by itself, cut up."""
    piece = CALL if torch.get_num_threads() == 1 else GRAIN
    clusters: list[Cluster] = []
    small: list[Row] = []
    room = CALL
    for row in rows:
        size = row[0].numel()
        if size > piece:
            cuts, length = list(zip(*(t.split(piece) for t in row), strict=True)), CALL // piece
            calls = [_lists(cuts[start : start + length]) for start in range(0, len(cuts), length)]
            clusters.append(Cluster([size], calls))
            continue
        if size > room:
            clusters.append(_together(small))
            small, room = [], CALL
        small.append(row)
        room -= size
    return [*clusters, _together(small)] if small else clusters


def _totals(cluster: Cluster, parts: Sequence[Tensors]) -> Tensors:
    """Sums over whole tensors, from those over the entries of each call."""
    if len(cluster.sizes) > 1:
        return parts[0]
    entries = [entry for part in parts for entry in part]
    return entries if len(entries) == 1 else [torch.stack(entries).sum()]


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The helpers of the calling thread, of this process: a forked one has no threads of its parent's."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="optimizer")
