"""Sends a chunk to the replica that the scheduler granted, where Serve would pick by queue length."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.messages import ChunkJob


class GrantedReplicaRouter(RequestRouter):  # type: ignore[misc]  # Ray publishes no types
    """The scheduler decides; this only looks the replica up.

    A granted replica that Serve no longer lists has died since: any other may run the job then, since a chunk carries
    its whole state and the caller's grant has accounted for the room.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None and pending_request.args:
            job = pending_request.args[0]
            if isinstance(job, ChunkJob):
                granted = [replica for replica in candidate_replicas if replica.replica_id.unique_id == job.replica_id]
                if granted:
                    return [granted]
        return [candidate_replicas]
