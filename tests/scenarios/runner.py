"""Scenario files: a script for one state machine, with everything that it must do (after etcd raft's testdata).

    # What the scenario guards, and which rule says so.
    > command words key=value
    what the machine does, one action per line

Lines that begin with `#` and empty lines are for the reader. A command without lines below it caused no action: that is
expected as firmly as any other outcome. Commands that every script has:

    > at 3000ms      time passes; whenever the machine's next deadline is reached, it gets its Tick (as from a host)
    > stall 3000ms   time passes and nobody calls the machine: its host was late
    > tick           a Tick now
    > deadline       prints the machine's next deadline

Protobuf fields are written `name=value`, nested ones `outer.name=value`; fields at zero are left out, as on the wire.
Lists of numbers are abbreviated: `1..4,9` is 1, 2, 3, 4, 9. Half-open ranges are written `[0,4)`. A list of messages is
said as `choices=7:0,8:1`, each message's fields in order, and shown as `choices=(request=7) choices=(...)`.

What the commands of one machine mean is said in its script (`control_scripts`, `transfer_scripts`, `worker_script`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.base.machine import Tick

PROMPT = "> "
TICKS_MAX = 1_000  # in one `at`: more is a machine whose deadline does not move


@dataclass(frozen=True, slots=True)
class Words:
    """A command's words: those in order, and those with a key."""

    plain: Sequence[str]
    keyed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Words":
        pairs = [word.partition("=") for word in words if "=" in word]
        return cls([word for word in words if "=" not in word], {key: value for key, _, value in pairs})


class Script:
    """Interprets one file for one machine. Subclasses add `do_<command>(words)` and say what actions look like."""

    def __init__(self) -> None:
        self.now_us = 0
        self.machine: Any = None

    # -- for subclasses ------------------------------------------------------------------------------------------------
    def show(self, action: Any) -> str | None:
        """An action in words; None for one that is nobody's business."""
        raise NotImplementedError

    def said(self, speaker: str, words: Words) -> list[str]:
        """A command of the form `> speaker: message field=value`."""
        raise NotImplementedError

    def check(self) -> None:
        """The machine's books, after every step."""

    def step(self, event: Any) -> list[str]:
        return self.shown(self.machine.step(event, self.now_us))

    def shown(self, actions: Sequence[Any]) -> list[str]:
        lines = [line for action in actions if (line := self.show(action)) is not None]
        self.check()
        return lines

    # -- running -------------------------------------------------------------------------------------------------------
    def run(self, line: str) -> list[str]:
        verb, *rest = line.split()
        if verb.endswith(":"):
            return self.said(verb[:-1], Words.parse(rest))
        command: Callable[[Words], list[str]] = getattr(self, f"do_{verb}")
        return command(Words.parse(rest))

    def tick(self) -> list[str]:
        return self.step(Tick())

    @property
    def next_deadline_us(self) -> int | None:
        deadline_us: int | None = self.machine.next_deadline_us
        return deadline_us

    # -- time ----------------------------------------------------------------------------------------------------------
    def do_at(self, words: Words) -> list[str]:
        end_us = milliseconds(words.plain[0])
        lines = []
        for _ in range(TICKS_MAX):
            deadline_us = self.next_deadline_us
            if deadline_us is None or deadline_us > end_us:
                break
            self.now_us = max(self.now_us, deadline_us)
            lines += [f"{clock(self.now_us)} {line}" for line in self.tick()]
            following_us = self.next_deadline_us
            assert following_us is None or following_us > self.now_us, f"ticked, and still due at {following_us}"
        else:
            raise AssertionError("the next deadline does not move")
        assert end_us >= self.now_us, "time only moves forward"
        self.now_us = end_us
        return lines

    def do_stall(self, words: Words) -> list[str]:
        self.now_us = milliseconds(words.plain[0])
        return []

    def do_tick(self, _: Words) -> list[str]:
        return self.tick()

    def do_deadline(self, _: Words) -> list[str]:
        deadline_us = self.next_deadline_us
        return ["no deadline" if deadline_us is None else f"next deadline {clock(deadline_us)}"]


def play(text: str, script: Script) -> str:
    """The same file, with what happened below each command."""
    return "".join(f"{line}\n" for line in _played(text.splitlines(), script))


def _played(lines: Sequence[str], script: Script) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.startswith(PROMPT):
            yield line
            try:
                yield from script.run(line.removeprefix(PROMPT))
            except Exception as error:
                error.add_note(f"line {number}: {line}")
                raise
        elif not line or line.startswith("#"):
            yield line


def milliseconds(text: str) -> int:
    """ "250ms" in microseconds."""
    return int(float(text.removesuffix("ms")) * 1_000)


def clock(time_us: int) -> str:
    return f"{time_us / 1_000:.10g}ms"
