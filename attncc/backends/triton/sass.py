"""Whether ptxas kept the matrix descriptors of a Hopper kernel: its SASS against its PTX.

ptxas 12.8, which Triton 3.6 and 3.7 come with, can run short of uniform registers and lose a copy
between two of them; a descriptor of HGMMA is then a sum on top of whatever the register held. Such
a kernel multiplies the wrong shared memory, or traps. What was seen: forward kernels that put k and
v into one buffer in turn (num_stages=1, or rows that no asynchronous copy takes), with 64 or more
keys a tile and value rows under 128 bytes that are shorter than k's. ptxas 12.9 and 13.1 compiled
the same PTX right. And warp-specialised forwards, where a second loop used what was set before a
first one that may be skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product, zip_longest

Value = tuple[str, int]
"""What a 32-bit register may hold: where it comes from, and what was added to that. From "",
which stands for 0, comes a number."""

Values = frozenset[Value]
State = dict[str, Values]
"""By register; one that is missing was not set."""

WORD = 0xFFFFFFFF
UNSET: Value = ("unset", 0)
ARGUMENT: Value = ("argument", 0)
ADDRESS: Value = ("address", 0)
"""Fourteen bits, as the shared address in a descriptor has."""
OTHER: Value = ("other", 0)
UNKNOWN: Values = frozenset({OTHER})
ZERO: Values = frozenset({("", 0)})
MANY: Values = frozenset({("many", 0)})
NAMED = {
    "": "a number",
    "unset": "unset",
    "argument": "an argument of the kernel",
    "address": "an address",
}
TABLES = ("BRX", "BRXU")
"""Jumps into a table, as warp-specialised kernels begin: to what else is not reached."""
JUMPS = ("BRA", "JMP", "EXIT", "RET", *TABLES)
COMPUTED = ("JMX", "JMXU", "CALL")
LIMIT = 8
"""Values of a register that are told apart."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """An instruction whose descriptor is none that the PTX asks for."""

    address: int
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.text}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is added to shared addresses to make descriptors: low words, and high words.

    mixed: different high words to one address.
    """

    low: frozenset[int]
    high: frozenset[int]
    mixed: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS; `guard` is the predicate that it runs under."""

    address: int
    guard: str
    op: str
    operands: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        """UIADD3 of UIADD3.64."""
        return self.op.partition(".")[0]

    @property
    def jumps(self) -> bool:
        return self.name in JUMPS

    @property
    def targets(self) -> list[int]:
        """Addresses that it may jump to."""
        return [int(o, 16) for o in self.operands if o.startswith("0x")] if self.jumps else []

    @property
    def falls_through(self) -> bool:
        """What stands below it may run next; a condition may stand among the operands too."""
        conditional = any(re.fullmatch(r"!?U?P\d", o) for o in self.operands)
        return not self.jumps or bool(self.guard) or conditional


@dataclass(slots=True)
class Block:
    """Instructions that run one after the other; `leads_to` are addresses of other blocks."""

    code: list[Instruction] = field(default_factory=list)
    leads_to: list[int] = field(default_factory=list)


def suspects(sass: str, ptx: str) -> tuple[Suspect, ...]:
    """Matrix instructions with a descriptor that cannot be one of the PTX's; none is good news.

    Follows sums of registers along all paths. What passes unseen: values out of memory or of other
    arithmetic, or one of more than a few; the wrong one of two addresses; computed jumps.
    """
    asked = descriptors(ptx)
    code = list(instructions(sass))
    if not asked.high or any(i.name in COMPUTED for i in code):
        return ()
    blocks = flow(code)
    starts = settle(blocks)
    found = [s for at in starts for s in _inspect(blocks[at].code, dict(starts[at]), asked)]
    return tuple(sorted(found, key=lambda s: s.address))


# PTX


def at_risk(ptx: str) -> bool:
    """Some address is in descriptors of two layouts, as where v's rows are narrower than k's.

    It takes milliseconds, and no other kernels lost copies: of 131 forward kernels at risk 43 did
    (Triton 3.6, H100 as the target), of 329 others none; 7 more were left out.
    """
    return descriptors(ptx).mixed


def descriptors(ptx: str) -> Asked:
    """The 64-bit constants in the descriptors of all wgmma.mma_async, in halves.

    Nothing where one of them cannot be followed to its constant, which has a high word.
    """
    made = {name: (base, int(n, 0)) for name, base, n in _PTX_MADE.findall(ptx)}
    found = {_constant(name, made) for name in _PTX_USED.findall(_without_registers(ptx))}
    low = frozenset(n & WORD for _, n in found)
    high = frozenset(n >> 32 & WORD for _, n in found)
    if 0 in high:
        return Asked(frozenset(), frozenset(), mixed=False)
    layouts = {(base, n >> 32) for base, n in found}
    return Asked(low, high, mixed=len(layouts) > len({base for base, _ in layouts}))


_PTX_MADE = re.compile(
    r"^\s*(?:or\.b64|add\.s64)\s+(%rd\d+), (%rd\d+), (-?[\da-fA-Fx]+);", re.MULTILINE
)
_PTX_USED = re.compile(r"(%rd\d+)")


def _without_registers(ptx: str) -> str:
    """The operands of wgmma.mma_async that are no lists of registers."""
    lines = re.findall(r"wgmma\.mma_async\S* (.*)", ptx)
    return "\n".join(re.sub(r"\{[^}]*\}", "", line) for line in lines)


def _constant(name: str, made: Mapping[str, tuple[str, int]]) -> tuple[str, int]:
    """The register of an address, and what all is added to it to make this descriptor."""
    total = 0
    while name in made:
        name, number = made[name]
        total += number
    return name, total


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", text) is not None


# SASS

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([A-Z]\S*)\s*(.*?)\s*;", re.MULTILINE)


def instructions(sass: str) -> Iterator[Instruction]:
    """The lines of `cuobjdump -sass`."""
    for address, guard, op, rest in _LINE.findall(sass):
        operands = tuple(o.strip() for o in rest.split(",")) if rest else ()
        yield Instruction(int(address, 16), guard, op, operands, f"{op} {rest}")


def flow(code: list[Instruction]) -> dict[int, Block]:
    """Basic blocks, by the address of their first instruction."""
    heads = {code[0].address} if code else set()
    for this, below in pairwise(code):
        if this.jumps:
            heads |= {*this.targets, below.address}
    blocks = {head: Block() for head in sorted(heads)}
    current = Block()
    for this, below in zip_longest(code, code[1:]):
        current = blocks.get(this.address, current)
        current.code.append(this)
        current.leads_to += this.targets
        if below and below.address in blocks and this.falls_through:
            current.leads_to.append(below.address)
    tables = [block for block in blocks.values() if block.code[-1].name in TABLES]
    for head in blocks if tables else ():
        if head not in _reached(blocks):
            for table in tables:
                table.leads_to.append(head)
    return blocks


def _reached(blocks: Mapping[int, Block]) -> set[int]:
    """Where a kernel may come that begins with the first block."""
    found, todo = set(), list(blocks)[:1]
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            todo += blocks[at].leads_to
    return found


def settle(blocks: Mapping[int, Block]) -> dict[int, State]:
    """What registers may hold where each reachable block begins."""
    starts: dict[int, State] = {at: {} for at in sorted(blocks)[:1]}
    todo = list(starts)
    while todo:
        at = todo.pop()
        state = dict(starts[at])
        for instruction in blocks[at].code:
            step(state, instruction)
        for to in blocks[at].leads_to:
            merged = _merged(starts[to], state) if to in starts else state
            if to not in starts or merged != starts[to]:
                starts[to] = dict(merged)
                todo.append(to)
    return starts


def _merged(a: State, b: State) -> State:
    return {r: _few(_held(a, r) | _held(b, r)) for r in a.keys() | b.keys()}


def _few(values: Iterable[Value]) -> Values:
    found = frozenset(values)
    return MANY if found & MANY or len(found) > LIMIT else found


# One instruction


def step(state: State, this: Instruction) -> None:
    """Let registers be set: uniform ones, and others that descriptors may come out of."""
    if not this.operands or not _REGISTER.fullmatch(this.operands[0]):
        return
    low = this.operands[0]
    written = {low: _result(state, this)}
    if this.name in ("UIADD3", "ULDC") and this.op.endswith(".64"):
        written[after(low)] = _upper(state, this)
    elif written[low] == ZERO and this.op == "CS2R":
        written[after(low)] = ZERO
    elif written[low] == UNKNOWN:
        written |= {after(low, n): UNKNOWN for n in range(1, _width(this))}
    for register, values in written.items():
        old = read(state, register) if this.guard else frozenset()
        state[register] = _few(values | old)


_REGISTER = re.compile(r"U?R\d+")


def _width(this: Instruction) -> int:
    """Registers that an instruction may set, at most."""
    if tile := re.match(r"[A-Z]GMMA\.64x(\d+)x", this.op):
        return int(tile[1]) // 2
    if this.name.startswith("LD") or this.name.endswith("MMA"):
        return 4
    return 2 if this.name == "CS2R" or re.search(r"\.(64|WIDE)\b", this.op) else 1


def after(register: str, count: int = 1) -> str:
    """The register that many further on; after("URZ") is itself."""
    kind, number = register.rstrip("0123456789Z"), register.lstrip("UR")
    return register if number == "Z" else f"{kind}{int(number) + count}"


def read(state: State, operand: str) -> Values:
    """What an operand may be: a number, UR4, -UR4, or the high word ~UR5 of -UR4."""
    if _is_number(operand):
        return frozenset({("", int(operand, 0) & WORD)})
    found = re.fullmatch(r"([-~]?)(U?R(?:\d+|Z))(?:\.reuse)?", operand)
    if not found:
        return UNKNOWN
    sign, register = found.groups()
    match sign:
        case "-":
            return _each(_negated, [_held(state, register)])
        case "~" if register in ("RZ", "URZ"):
            return UNKNOWN
        case "~":
            borrows = _held(state, after(register, -1)) != ZERO
            return _each(lambda v: _sum(_negated(v), ("", -borrows)), [_held(state, register)])
        case _:
            return _held(state, register)


def _held(state: State, register: str) -> Values:
    if register in ("RZ", "URZ"):
        return ZERO
    return state.get(register, frozenset({UNSET}) if register.startswith("U") else UNKNOWN)


def _negated(value: Value) -> Value:
    origin, number = value
    return value if origin == "unset" else OTHER if origin else ("", -number & WORD)


def _sources(this: Instruction) -> list[str]:
    return [o for o in this.operands[1:] if not re.fullmatch(r"!?U?P[T\d]", o)]


def _result(state: State, this: Instruction) -> Values:
    sources = [read(state, o) for o in _sources(this)]
    match this.name:
        case "UMOV" | "MOV" | "R2UR":
            return sources[0]
        case "CS2R" if this.operands[1] == "SRZ":
            return ZERO
        case "USEL":
            return sources[0] | sources[1]
        case "UIADD3" | "IADD3":
            return _each(_sum, sources)
        case "IMAD" if sources[:2] == [ZERO, ZERO]:
            return sources[2]
        case "ULDC":
            return frozenset({_constant_bank(this)})
        case "USGXT" | "SGXT" if sources[1] == frozenset({("", 14)}):
            return _each(lambda v: UNSET if v[0] == "unset" else ADDRESS, sources[:1])
        case "ULOP3" | "LOP3":
            return _each(_logic, sources)
        case _:
            return UNKNOWN


def _upper(state: State, this: Instruction) -> Values:
    """The high word of a result of 64 bits; no carry leaves the low word of a descriptor."""
    if this.name == "ULDC":
        return frozenset({_constant_bank(this)})
    names = [o for o in _sources(this) if "UR" in o]
    return _each(_sum, [read(state, _above(o)) for o in names])


def _constant_bank(this: Instruction) -> Value:
    return ARGUMENT if this.operands[1].startswith("c[0x0]") else OTHER


def _above(operand: str) -> str:
    """UR5 of UR4, and ~UR5 of -UR4."""
    sign, register = ("~", operand[1:]) if operand.startswith("-") else ("", operand)
    return sign + after(register)


def _each(apply: Callable[..., Value], sources: list[Values]) -> Values:
    if any(s == MANY for s in sources):
        return MANY
    return _few(apply(*values) for values in product(*sources))


def _sum(*values: Value) -> Value:
    """Number plus number, or something plus numbers."""
    total = sum(offset for _, offset in values) & WORD
    origins = [origin for origin, _ in values if origin]
    if "unset" in origins:
        return UNSET
    return OTHER if len(origins) > 1 else ("".join(origins), total)


def _logic(*values: Value) -> Value:
    """a | b and a & 0x3fff."""
    *terms, (_, table) = values
    if any(origin == "unset" for origin, _ in terms):
        return UNSET
    a, b = terms[:2]
    if table == 0xFC and (not a[0] or not b[0]):
        return (a[0] or b[0], a[1] | b[1])
    return ADDRESS if table == 0xC0 and ("", 0x3FFF) in (a, b) else OTHER


# Descriptors


def _inspect(code: list[Instruction], state: State, asked: Asked) -> Iterator[Suspect]:
    for this in code:
        if re.match(r"[A-Z]GMMA\b", this.op):
            reasons = [r for low in _descriptors(this) for r in _wrong(state, low, asked)]
            yield from (Suspect(this.address, this.text, r) for r in reasons)
        step(state, this)


def _descriptors(this: Instruction) -> list[str]:
    """The first register of each descriptor: A's, unless A is in registers, and B's."""
    found = re.search(r"gdesc\[(UR\d+)\]", this.text)
    if not found:
        return []
    first = found[1]
    from_registers = this.operands[1].startswith("R")
    return [after(first, 2)] if from_registers else [first, after(first, 2)]


def _wrong(state: State, low: str, asked: Asked) -> Iterator[str]:
    high = after(low)
    for origin, number in sorted(read(state, high)):
        if origin in ("unset", "argument", "address"):
            yield f"{high} may be {NAMED[origin]}"
        elif not origin and number not in asked.high:
            yield f"{high} may be {number:#x}, which the PTX has not"
    for origin, number in sorted(read(state, low)):
        if origin in ("unset", "argument", ""):
            yield f"{low} may be {NAMED[origin]}"
        elif origin == "address" and number not in asked.low:
            yield f"{low} may be an address + {number:#x}, which the PTX has not"
