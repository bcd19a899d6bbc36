"""Who is next: the waiting tickets of one model, in weighted fair order of classes, and of customers within a class.

Start-time fair queueing, twice. Each class, and each customer in it, has a virtual time that advances by cost over
weight with every ticket it is granted; the lowest goes next. One that comes back starts at the present virtual time, so
what it left unused was lent to the others and is not owed to it. Within a customer: rollouts that have begun, then the
earliest deadline, then first come. Every operation is O(log n); what is removed stays in the heaps until it surfaces.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from billing.commands import CustomerId
from deployments.messages import ServiceClass, Ticket, TicketId

CLASS_WEIGHTS: Mapping[ServiceClass, float] = {"interactive": 64.0, "standard": 8.0, "batch": 1.0}
"""Of the capacity when all of them want it. Interactive goes first for as long as it takes less than seven eighths."""


@dataclass(slots=True, eq=False)
class Waiting:
    ticket: Ticket
    cost: int
    """The ticket's: it is asked for many times."""
    arrival: int
    deadline: float
    """By the scheduler's clock; infinite without one."""
    is_queued: bool = False


@dataclass(slots=True, eq=False)
class _Flow:
    """One customer's tickets in one class."""

    customer_id: CustomerId
    weight: float
    virtual: float
    tickets: list[tuple[bool, float, int, Waiting]] = field(default_factory=list)
    """Not begun, deadline, arrival, and the ticket: a heap."""
    num_tickets: int = 0
    cost: int = 0
    turn: int = -1
    """Names its one valid entry in the order of its class; -1 while it has none."""


@dataclass(slots=True, eq=False)
class _Class:
    weight: float
    virtual: float = 0.0
    """Of the class among the classes."""
    now: float = 0.0
    """Of the flows within the class: where one that comes back starts."""
    latest: float = 0.0
    flows: dict[CustomerId, _Flow] = field(default_factory=dict)
    order: list[tuple[float, int, _Flow]] = field(default_factory=list)
    idle: list[tuple[float, CustomerId]] = field(default_factory=list)
    """Customers who wait for nothing, and the virtual time at which nothing needs to be remembered of them."""
    num_active: int = 0
    num_tickets: int = 0
    num_rows: int = 0
    cost: int = 0
    active_weight: float = 0.0
    """Of the flows that have tickets."""


class FairQueue:
    """Waiting tickets; `weights` of customers, 1 for those it does not name."""

    def __init__(self, weights: Mapping[CustomerId, float]) -> None:
        self._weights = weights
        self._classes = {name: _Class(weight) for name, weight in CLASS_WEIGHTS.items()}
        self._waiting: list[_Class] = []
        """Those that have tickets."""
        self._now = 0.0
        self._entries: dict[TicketId, Waiting] = {}
        self._turns = 0
        self.cost = 0
        self.num_rows = 0

    def reweigh(self, weights: Mapping[CustomerId, float]) -> None:
        """From now on; what was granted before stays paid for at the old weights."""
        self._weights = weights
        for group in self._classes.values():
            for flow in group.flows.values():
                flow.weight = self._weight(flow.customer_id)
            group.active_weight = sum(flow.weight for flow in group.flows.values() if flow.num_tickets)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, ticket_id: TicketId) -> bool:
        return ticket_id in self._entries

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries.values())

    def get(self, ticket_id: TicketId) -> Waiting | None:
        return self._entries.get(ticket_id)

    def by_class(self) -> dict[ServiceClass, tuple[int, int]]:
        """Rows and row-steps that wait."""
        return {name: (group.num_rows, group.cost) for name, group in self._classes.items()}

    def add(self, waiting: Waiting) -> None:
        ticket = waiting.ticket
        customer_id = ticket.terms.customer_id
        group = self._classes[ticket.terms.service_class]
        if not group.num_tickets:
            self._waiting.append(group)
            if group.virtual < self._now:
                group.virtual = self._now
        flow = group.flows.get(customer_id)
        if flow is None:
            flow = group.flows[customer_id] = _Flow(customer_id, self._weight(customer_id), group.now)
        if not flow.num_tickets:
            if flow.virtual < group.now:
                flow.virtual = group.now
            group.active_weight += flow.weight
            group.num_active += 1
            self._enter(group, flow)
        heapq.heappush(flow.tickets, (not ticket.begun, waiting.deadline, waiting.arrival, waiting))
        self._entries[ticket.ticket_id] = waiting
        waiting.is_queued = True
        self._count(group, flow, ticket.num_rows, waiting.cost, 1)

    def remove(self, ticket_id: TicketId) -> None:
        """It leaves without having been granted: nobody's virtual time moves."""
        waiting = self._entries.pop(ticket_id)
        group = self._classes[waiting.ticket.terms.service_class]
        self._leave(group, group.flows[waiting.ticket.terms.customer_id], waiting)

    def take(self, ticket_id: TicketId) -> None:
        """It is granted: its customer and its class pay for it in virtual time."""
        waiting = self._entries.pop(ticket_id)
        group = self._classes[waiting.ticket.terms.service_class]
        flow = group.flows[waiting.ticket.terms.customer_id]
        if group.now < flow.virtual:
            group.now = flow.virtual
        flow.virtual += waiting.cost / flow.weight
        if group.latest < flow.virtual:
            group.latest = flow.virtual
        if self._now < group.virtual:
            self._now = group.virtual
        group.virtual += waiting.cost / group.weight
        flow.turn = -1
        self._leave(group, flow, waiting)

    def head(self) -> Waiting | None:
        """The next in fair order, of those whose customers are not held back."""
        if len(self._waiting) > 1:
            self._waiting.sort(key=_turn)
        for group in self._waiting:
            flow = self._first(group)
            if flow is not None:
                return self._first_ticket(flow)
        return None

    def hold(self, waiting: Waiting) -> None:
        """Pass over this ticket's customer, in its class, until `release`."""
        self._classes[waiting.ticket.terms.service_class].flows[waiting.ticket.terms.customer_id].turn = -1

    def release(self, customer_id: CustomerId) -> None:
        """The customer may be granted work again. What it could not use meanwhile is not owed to it."""
        for group in self._classes.values():
            flow = group.flows.get(customer_id)
            if flow is not None and flow.num_tickets and flow.turn < 0:
                flow.virtual = max(flow.virtual, group.now)
                self._enter(group, flow)

    def cost_before(self, service_class: ServiceClass, customer_id: CustomerId, cost: int) -> float:
        """Row-steps that are granted before a new ticket of `cost` is done, itself included, if all stays as it is.

        At most everything that waits; less for a customer who waits for less than its fair share would give it.
        """
        group = self._classes[service_class]
        weight, active_weight = self._share(group, customer_id)
        own = self._cost_of(group, customer_id) + cost
        in_class = min(group.cost + cost, own * active_weight / weight)
        if self.cost == group.cost:  # no other class waits
            return in_class
        other_classes = sum(each.weight for each in self._waiting if each is not group)
        return min(self.cost + cost, in_class * (group.weight + other_classes) / group.weight)

    def has_place(self, service_class: ServiceClass, customer_id: CustomerId, cost: int, bound: int) -> bool:
        """Whether a new ticket fits: each customer may have its fair part of `bound` waiting in each class.

        One with nothing waiting may have a ticket of any size. While customers come the parts shrink, and what waited
        before may exceed them: in all never more than twice the bound, beyond an only ticket.
        """
        group = self._classes[service_class]
        if not group.num_tickets:
            return True
        own = self._cost_of(group, customer_id)
        weight, active_weight = self._share(group, customer_id)
        within_its_part = not own or own + cost <= bound * weight / active_weight
        return within_its_part and group.cost + cost <= 2 * bound

    def _share(self, group: _Class, customer_id: CustomerId) -> tuple[float, float]:
        """The customer's weight, and that of all who wait in its class, itself included."""
        weight = self._weight(customer_id)
        flow = group.flows.get(customer_id)
        waits = flow is not None and flow.num_tickets > 0
        return weight, group.active_weight + (0.0 if waits else weight)

    def _cost_of(self, group: _Class, customer_id: CustomerId) -> int:
        flow = group.flows.get(customer_id)
        return 0 if flow is None else flow.cost

    def _weight(self, customer_id: CustomerId) -> float:
        return self._weights.get(customer_id, 1.0)

    def _enter(self, group: _Class, flow: _Flow) -> None:
        self._turns += 1
        flow.turn = self._turns
        heapq.heappush(group.order, (flow.virtual, flow.turn, flow))
        if len(group.order) > 2 * group.num_active + 64:
            group.order = [entry for entry in group.order if entry[2].turn == entry[1]]
            heapq.heapify(group.order)

    def _first(self, group: _Class) -> _Flow | None:
        order = group.order
        while order:
            _, turn, flow = order[0]
            if flow.turn == turn:
                return flow
            heapq.heappop(order)
        return None

    def _first_ticket(self, flow: _Flow) -> Waiting:
        tickets = flow.tickets
        while not tickets[0][3].is_queued:
            heapq.heappop(tickets)
        return tickets[0][3]

    def _leave(self, group: _Class, flow: _Flow, waiting: Waiting) -> None:
        waiting.is_queued = False
        self._count(group, flow, -waiting.ticket.num_rows, -waiting.cost, -1)
        if not flow.num_tickets:
            flow.turn = -1
            flow.tickets.clear()
            if not group.num_tickets:
                self._waiting.remove(group)
                self._forget_all_but(group, flow)
                return
            group.active_weight -= flow.weight
            group.num_active -= 1
            heapq.heappush(group.idle, (flow.virtual, flow.customer_id))
        elif flow.turn < 0:
            self._enter(group, flow)
        if len(flow.tickets) > 2 * flow.num_tickets + 64:
            flow.tickets = [entry for entry in flow.tickets if entry[3].is_queued]
            heapq.heapify(flow.tickets)
        if group.idle:
            self._forget_idle(group)

    def _forget_all_but(self, group: _Class, last: _Flow) -> None:
        """Nobody waits, so nobody is owed anything. Who comes next is often who was last."""
        group.now = group.latest
        group.order.clear()
        if len(group.flows) > 1:
            group.flows.clear()
            group.flows[last.customer_id] = last
            group.idle.clear()
        group.active_weight, group.num_active = 0.0, 0

    def _forget_idle(self, group: _Class) -> None:
        """Customers who wait for nothing, once virtual time has caught up with them."""
        while group.idle and group.idle[0][0] <= group.now:
            virtual, customer_id = heapq.heappop(group.idle)
            flow = group.flows.get(customer_id)
            if flow is not None and not flow.num_tickets and flow.virtual <= virtual:
                del group.flows[customer_id]
        if len(group.idle) > 2 * len(group.flows) + 64:
            group.idle = [(flow.virtual, name) for name, flow in group.flows.items() if not flow.num_tickets]
            heapq.heapify(group.idle)

    def _count(self, group: _Class, flow: _Flow, rows: int, cost: int, tickets: int) -> None:
        flow.num_tickets += tickets
        flow.cost += cost
        group.num_tickets += tickets
        group.num_rows += rows
        group.cost += cost
        self.cost += cost
        self.num_rows += rows


def _turn(group: _Class) -> tuple[float, float]:
    """Of equals, the heaviest first."""
    return group.virtual, -group.weight
