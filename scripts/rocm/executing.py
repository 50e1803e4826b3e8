"""What the gate executes on one architecture: cases, large pools, mutants, and what is known to be wrong."""

import dataclasses
import fnmatch
import time
from collections.abc import Callable, Iterator
from typing import Any

from rocm import emulation, emulator, mutants
from rocm.cases import Case, cases, race
from rocm.emulation import Compiler, Executed
from rocm.large_pools import Large, large_cases, standing_controls
from rocm.mutants import Group

ALL = ["*"]

CASE, LARGE, CONTROL, MUTANTS = "case", "large", "control", "mutants"


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to execute, of one of the four kinds. `run` gives what is found, `wrong` among it. `fails`: it has to
    be found wrong.
    """

    kind: str
    name: str
    run: Callable[[], dict[str, Any]]
    fails: bool = False


def names(compiler: Compiler) -> list[str]:
    """Of all that there is."""
    return [task.name for task in tasks(compiler, ["?*"])]


def tasks(compiler: Compiler, names: list[str], share: tuple[int, int] = (0, 1)) -> list[Task]:
    """Those whose names fit a pattern. Unless they are named, a few of the controls without bounds stand for all, and
    of the mutants those of every n-th group, from the i-th on, with (i, n) as `share`: others do the rest.
    """
    index, count = share if names == ALL else (0, 1)
    found = [Task(CASE, case.name, lambda case=case: small(case, compiler)) for case in cases()]
    found += [Task(LARGE, large.name, lambda large=large: in_large_pools(large, compiler)) for large in large_cases()]
    found += [
        Task(MUTANTS, f"mutants of {group.name}", lambda group=group: mutated(group, compiler))
        for group in mutants.groups()[index::count]
    ]
    found.append(Task(CONTROL, race().name, lambda: small(race(), compiler), fails=True))
    unbounded = standing_controls() if names == ALL else [large for large in large_cases() if large.wrong_unbounded]
    found += [
        Task(CONTROL, f"{large.name}-without-bounds", lambda large=large: without_bounds(large, compiler), fails=True)
        for large in unbounded
    ]
    return [task for task in found if any(fnmatch.fnmatchcase(task.name, pattern) for pattern in names)]


def results(
    compiler: Compiler, names: list[str], *, backwards: bool, share: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Any]]:
    """A result for each of `tasks`.

    `backwards` begins with the last: what another process meanwhile computes from the first on, the definitions, it
    then finds in the compilation cache of both.
    """
    todo = tasks(compiler, names, share)
    for task in reversed(todo) if backwards else todo:
        yield result_of(task, compiler.arch)


def result_of(task: Task, arch: str) -> dict[str, Any]:
    """Runs the task: what it finds, and whether that is as it should be."""
    begin = time.perf_counter()
    error = ""
    try:
        found = task.run()
    except emulator.Fault as fault:
        found = {"wrong": [f"fault: {fault}"]}
    except Exception as failure:  # compilers, lowerings and the emulator raise what they like; it is never right
        found, error = {"wrong": []}, f"{type(failure).__name__}: {str(failure)[:300]}"
    wrong = found.pop("wrong")
    return {
        "arch": arch,
        "kind": task.kind,
        "name": task.name,
        "passed": not error and bool(wrong) == task.fails,
        "wrong": [error] if error else wrong or (["was not found wrong"] if task.fails else []),
        "fails": task.fails,
        "seconds": round(time.perf_counter() - begin, 2),
        **found,
    }


def small(case: Case, compiler: Compiler) -> dict[str, Any]:
    outputs, executed = emulation.run(case, compiler.backend, emulation.as_compiled(compiler, shadow=True))
    errors, wrong = case.compare(outputs, case.wanted())
    wrong += [f"{name}: nobody computed it" for name in case.bounds if name not in outputs]
    wrong += [f"{done.launch.name}: {conflict}" for done in executed for conflict in done.conflicts[:3]]
    return {"wrong": wrong, "errors": _plain(errors), "kernels": [*map(_kernel, executed)]}


def in_large_pools(large: Large, compiler: Compiler) -> dict[str, Any]:
    """Without shadow memory, which is as large as the pools; but what is written elsewhere shows by its pages."""
    case = large.case()
    outputs, executed = emulation.run(case, compiler.backend, emulation.as_compiled(compiler, shadow=False))
    errors, wrong = large.small.compare(large.moved_back(outputs), large.small.wanted())
    for done in executed:
        for pool, pages in done.written_pages():
            elsewhere = pages - large.pages(pool)
            if elsewhere:
                wrong.append(f"{done.launch.name}: {len(elsewhere)} pages written that nobody addresses")
    return {"wrong": wrong, "errors": _plain(errors), "kernels": [*map(_kernel, executed)], "bytes": large.nbytes}


def without_bounds(large: Large, compiler: Compiler) -> dict[str, Any]:
    with emulation.without_bounds():
        return in_large_pools(large, compiler)


def mutated(group: Group, compiler: Compiler) -> dict[str, Any]:
    return {"wrong": [], "tallies": [dataclasses.asdict(tally) for tally in mutants.tallies(group, compiler)]}


def _plain(errors) -> dict[str, dict]:
    return {name: dataclasses.asdict(error) for name, error in errors.items()}


def _kernel(done: Executed) -> dict[str, Any]:
    return {
        "name": done.launch.name,
        "programs": done.launch.programs,
        "instructions": done.result.instructions,
        "seconds": round(done.seconds, 3),
    }
