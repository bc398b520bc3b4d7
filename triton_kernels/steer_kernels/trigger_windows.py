"""The windows of triggers in plain NumPy. Tests compare `advance_triggers` with it, and a CPU engine runs it.

For a row at position p and a trigger with the token sequences `after` and `until`:

    opened = the last position before p where `after` ended (without `each`: the first one); -1 without `after`
    closed = the last position up to p where `until` ended
    the row is in the window that begins at opened + 1, if opened exists, closed <= opened, and the window has at most
    `length` tokens up to and including p

So a window begins with the token after `after`, and the last token of `until` is outside. Only the history of a slot is
kept between steps, and it is kept by position: after rejected draft tokens, the next step begins at an earlier position
and finds there what it needs.

Legend: see `tables`; N rows of requests with triggers, B requests, M tokens of a sequence, K = M + 1 tokens up to p.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from steer_kernels import tables as tb
from steer_kernels.tables import MAX_POSITION, MAX_TRIGGER_TOKENS, NEVER, Tables

Ints = NDArray[np.integer]

_UNKNOWN = -(2**30)
"""Below every position: the start of a running maximum."""


def advance_triggers_reference(
    query_start_loc_B1: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    positions_T: torch.Tensor,
    input_ids_T: torch.Tensor,
    tables: Tables,
) -> None:
    """Write the windows of the step's rows, and the history of their slots, as `advance_triggers` does.

    All tensors are in host memory.
    """
    slots_B = idx_mapping_B.numpy().astype(np.int64) + 1
    places = tables.num_triggers_S.numpy()[slots_B].nonzero()[0]
    if not len(places):
        return
    slots_B = slots_B[places]
    starts_B, ends_B = query_start_loc_B1.numpy()[places], query_start_loc_B1.numpy()[places + 1]
    counts_B = ends_B - starts_B
    num_triggers = int(tables.num_triggers_S.numpy()[slots_B].max())
    if (counts_B == 1).all():  # decoding: as few calls as possible
        rows_N, offset_N, slots_N = starts_B, np.zeros_like(starts_B), slots_B
    else:
        offset_N = np.concatenate([np.arange(count) for count in counts_B])
        rows_N = np.repeat(starts_B, counts_B) + offset_N
        slots_N = np.repeat(slots_B, counts_B)
    if not len(rows_N):
        return
    pos_N = positions_T.numpy()[rows_N].astype(np.int64)
    history_SHC = tables.history_SHC.numpy()
    num_positions = history_SHC.shape[1]
    triggers_NJP = tables.triggers_SJP.numpy()[slots_N, :num_triggers]
    most = _longest(triggers_NJP)
    tokens_NK = _last_tokens(input_ids_T.numpy(), rows_N, offset_N, slots_N, pos_N, history_SHC, most)
    opens_NJ = _match(triggers_NJP[..., tb.AFTER : tb.AFTER + most], tokens_NK[:, 1:])
    closes_NJ = _match(triggers_NJP[..., tb.UNTIL : tb.UNTIL + most], tokens_NK[:, :-1])

    first_N = offset_N == 0
    before_NC = history_SHC[slots_N, (pos_N - offset_N - 1) % num_positions]
    opened_NJ = before_NC[:, 1 : 1 + num_triggers].astype(np.int64)
    closed_NJ = before_NC[:, 1 + tb.MAX_TRIGGERS :][:, :num_triggers].astype(np.int64)
    each_NJ = triggers_NJP[..., tb.EACH] != 0
    found_NJ = np.where(opens_NJ, pos_N[:, None] - 1, _UNKNOWN)
    ended_NJ = np.where(closes_NJ, pos_N[:, None], _UNKNOWN)
    if not first_N.all():
        found_NJ, ended_NJ = _within_requests(found_NJ, ended_NJ, each_NJ, counts_B)
    replaces_NJ = (found_NJ != _UNKNOWN) & (each_NJ | (opened_NJ == NEVER))
    opened_NJ = np.where(replaces_NJ, found_NJ, opened_NJ)
    closed_NJ = np.maximum(closed_NJ, ended_NJ)

    length_NJ = triggers_NJP[..., tb.LENGTH]
    open_NJ = (opened_NJ != NEVER) & (closed_NJ <= opened_NJ) & (pos_N[:, None] - opened_NJ <= length_NJ)
    tables.windows_TJ.numpy()[rows_N, :num_triggers] = np.where(open_NJ, opened_NJ + 1, MAX_POSITION)

    kept_N = np.repeat(counts_B, counts_B) - offset_N <= num_positions if not first_N.all() else first_N
    at = (slots_N[kept_N], (pos_N % num_positions)[kept_N])
    history_SHC[(*at, 0)] = tokens_NK[kept_N, 0]
    history_SHC[*at, 1 : 1 + num_triggers] = opened_NJ[kept_N]
    history_SHC[*at, 1 + tb.MAX_TRIGGERS : 1 + tb.MAX_TRIGGERS + num_triggers] = closed_NJ[kept_N]


class QuietDecoding:
    """A batch that decodes, whose triggers saw nothing in its last step: most steps of an answer.

    While the same requests advance by one token, and neither the token before nor this one can end a sequence, only
    the history moves on. That takes a third of the calls.
    """

    def __init__(
        self, query_start_loc_B1: torch.Tensor, idx_mapping_B: torch.Tensor, positions_T: torch.Tensor, tables: Tables
    ) -> None:
        """After a step with these arguments, which `advance_triggers_reference` has just advanced."""
        self._starts_B1 = query_start_loc_B1.numpy().copy()
        self._idx_mapping_B = idx_mapping_B.numpy().copy()
        slots_B = self._idx_mapping_B.astype(np.int64) + 1
        self._rows_N = tables.num_triggers_S.numpy()[slots_B].nonzero()[0]
        self._slots_N = slots_B[self._rows_N]
        self._pos_N = positions_T.numpy()[self._rows_N].astype(np.int64)
        count = int(tables.num_triggers_S.numpy()[self._slots_N].max(initial=0))
        triggers_NJP = tables.triggers_SJP.numpy()[self._slots_N, :count]
        self._opens_NJ, self._closes_NJ = triggers_NJP[..., tb.AFTER], triggers_NJP[..., tb.UNTIL]
        used_NJ = np.arange(count) < tables.num_triggers_S.numpy()[self._slots_N, None]
        self._opens_NJ = np.where(used_NJ, self._opens_NJ, tb.NO_TOKEN)
        self._closes_NJ = np.where(used_NJ, self._closes_NJ, tb.NO_TOKEN)
        windows_NJ = tables.windows_TJ.numpy()[self._rows_N, :count].astype(np.int64)
        ends_NJ = np.where(used_NJ, windows_NJ + triggers_NJP[..., tb.LENGTH], 2 * MAX_POSITION)
        self._until_N = ends_NJ.min(axis=1, initial=2 * MAX_POSITION)
        """The first position at which a window has its full length."""
        self._token_N = tables.history_SHC.numpy()[self._slots_N, self._pos_N % tables.history_SHC.shape[1], 0]

    def advance(
        self,
        query_start_loc_B1: torch.Tensor,
        idx_mapping_B: torch.Tensor,
        positions_T: torch.Tensor,
        input_ids_T: torch.Tensor,
        tables: Tables,
    ) -> bool:
        """Advance the triggers, as `advance_triggers_reference` does; False if this step has to be advanced by it.

        The caller makes a new object when a program enters or leaves a slot.
        """
        same = np.array_equal(self._idx_mapping_B, idx_mapping_B.numpy()) and np.array_equal(
            self._starts_B1, query_start_loc_B1.numpy()
        )
        if not same or len(positions_T) != len(self._idx_mapping_B):
            return False
        pos_N, token_N = positions_T.numpy()[self._rows_N], input_ids_T.numpy()[self._rows_N]
        if (pos_N != self._pos_N + 1).any() or (pos_N >= self._until_N).any():
            return False
        if (self._opens_NJ == self._token_N[:, None]).any() or (self._closes_NJ == token_N[:, None]).any():
            return False
        history_SHC = tables.history_SHC.numpy()
        num_positions = history_SHC.shape[1]
        now_NC = history_SHC[self._slots_N, self._pos_N % num_positions]
        now_NC[:, 0] = token_N
        history_SHC[self._slots_N, pos_N % num_positions] = now_NC
        self._pos_N, self._token_N = pos_N.astype(np.int64), token_N
        return True


def _longest(triggers_NJP: Ints) -> int:
    """Tokens of the longest sequence. The rest of a sequence is padding, which matches every token."""
    padding_P = (triggers_NJP[..., tb.AFTER :] == tb.ANY_TOKEN).all(axis=(0, 1)).reshape(2, MAX_TRIGGER_TOKENS)
    return max(1, int((~padding_P).sum(1).max()))


def _last_tokens(
    input_ids_T: Ints, rows_N: Ints, offset_N: Ints, slots_N: Ints, pos_N: Ints, history_SHC: Ints, most: int
) -> Ints:
    """[N, most + 1]: the tokens at p, p - 1, ...: of this step as far as it goes, before that of the history."""
    back_K = np.arange(most + 1)
    old_NK = history_SHC[slots_N[:, None], (pos_N[:, None] - back_K) % history_SHC.shape[1], 0]
    in_step_NK = back_K <= offset_N[:, None]
    return np.where(in_step_NK, input_ids_T[np.where(in_step_NK, rows_N[:, None] - back_K, 0)], old_NK)


def _match(sequences_NJM: Ints, tokens_NM: Ints) -> NDArray[np.bool_]:
    """[N, J]: whether each sequence, given last token first, ends with the first of the tokens."""
    found: NDArray[np.bool_] = ((sequences_NJM == tb.ANY_TOKEN) | (sequences_NJM == tokens_NM[:, None])).all(-1)
    return found


def _within_requests(found_NJ: Ints, ended_NJ: Ints, each_NJ: NDArray[np.bool_], counts_B: Ints) -> tuple[Ints, Ints]:
    """Running last (or first) occurrence over the rows of each request."""
    found, ended, start = [], [], 0
    for count in counts_B:
        rows = slice(start, start + count)
        last_NJ = np.maximum.accumulate(found_NJ[rows])
        first_NJ = np.minimum.accumulate(np.where(found_NJ[rows] == _UNKNOWN, MAX_POSITION, found_NJ[rows]))
        first_NJ[first_NJ == MAX_POSITION] = _UNKNOWN
        found.append(np.where(each_NJ[rows], last_NJ, first_NJ))
        ended.append(np.maximum.accumulate(ended_NJ[rows]))
        start += count
    return np.concatenate(found), np.concatenate(ended)
