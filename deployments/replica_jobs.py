"""What a replica runs, by ticket: so that the scheduler learns of what was given up, and can have stopped what nobody
waits for any more.

A caller says itself what became of its grants, but not one that has died.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from deployments.engine import Engine, OnPiece
from deployments.messages import ChunkJob, ChunkReport, TicketId

REMEMBERED_TICKETS = 4096
"""Those that were stopped: a call of theirs that arrives late must not run either, since its room is given away."""


class ReplicaJobs:
    """`withdraw` is called for each job that has left the engine, or never came, without having been done."""

    def __init__(self, engine: Engine, withdraw: Callable[[TicketId], object]) -> None:
        self._engine = engine
        self._withdraw = withdraw
        self._running: dict[TicketId, Future[ChunkReport]] = {}
        self._stopped: OrderedDict[TicketId, None] = OrderedDict()

    def start(self, job: ChunkJob, on_piece: OnPiece | None = None) -> Future[ChunkReport]:
        """Its report; without outcomes if it was stopped before it came."""
        if job.ticket_id in self._stopped:
            report: Future[ChunkReport] = Future()
            report.set_result(ChunkReport((), 0.0))
            return report
        report = self._engine.submit(job.rows, job.service_class, job.deadline_s, on_piece)
        self._running[job.ticket_id] = report
        report.add_done_callback(lambda report: self._ended(job.ticket_id, report))
        return report

    def stop(self, ticket_ids: Sequence[TicketId]) -> None:
        """Their rows leave the batch at the next step."""
        for ticket_id in ticket_ids:
            self._stopped[ticket_id] = None
            report = self._running.get(ticket_id)
            if report is None or not report.cancel():
                self._withdraw(ticket_id)
        while len(self._stopped) > REMEMBERED_TICKETS:
            self._stopped.popitem(last=False)

    def _ended(self, ticket_id: TicketId, report: Future[ChunkReport]) -> None:
        self._running.pop(ticket_id, None)
        if report.cancelled():
            self._withdraw(ticket_id)
