"""What a set of lists does, found without the walk of the core: a graph of all actions, its longest
path, and the rules of a valid schedule written down as sentences about whole lists."""

from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter

FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
RECEIVES, SENDS, KEEPS = 1, 2, 4


class RefusedError(Exception):
    """The lists cannot be run."""


def need(condition, text):
    if not condition:
        raise RefusedError(text)


class Lists:
    """Lists [rank] of tuples (kind, flags, chunk, microbatch), and their numbers."""

    def __init__(self, schedule, lists=None):
        self.ranks, self.chunks = schedule.ranks, schedule.chunks
        self.microbatches, self.fill = schedule.microbatches, schedule.fill
        given = schedule.lists if lists is None else lists
        self.lists = [[tuple(action) for action in each.tolist()] for each in given]

    @property
    def last(self):
        return self.ranks * self.chunks - 1

    def globals_of(self, rank, action):
        return action[2] * self.ranks + rank

    def lane(self, microbatch):
        """Messages of Part 1 travel apart from the others."""
        return self.microbatches <= microbatch < self.microbatches + self.fill[0]


def check(lists):
    """Raises RefusedError unless every microbatch does what it must."""
    total = lists.microbatches + sum(lists.fill)
    by_chunk = defaultdict(list)
    for rank, actions in enumerate(lists.lists):
        for action in actions:
            need(0 <= action[3] < total, "microbatch")
            need(action[2] < lists.chunks, "chunk")
            by_chunk[lists.globals_of(rank, action)].append(action)
    for g in range(lists.last + 1):
        full = [a for a in by_chunk[g] if a[3] < lists.microbatches]
        check_full(lists, g, full)
        extra = defaultdict(list)
        for action in by_chunk[g]:
            if action[3] >= lists.microbatches:
                extra[action[3]].append(action)
        for actions in extra.values():
            check_extra(lists, g, actions)


def check_full(lists, g, actions):
    everything = list(range(lists.microbatches))
    forwards = [a[3] for a in actions if a[0] == FORWARD]
    backwards = [a[3] for a in actions if a[0] in (BACKWARD, BACKWARD_INPUT)]
    weights = [a[3] for a in actions if a[0] in (BACKWARD, BACKWARD_WEIGHT)]
    for numbers in (forwards, backwards, weights):
        need(numbers == everything, "each microbatch once, in ascending order")
    place = {(a[0], a[3]): i for i, a in enumerate(actions)}
    for (kind, microbatch), i in place.items():
        if kind in (BACKWARD, BACKWARD_INPUT):
            need(place[(FORWARD, microbatch)] < i, "forward before backward")
        if kind == BACKWARD_WEIGHT:
            need(place[(BACKWARD_INPUT, microbatch)] < i, "input before weights")
    up, down = g < lists.last, g > 0
    wanted = {
        FORWARD: RECEIVES * down + SENDS * up + KEEPS,
        BACKWARD: RECEIVES * up + SENDS * down,
        BACKWARD_INPUT: RECEIVES * up + SENDS * down,
        BACKWARD_WEIGHT: 0,
    }
    need(all(flags == wanted[kind] for kind, flags, _, _ in actions), "flags")


def check_extra(lists, g, actions):
    """A partial microbatch on a rank: a forward, then a backward if it keeps activations."""
    need(lists.chunks == 1, "one chunk")
    kinds = [a[0] for a in actions]
    need(kinds in ([FORWARD], [FORWARD, BACKWARD]), "a forward and perhaps a backward")
    need(bool(actions[0][1] & KEEPS) == (len(kinds) == 2), "kept for a backward")
    need(bool(actions[0][1] & RECEIVES) == (g > 0), "an input, but for the first rank")
    need(len(kinds) == 1 or not actions[1][1] & KEEPS, "a backward keeps nothing")


def edges(lists):
    """(sender, receiver) of all messages, each as (rank, index of the action)."""
    sent, received = {}, {}
    order = {id(sent): defaultdict(list), id(received): defaultdict(list)}
    for rank, actions in enumerate(lists.lists):
        for i, (kind, flags, chunk, microbatch) in enumerate(actions):
            g, forward = chunk * lists.ranks + rank, kind == FORWARD
            for flag, table in ((RECEIVES, received), (SENDS, sent)):
                if not flags & flag:
                    continue
                to = g + (1 if forward else -1) * (flag == SENDS)
                need(0 <= to <= lists.last, "a chunk to send to")
                key = (forward, to, microbatch)
                need(key not in table, "once")
                table[key] = (rank, i)
                order[id(table)][(forward, to, lists.lane(microbatch))].append(microbatch)
    need(sent.keys() == received.keys(), "all that is sent is received")
    need(order[id(sent)] == order[id(received)], "no message overtakes another")
    return [(sent[key], received[key]) for key in sent]


def times(lists, costs=None):
    """{(rank, index): (start, end)}; RefusedError for lists that cannot be run."""
    check(lists)
    arrivals = defaultdict(list)
    graph = defaultdict(set)
    for sender, receiver in edges(lists):
        arrivals[receiver].append(sender)
        graph[receiver].add(sender)
    for rank, actions in enumerate(lists.lists):
        for i in range(len(actions)):
            graph[(rank, i)].update({(rank, i - 1)} if i else ())
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError:
        raise RefusedError("ranks wait for each other") from None
    found = {}
    for rank, i in order:
        kind, _, chunk, _ = lists.lists[rank][i]
        start = found[(rank, i - 1)][1] if i else 0.0
        cost = 0.0
        if costs is not None:
            named = (
                costs.forward, costs.backward, costs.backward_input, costs.backward_weight
            )  # fmt: skip
            cost = named[kind][chunk * lists.ranks + rank]
        message = costs.message if costs is not None and lists.ranks > 1 else 0.0
        for sender in arrivals[(rank, i)]:
            start = max(start, found[sender][1] + message)
        found[(rank, i)] = (start, start + cost)
    return found


def slots(actions):
    """Activations that a rank keeps at a time, at most."""
    held = most = 0
    for kind, flags, _, _ in actions:
        held += bool(flags & KEEPS)
        most = max(most, held)
        held -= kind in (BACKWARD, BACKWARD_INPUT)
    return most


def counted(lists):
    """How often each action stands in the lists."""
    return Counter((rank, *action) for rank, each in enumerate(lists) for action in each.tolist())
