"""Numbers that device code repeats, since it cannot import them, are those of the host."""

from __future__ import annotations

from graphexec.kernels import update
from graphexec.plan import FinishCode, RecordLayout


def test_the_update_kernel_speaks_the_hosts_codes() -> None:
    codes = (update._RUNNING, update._STOP, update._LENGTH, update._NAN, update._PARKED)
    named = (FinishCode.RUNNING, FinishCode.STOP, FinishCode.LENGTH, FinishCode.NAN, FinishCode.PARKED)
    assert codes == named
    assert update._HEADER == RecordLayout.HEADER
