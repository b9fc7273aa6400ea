"""What a user's events, and rows of derived values, are after more of them.

Shapes: V users.
"""

from __future__ import annotations

import numpy as np

from feature_store.online.codec import concatenated, ranges, take_rows
from feature_store.online.derived import Rows
from feature_store.online.reading import Events, chosen
from recsys.encoding.columns import offsets_of


def merged_events(old: Events, events: Events, *, since: int | None, keep: int) -> Events:
    """The newest events of those that are stored and of more.

    Args:
        old: of V users, as they are stored.
        events: of V users, each user's in order.
        since: of what is stored, events before this time are replaced by ``events``; None keeps them all.
        keep: so many of each user.
    """
    if since is not None and len(old.times):
        old = chosen(old, old.times >= since)
    if len(old.times):
        users = [np.repeat(np.arange(len(events.offsets) - 1), np.diff(e.offsets)) for e in (old, events)]
        user, times = np.concatenate(users), np.concatenate([old.times, events.times])
        # Equal times: the log before what arrived later; of pushes, in the order of arrival.
        came = np.concatenate(
            [np.full(len(old.times), int(since is not None)), np.full(len(events.times), int(since is None))]
        )
        order = np.lexsort((came, times, user))
        columns = {f: take_rows(concatenated([old.columns[f], c]), order) for f, c in events.columns.items()}
        lengths = np.diff(old.offsets) + np.diff(events.offsets)
        events = Events(offsets_of(lengths), times[order], columns)
    lengths = np.diff(events.offsets)
    kept = np.minimum(lengths, keep)
    if (kept < lengths).any():
        rows = ranges(events.offsets[1:] - kept, kept)
        columns = {f: take_rows(c, rows) for f, c in events.columns.items()}
        events = Events(offsets_of(kept), events.times[rows], columns)
    return events


def merged_rows(old: Rows, rows: Rows, *, until: int | None, keep: int | None) -> Rows:
    """The newest rows of those that are stored and of more.

    Args:
        old: of V users, as they are stored.
        rows: of V users, each beginning with the record that says since when all are there.
        until: of what is stored, rows before this time are replaced; None keeps them all.
        keep: so many of each user, beside the first record; None for all.
    """
    num_users = len(rows.offsets) - 1
    first = old.offsets[:-1][np.diff(old.offsets) > 0]
    is_mark = np.zeros(len(old.times), np.bool_)
    is_mark[first] = True
    is_kept = ~is_mark if until is None else ~is_mark & (old.times >= until)
    old_user = np.repeat(np.arange(num_users), np.diff(old.offsets))
    user = np.repeat(np.arange(num_users), np.diff(rows.offsets))
    since = rows.times[rows.offsets[:-1]].copy()
    # A mark at or after ``until`` says that newer rows were evicted: it holds for what replaces older ones, too.
    is_held = is_mark if until is None else is_mark & (old.times >= until)
    since[old_user[is_held]] = old.times[is_held]
    users, times = np.concatenate([old_user[is_kept], user]), np.concatenate([old.times[is_kept], rows.times])
    columns = {n: np.concatenate([c[is_kept], rows.columns[n]]) for n, c in old.columns.items()}
    is_new_mark = np.zeros(len(times), np.bool_)
    is_new_mark[len(times) - len(rows.times) + rows.offsets[:-1]] = True
    times[is_new_mark] = since
    order = np.lexsort((times, ~is_new_mark, users))
    # Late ones from before that time would not be alone: others of then are gone.
    order = order[times[order] >= since[users[order]]]
    users, times = users[order], times[order]
    offsets = np.searchsorted(users, np.arange(num_users + 1))
    kept = np.minimum(np.diff(offsets), 1 + (keep or 2**62))
    is_cut = kept < np.diff(offsets)
    if is_cut.any():
        # The mark moves to just after the newest row that goes.
        place_of = ranges(offsets[1:] - kept + 1, kept - 1)
        marks = offsets[:-1]
        times[marks[is_cut]] = times[(offsets[1:] - kept)[is_cut]] + 1
        remaining = np.sort(np.concatenate([marks, place_of]))
        remaining = remaining[(times >= times[marks][users])[remaining]]
        order, users, times = order[remaining], users[remaining], times[remaining]
        offsets = np.searchsorted(users, np.arange(num_users + 1))
    return Rows(offsets, times, {n: c[order] for n, c in columns.items()})
