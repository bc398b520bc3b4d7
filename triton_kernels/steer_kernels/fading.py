"""Schedules that run in a decoding batch: the plan is kept, and only what depends on the position is written again.

Shares are computed as `shares_of` computes them, bit for bit. Equal schedules of a row, which usually are those of one
edit at all sites, are computed once.

Legend: see `cpu_plan`; F running schedules, P places (an entry of a row at a site) with a running schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels import tables as tb
from steer_kernels.shares import field, first_positions, scheduled, shares_of
from steer_kernels.tables import Tables


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """The schedules that have not reached their end at the positions of a step, without repetitions."""

    row_F: np.ndarray
    """int64: the row in the batch."""
    first_F: np.ndarray
    """int64: the position at which the schedule began."""
    end_F: np.ndarray
    """int64: the first position with the last share."""
    slope_F: np.ndarray
    to_F: np.ndarray
    exponential_F: np.ndarray | None
    """None = all are linear."""
    running_LEN1: torch.Tensor
    """bool: the places."""
    place_P: torch.Tensor
    """int64: their indices in the flat `running_LEN1`."""
    of_P: torch.Tensor
    """int64: the schedule of each place."""

    @classmethod
    def of_step(
        cls,
        words_NLEW: torch.Tensor,
        covers_NLE: torch.Tensor,
        rows_N: torch.Tensor,
        pos_N: torch.Tensor,
        windows_NJ: torch.Tensor,
        slot_N: torch.Tensor,
        tables: Tables,
    ) -> tuple[Schedules | None, np.ndarray | None]:
        """The running schedules of entries that apply, or None if there are none.

        Also int64 [N]: the last position up to the row's at which a schedule ended (0 = none did), or None if there
        are no schedules. Before it, the share is not the constant that a plan takes it for.

        covers_NLE: bool, start <= p < end. rows_N: the rows in the batch, which are of different requests. Other
        arguments as in `shares_of`.
        """
        over_NLE = words_NLEW[..., tb.OVER].numpy()
        if not over_NLE.any():
            return None, None
        first_NLE = first_positions(words_NLEW, windows_NJ).numpy().astype(np.int64)
        pos_N11 = pos_N.numpy()[:, None, None]
        end_NLE = np.where(over_NLE > 0, first_NLE + over_NLE, 0)
        ended_N = np.where(end_NLE <= pos_N11, end_NLE, 0).max(axis=(1, 2))
        running_NLE = (pos_N11 < end_NLE) & (first_NLE <= pos_N11) & covers_NLE.numpy()
        if not running_NLE.any():
            return None, ended_N
        index_NLE, place_3F = _distinct(words_NLEW.numpy(), running_NLE)
        n = torch.from_numpy(place_3F[0])
        words_FW = torch.from_numpy(words_NLEW.numpy()[*place_3F])
        applies_F = _without_schedules(words_FW, pos_N[n], windows_NJ[n], slot_N[n], tables)
        if not applies_F.any():
            return None, ended_N
        words_FW, place_3F = words_FW[torch.from_numpy(applies_F)], place_3F[:, applies_F]
        # The last element replaces -1.
        number_X = np.append(np.where(applies_F, applies_F.cumsum() - 1, -1), -1)
        number_LEN = number_X[index_NLE.transpose(1, 2, 0)]
        place_P = (number_LEN.ravel() >= 0).nonzero()[0]
        exponential_F = field(words_FW[:, tb.WHEN], tb.EXPONENTIAL).numpy() != 0
        slope_F, to_F = (words_FW[:, word].contiguous().view(torch.float32).numpy() for word in (tb.SLOPE, tb.TO))
        schedules = cls(
            row_F=rows_N.numpy()[place_3F[0]],
            first_F=first_NLE[*place_3F],
            end_F=end_NLE[*place_3F],
            slope_F=slope_F,
            to_F=to_F,
            exponential_F=exponential_F if exponential_F.any() else None,
            running_LEN1=torch.from_numpy(number_LEN >= 0).unsqueeze(-1),
            place_P=torch.from_numpy(place_P),
            of_P=torch.from_numpy(number_LEN.ravel()[place_P]),
        )
        return schedules, ended_N

    def shares(self, positions_B: np.ndarray) -> np.ndarray | None:
        """float32 [F] at these positions of a batch with one row per request; None if all schedules have ended."""
        at_F = positions_B[self.row_F]
        ended_F = at_F >= self.end_F
        if ended_F.all():
            return None
        return scheduled(self.slope_F, at_F - self.first_F, ended_F, self.to_F, self.exponential_F)


@dataclass(frozen=True, kw_only=True)
class Fading:
    """The part of a plan that follows its running schedules. Tensors with shares in them are views of the plan's."""

    schedules: Schedules
    plain_LECN1: torch.Tensor
    """Coefficients before they are multiplied by the share: C0 to C3, or C0 alone if all entries only add."""
    share_LEN1: torch.Tensor
    coefficients_LECN1: torch.Tensor
    """Those of the plan."""
    applies_LEN1: torch.Tensor | None
    """None if all entries only add: their plan does not read it."""
    gathered_LEND: torch.Tensor | None
    delta_LND: torch.Tensor | None
    """The sum over the entries, if the plan has it; then `gathered_LEND` is set."""

    def advance(self, positions_B: torch.Tensor) -> bool:
        """Write the plan for these positions. False if all schedules have ended, so that a new plan can last.

        The batch is the plan's: one row per request.
        """
        schedules = self.schedules
        share_F = schedules.shares(positions_B.numpy())
        if share_F is None:
            return False
        share_P = torch.from_numpy(share_F).index_select(0, schedules.of_P)
        self.share_LEN1.view(-1).index_copy_(0, schedules.place_P, share_P)
        torch.mul(self.plain_LECN1, self.share_LEN1.unsqueeze(2), out=self.coefficients_LECN1)
        if self.applies_LEN1 is not None:
            torch.ne(self.share_LEN1, 0, out=self.applies_LEN1)
        if self.delta_LND is not None:
            assert self.gathered_LEND is not None
            add_up(self.gathered_LEND, self.coefficients_LECN1[:, :, 0], self.delta_LND)
        return True


def add_up(gathered_LEND: torch.Tensor, c0_LEN1: torch.Tensor, delta_LND: torch.Tensor) -> torch.Tensor:
    """Write c0 * w, summed over the entries in order, into `delta_LND`."""
    torch.mul(gathered_LEND[:, 0], c0_LEN1[:, 0], out=delta_LND)
    for e in range(1, gathered_LEND.shape[1]):
        delta_LND += gathered_LEND[:, e] * c0_LEN1[:, e]
    return delta_LND


def _without_schedules(
    words_FW: torch.Tensor, pos_F: torch.Tensor, windows_FJ: torch.Tensor, slot_F: torch.Tensor, tables: Tables
) -> np.ndarray:
    """bool [F]: the entries would apply without their schedules. Arguments as in `shares_of`."""
    words_F1W = words_FW.unsqueeze(1).clone()
    words_F1W[..., tb.OVER] = 0
    applies_F: np.ndarray = shares_of(words_F1W, pos_F, windows_FJ, slot_F, tables).squeeze(1).numpy() != 0
    return applies_F


def _distinct(words_NLEW: np.ndarray, chosen_NLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the different schedules of each row's entry over the sites.

    Returns int64 [N, L, E]: the number of each chosen schedule, -1 elsewhere; and int64 [3, F]: the first place of
    each.
    """
    left_NLE, index_NLE = chosen_NLE.copy(), np.full(chosen_NLE.shape, -1)
    details_NLE4, start_NLE = words_NLEW[..., tb.WHEN : tb.TO + 1], words_NLEW[..., tb.START]
    places: list[np.ndarray] = []
    count = 0
    while left_NLE.any():
        n, e = np.nonzero(left_NLE.any(axis=1))
        site = left_NLE.argmax(1)[n, e]
        equal_FL = (details_NLE4[n, :, e] == details_NLE4[n, site, e][:, None]).all(-1)
        equal_FL &= (start_NLE[n, :, e] == start_NLE[n, site, e][:, None]) & left_NLE[n, :, e]
        number_F1 = np.arange(count, count + len(n))[:, None]
        index_NLE[n, :, e] = np.where(equal_FL, number_F1, index_NLE[n, :, e])
        left_NLE[n, :, e] &= ~equal_FL
        places.append(np.stack([n, site, e]))
        count += len(n)
    return index_NLE, np.concatenate(places, axis=1)
