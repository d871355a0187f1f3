"""Groups: requests of several choices, from one prompt to a request for each (`live_request` has the picture).

A group forks where its KV is, or will be without a further word. It stays, FORKED, while its source may still say
something of a child in its name.
"""

from control_plane.router.dispatch.holders import Holders
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.register import Register


class Groups:
    def __init__(self, register: Register, holders: Holders) -> None:
        self._register = register
        self._holders = holders

    def name_children(self, group: LiveRequest) -> None:
        """Ids that a new target is told: what an earlier one may still say is of others."""
        group.children = {choice: self._register.mint_id() for choice in group.choices}

    def fork(self, group: LiveRequest, now_us: int) -> list[object]:
        """Each choice goes on for itself.

        The group keeps its attempt numbers until it is over: a source that is its own target speaks under both.
        """
        worker = self._holders.worker(group.target)
        assert worker is not None
        actions: list[object] = []
        children: list[LiveRequest] = []
        for choice in group.choices:
            child = group.child(choice)
            worker.bound += 1
            if choice in group.submission.finishes:
                actions += self._holders.abort_at(child.target, child)
                continue
            if not group.submission.outputs[choice]:
                child.group, group.forks[choice] = group, child
            children.append(self._register.adopt(child))
            self._register.enter(child, Stage.DECODE, now_us)
        self._holders.decode_memory.divide(group, children)
        self._register.enter(group, Stage.FORKED, now_us)
        if not group.forks:
            self.disband(group)
        return actions

    def leave(self, child: LiveRequest) -> LiveRequest | None:
        """The group need not speak for this child any more. Returns the group if there is no other."""
        group, child.group = child.group, None
        if group is None:
            return None
        del group.forks[child.choice]
        return None if group.forks or not self._register.knows(group) else group

    def disband(self, group: LiveRequest) -> None:
        """It is over, and its workers know."""
        self._holders.unbind(group)
        self._holders.give_back(group)
        self._register.forget(group)

    def divide(self, group: LiveRequest) -> list[LiveRequest]:
        """Instead of the group, its choices one by one, nowhere yet."""
        return [group.single(self._register.mint_id(), choice) for choice in group.open_choices]
