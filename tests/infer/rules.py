"""The rules of decoding in plain Python: which row leaves where, which tokens come of it, what the
cache holds and what that costs.

Nothing here knows how the core does it. Every row is looked at through a view, which recomputes the
whole text for it; `text` is a tuple of tokens, and what is asked for belongs to its last row:

    view.exits                          how many, the final one included
    view.confidence(text, exit)
    view.leaves(text, exit, threshold)  whether the confidence reaches a threshold below 1
    view.largest(text, exit)            the token of the largest raw logit
    view.choose(text, exit)             the token that is chosen under the settings of the request
    view.logprob(text, exit, token)

A view that cannot tell (a tie within the rounding of what it is compared with) raises Unsure.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.infer.reference import softmax

TOKEN, FULL_DEPTH, SCORE = range(3)
NOT_DONE, LENGTH, STOP, FINISHED = range(4)
PROMPT_ROWS = 256  # of a step, at most


class Unsure(Exception):
    """Too near a tie or a threshold to tell."""


@dataclass
class Event:
    kind: int
    position: int
    token: int
    exit: int
    confidence: float
    logprob: float
    done: int = NOT_DONE
    said: dict = field(default_factory=dict)  # exit: (confidence, logprob or NaN, largest)


@dataclass
class Step:
    """What one step makes of a sequence: its events, and how many positions stand in each layer of
    the cache then."""

    events: list
    fills: list


def event_dtype(exits):
    said = [("confidence", "f4"), ("logprob", "f4"), ("token", "i4")]
    integers = ("sequence", "kind", "position", "token", "exit", "done")
    fields = [*((name, "i4") for name in integers), ("confidence", "f4"), ("logprob", "f4")]
    return np.dtype([*fields, ("exits", said, (exits,))])


def as_array(events, exits):
    """Events as the engine hands them out; their sequence is 0."""
    result = np.zeros(len(events), event_dtype(exits))
    result["exits"] = (np.nan, np.nan, -1)
    for row, event in zip(result, events, strict=True):
        for name in ("kind", "position", "token", "exit", "done", "confidence", "logprob"):
            row[name] = getattr(event, name)
        for e, values in event.said.items():
            row["exits"][e] = values
    return result


class Shape:
    """Depths of a model, in half layers. config: the dict of `ModelConfig.to_core()`."""

    def __init__(self, config):
        self.end = 2 * config["num_layers"]
        self.depths = [exit_depth(each) for each in config["exits"]] + [self.end]
        blocks = [exit_depth(each) for each in config["exits"] if each["branch"] == "block"]
        # What a row must have passed for its keys and values to stand in each layer of the cache.
        self.needs = [2 * layer + 1 for layer in range(config["num_layers"])] + blocks
        self.filled = max(self.needs)


def exit_depth(exit):
    if exit["branch"] == "mlp":
        return 2 * exit["layer"] - 1
    return 2 * exit["layer"] - 2 * exit["before"]


class Decoder:
    """One sequence. The settings are those of `Engine.add`; max_length is the engine's."""

    def __init__(
        self,
        view,
        shape,
        prompt,
        *,
        max_length,
        max_new_tokens,
        min_new_tokens=0,
        engine="deferred",
        thresholds=(),
        max_deferred=15,
        all_confidences=False,
        full_depth=False,
        stop_tokens=(),
        forced=(),
        replay=(),
        **sampling,  # the view's business
    ):
        self.view, self.shape, self.engine = view, shape, engine
        self.text, self.prompt_count = tuple(int(token) for token in prompt), len(prompt)
        self.final = view.exits - 1
        given = [np.float32(each) for each in thresholds] or [np.float32(1)]
        self.thresholds = given * self.final if len(given) == 1 else given
        self.cap, self.all_confidences = max_deferred, all_confidences
        self.replay = [int(each) for each in replay]
        self.full_depth = full_depth and engine in ("deferred", "recompute", "pipeline")
        if engine == "full":
            self.thresholds, self.replay, self.cap = [np.float32(1)] * self.final, [], 0
        if engine == "pipeline":
            self.cap = 0
        self.limit = min(max_length + 1, self.prompt_count + max_new_tokens)
        self.min_count = self.prompt_count + min_new_tokens
        self.stops, self.forced = set(stop_tokens), [int(token) for token in forced]
        self.depths = [shape.filled] * (self.prompt_count - 1)  # of each row
        self.behind = 0  # the newest rows that stand at an early exit
        self.left = []  # (position, token, exit, said) of tokens whose rows are behind
        # What has been run so far: half layers, and rows through an output matrix.
        self.half_layers, self.head_rows = sum(self.depths), 0
        self.done = NOT_DONE

    def run(self):
        """All steps to the end."""
        while self.done == NOT_DONE:
            yield self.step()

    def step(self):
        """The next new row."""
        self.depths.append(0)
        events = self._speculate() if self.engine == "speculative" else self._decide()
        if events:
            self.done = events[-1].done
        fills = [sum(depth >= need for depth in self.depths) for need in self.shape.needs]
        return Step(events, fills)

    def finish(self):
        """The events of rows that are still behind, where the final exit is to see them."""
        self._advance(None, self.shape.end)
        events = self._look_back()
        if events:
            self.done = events[-1].done = FINISHED
        return events

    # -- What all engines share --

    def _done(self, position, token):
        if token in self.stops and position >= self.min_count:
            return STOP
        return LENGTH if position + 1 >= self.limit else NOT_DONE

    def _say(self, text, exit, token=None):
        logprob = np.nan if token is None else self.view.logprob(text, exit, token)
        return self.view.confidence(text, exit), logprob, self.view.largest(text, exit)

    def _first_exit(self, may_leave):
        """Where the newest row leaves, and what the exits on its way said."""
        said, i = {}, len(self.text) - self.prompt_count
        replayed = self.replay[i] if i < len(self.replay) else None
        if self.engine == "speculative":
            replayed = None
        for e, threshold in enumerate(self.thresholds):
            looked = self.all_confidences or (threshold < 1 and may_leave) or e == replayed
            if looked:
                self.head_rows += 1
                said[e] = self._say(self.text, e)
            if replayed is not None:
                leaves = e == replayed
            else:
                leaves = may_leave and threshold < 1 and self.view.leaves(self.text, e, threshold)
            if leaves:
                return e, said
        self.head_rows += 1
        said[self.final] = self._say(self.text, self.final)
        return self.final, said

    def _advance(self, newest, others):
        """Rows that are behind run along with the newest one; newest None: without one."""
        count = len(self.depths)
        for i in range(count - self.behind - (newest is not None), count):
            goal = others if newest is None or i < count - 1 else newest
            start = 0 if self.engine == "recompute" else self.depths[i]
            self.half_layers += max(0, goal - start)
            self.depths[i] = max(self.depths[i], goal)

    def _leave_prompt(self, depth):
        """The first token ends the text: the rows of the prompt in the same step go no further."""
        rows = self.prompt_count - 1
        for i in range(max(rows - 1, 0) // PROMPT_ROWS * PROMPT_ROWS, rows):
            self.half_layers -= self.depths[i] - depth

    # -- full, deferred, recompute, pipeline --

    def _decide(self):
        shape, position = self.shape, len(self.text)
        exit, said = self._first_exit(True)
        token = self.view.choose(self.text, exit)
        said[exit] = self._say(self.text, exit, token)
        event = Event(TOKEN, position, token, exit, *said[exit][:2], said=said)
        i = position - self.prompt_count
        written = self.forced[i] if i < len(self.forced) else token
        done, depth = self._done(position, written), shape.depths[exit]
        early, wanted = exit < self.final, self.full_depth
        if early and wanted:
            self.left.append((self.text, written))
        self.text += (written,)
        events = [event]
        if early and done and not wanted:
            self._advance(depth, min(depth, shape.filled))
            if position == self.prompt_count:
                self._leave_prompt(min(depth, shape.filled))
        elif early and depth < shape.filled and self.behind < self.cap and not done:
            self._advance(depth, depth)
            self.behind += 1
        else:
            others = shape.end if wanted else shape.filled
            self._advance(shape.end if not early or wanted else max(depth, others), others)
            self.behind = 0
            events += self._look_back()
        events[-1].done = done
        return events

    def _look_back(self):
        """The final exit's view of the tokens that left early."""
        events = []
        self.head_rows += len(self.left)
        for text, token in self.left:
            said = {self.final: self._say(text, self.final, token)}
            values = said[self.final][:2]
            events.append(Event(FULL_DEPTH, len(text), token, self.final, *values, said=said))
        self.left = []
        return events

    # -- speculative --

    def _may_draft(self):
        """There is room for the draft and for the row that verifies it, and the text goes on."""
        stopped = self.behind and self._done(len(self.text) - 1, self.text[-1]) == STOP
        return self.behind < self.cap and len(self.text) + 1 < self.limit and not stopped

    def _speculate(self):
        exit, said = self._first_exit(self._may_draft())
        if exit < self.final:
            draft = self.view.choose(self.text, exit)
            said[exit] = self._say(self.text, exit, draft)
            self.left.append((self.text, draft, exit, said))
            self._advance(self.shape.depths[exit], self.shape.depths[exit])
            self.behind += 1
            self.text += (draft,)
            return []
        self._advance(self.shape.end, self.shape.end)
        self.head_rows += len(self.left)
        newest, drafts = (self.text, None, self.final, said), self.left
        self.behind, self.left, events = 0, [], []
        for text, draft, left_at, seen in [*drafts, newest]:
            event = self._verify(text, draft, left_at, seen)
            events.append(event)
            self.text = (*text, event.token)
            if event.done or event.token != draft:
                break
        del self.depths[len(self.text) - 1 :]
        return events

    def _verify(self, text, draft, exit, said):
        """The event of the token after a row, which the final exit has seen now."""
        token = self.view.choose(text, self.final)
        said = {**said, self.final: self._say(text, self.final, token)}
        if token != draft and exit < self.final:
            # What the exit said of its draft is not about this token.
            said[exit], exit = (said[exit][0], np.nan, said[exit][2]), self.final
        logprob, done = said[self.final][1], self._done(len(text), token)
        return Event(TOKEN, len(text), token, exit, said[exit][0], logprob, done, said)


def scored(view, text):
    """The events of a text that is scored."""
    events, text = [], tuple(int(token) for token in text)
    for position in range(1, len(text)):
        before, token = text[:position], text[position]
        said = {
            e: (view.confidence(before, e), view.logprob(before, e, token), view.largest(before, e))
            for e in range(view.exits)
        }
        last = said[view.exits - 1]
        events.append(Event(SCORE, position, token, view.exits - 1, *last[:2], said=said))
    events[-1].done = LENGTH
    return events


# -- Distributions --


def adjusted(logits, prompt, written, *, banned=(), logit_bias=None, repetition_penalty=1.0,
             presence_penalty=0.0, frequency_penalty=0.0, **rest):  # fmt: skip
    """Logits [V] after bias, penalties and bans, in float64."""
    logits = np.array(logits, np.float64)
    for token, bias in (logit_bias or {}).items():
        logits[token] += bias
    seen = np.unique(np.array([*prompt, *written], np.int64))
    factor = float(np.float32(repetition_penalty))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    counts = np.bincount(np.array(written, np.int64), minlength=len(logits))
    logits -= presence_penalty * (counts > 0) + frequency_penalty * counts
    logits[list(banned)] = -np.inf
    return logits


def distribution(logits, prompt=(), written=(), *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                 **penalties):  # fmt: skip
    """Probabilities [V] of the next token: temperature, then top-k, then top-p, then min-p."""
    scaled = adjusted(logits, prompt, written, **penalties) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or len(order)]
    p = softmax(scaled[kept])
    if top_p < 1:
        kept = kept[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    p = softmax(scaled[kept])
    result = np.zeros(len(scaled))
    result[kept] = np.where(p >= min_p * p[0], p, 0)
    return result / result.sum()


class Wide:
    """The view of float64. `narrow` is the same in float32: our rounding is allowed twice of its
    error. Settings other than those of greedy choice are not for it."""

    def __init__(self, wide, narrow, prompt, *, min_new_tokens=0, stop_tokens=(), **settings):
        self.wide, self.narrow, self.rows, self.bound = wide, narrow, {}, 0.0
        self.exits = len(wide.c["exits"]) + 1
        self.prompt, self.min_new_tokens, self.stops = tuple(prompt), min_new_tokens, stop_tokens
        self.penalties = settings
        factor = settings.get("repetition_penalty", 1.0)
        self.stretch = max(factor, 1 / factor)

    def read(self, text):
        """Computes all rows of a text at once: a row knows only what stands before it."""
        text = tuple(int(token) for token in text)
        exact = self.wide.logits(text)
        self.bound = max(self.bound, 2 * np.abs(self.narrow.logits(text) - exact).max())
        for i in range(len(text)):
            self.rows.setdefault(text[: i + 1], exact[:, i])

    def _row(self, text, exit):
        if text not in self.rows:
            self.read(text)
        return self.rows[text][exit]

    @property
    def slack(self):
        """Of a confidence: d p = p (1 - p) (difference of two errors), and the rounding of p."""
        return self.bound / 2 + 2.0**-22

    def logprob_slack(self, logprob):
        return 2 * self.bound + 2.0**-21 * (1 + abs(logprob))

    def confidence(self, text, exit):
        return softmax(self._row(text, exit)).max()

    def leaves(self, text, exit, threshold):
        confidence = self.confidence(text, exit)
        if abs(confidence - float(threshold)) <= self.slack:
            raise Unsure
        return confidence >= threshold

    def largest(self, text, exit):
        return int(self._row(text, exit).argmax())

    def choose(self, text, exit):
        written = text[len(self.prompt) :]
        banned = self.stops if len(written) < self.min_new_tokens else ()
        row = self._row(text, exit)
        values = adjusted(row, self.prompt, written, banned=banned, **self.penalties)
        second, first = np.sort(values)[-2:]
        if first - second <= 2 * self.bound * self.stretch:
            raise Unsure
        return int(values.argmax())

    def logprob(self, text, exit, token):
        row = self._row(text, exit)
        return row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
