"""Mutants: one small change at a random place of a file, which that file's own tests should see.

Planted bugs are what somebody thought of; these are what nobody did. A comparison takes its border
along, + becomes −, a number grows by one, a condition turns around, a call is left out. Which tests
are a file's own, the README's table says.

Run: python tests/mutants.py                 sixty files, one mutant each (an hour or two)
     python tests/mutants.py --count 20 --seed 7

Paper: DeMillo, Lipton and Sayward 1978, Hints on Test Data Selection (Computer 11).
"""

import ast
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import tyro
from bugs import ROOT, Planted, caught, planted
from tqdm import tqdm

from pictures import table
from run import UserError, main

OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SHOWN = ("script", "show", "draw", "plot", "told", "print")  # functions that only show something


def own_tests() -> dict[str, tuple[str, ...]]:
    """Each file's tests, as the README's table of files has them."""
    found = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            tests = tuple(re.findall(r"`tests/(test_\w+\.py)`", line))
            files = re.findall(r"`([\w/]+\.py)`", line.split("|")[1])
            found |= dict.fromkeys(files, tests) if tests else {}
    return found


def computing(node: ast.AST, inside: bool = False) -> Iterator[ast.AST]:
    """What is computed in functions: no settings, types, docstrings, messages or pictures."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):
        return
    if isinstance(node, ast.FunctionDef) and node.name.startswith(SHOWN):
        return
    if inside:
        yield node
    inside = inside or isinstance(node, ast.FunctionDef)
    defines = isinstance(node, ast.FunctionDef | ast.Lambda)
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list", "type_params") and not (
            field == "args" and defines
        ):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from computing(child, inside)


def changed(node: ast.AST) -> str:
    """The node's source with one small change; "" if there is none for its kind."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            node.ops = [OTHER[type(op)]()]
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            node.op = OTHER[type(op)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            return str(not value)
        case ast.Constant(value=int(value)):
            return str(value + 1)
        case ast.Constant(value=float(value)):
            return str(2 * value + 1)
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            return "pass"
        case _:
            return ""
    return f"({ast.unparse(node)})"


def mutant(file: str, tests: tuple[str, ...], draw: random.Random) -> tuple[Planted, str]:
    """A file with a change, and in words where and which; UserError if it computes nothing."""
    source = (ROOT / file).read_text(encoding="utf-8")
    lines = source.encode().splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]
    sites = [n for n in computing(ast.parse(source)) if hasattr(n, "lineno")]
    draw.shuffle(sites)
    for node in sites:
        if new := changed(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            whole = (source.encode()[:begin] + new.encode() + source.encode()[end:]).decode()
            ast.parse(whole)
            old = source.encode()[begin:end].decode()
            said = textwrap.shorten(f"{old} → {new}", 70)
            return Planted(file, source, whole, tests), f"{file}:{node.lineno} {said}"
    raise UserError(f"{file} computes nothing that could be changed")


@dataclass(frozen=True)
class Mutants:
    """Change one place in each of some files, and see whether their tests fail."""

    count: int = 60  # files
    seed: int = 0
    only: tuple[str, ...] = ()  # these files, instead of a draw of all

    def __post_init__(self):
        if not 1 <= self.count <= len(own_tests()):
            raise UserError(f"--count must be from 1 to {len(own_tests())}")
        if unknown := set(self.only) - own_tests().keys():
            raise UserError(f"{min(unknown)} is not in the README's table of files")


def outcome(it: Planted) -> str:
    try:
        done = planted(it, 900)
    except subprocess.TimeoutExpired:
        return "no end in 15 minutes"
    if caught(done) or (done.returncode == 2 and "ERROR collecting" in done.stdout):
        return "killed"  # the last: what imports it cannot
    return f"NOT TRIED: pytest's status {done.returncode}" if done.returncode else "SURVIVED"


def script() -> None:
    config = tyro.cli(Mutants, description=__doc__)
    tests, draw = own_tests(), random.Random(config.seed)
    files = config.only or draw.sample(sorted(tests), config.count)
    rows = []
    for file in tqdm(files, "mutants", leave=False, disable=None):
        it, where = mutant(file, tests[file], draw)
        rows.append((where, outcome(it)))
        tqdm.write("  ".join(rows[-1]))
    killed = sum(how.startswith("killed") for _, how in rows)
    print(table(("mutant", ""), *rows) + f"\n\n{killed} of {len(rows)} killed")
    sys.exit(killed < len(rows))


if __name__ == "__main__":
    main(script)
