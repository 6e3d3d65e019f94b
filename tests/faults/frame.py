"What a case is, and what became of it."
import multiprocessing
import re
import resource
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm.std import tqdm

tqdm.set_lock(threading.RLock())  # its own is shared between processes, and one that is killed would keep it for ever

OURS = Path(__file__).resolve().parent.parent.parent / "dqe_cir"
SECONDS, GIBIBYTES = 60, 6  # after which a case hangs, and what it may take beyond the start


@dataclass(frozen=True)
class Case:
    "An input of a kind: `make(folder)` builds it and returns what a user would do with it."
    kind: str
    name: str
    make: Callable[[Path], Callable[[], object]]
    expected: str = "refuse"  # or accept
    names: str = ""  # a pattern that the message must match; empty: the name of a file, a row, a field or a value


def verdict(case: Case, folder: Path) -> str:
    """`held`: refused in one line of ours, or rightly accepted; `silent`: accepted, but should not be; `foreign`: an error of somebody else's, or
    a refusal of what is right; `unnamed`: a message that says nothing of where."""
    act = case.make(folder)
    try:
        act()
    except (ValueError, FloatingPointError) as problem:
        return "foreign: " + str(problem)[:200] if case.expected == "accept" else judged(case, problem)
    except MemoryError: raise
    except Exception as problem:
        last = traceback.extract_tb(problem.__traceback__)[-1]
        return f"foreign: {type(problem).__name__}: {str(problem)[:160]} ({Path(last.filename).name}:{last.lineno})"
    return "held" if case.expected == "accept" else "silent"


def judged(case: Case, problem: Exception) -> str:
    "Is an error one of ours, in one line, and does it say where?"
    last, said = traceback.extract_tb(problem.__traceback__)[-1], str(problem)
    if OURS not in Path(last.filename).resolve().parents: return f"foreign: {type(problem).__name__}: {said[:160]} ({last.filename}:{last.lineno})"
    if "\n" in said or len(said) > 1000: return "unnamed: " + said[:160]
    where = case.names or r"[\w.-]+\.\w+|row \d+|[\w ]+=|/"
    return "held" if re.search(where, said) else "unnamed: " + said[:160]


def within(case: Case, folder: str, pipe) -> None:
    "The body of the process that a case runs in."
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 if Path("/proc/self/status").exists() else 0
    if used: resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30,) * 2)
    try:
        pipe.send(verdict(case, Path(folder)))
    except MemoryError:
        pipe.send("memory")


def check(case: Case, folder: Path, seconds: int = SECONDS) -> str:
    "The verdict on a case in a process of its own, which may neither hang nor take all memory: `hang`, `memory`, else as `verdict`."
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=within, args=(case, str(folder), theirs))
    process.start()
    theirs.close()
    if not ours.poll(seconds):
        process.kill()
        return "hang"
    try:
        return ours.recv()
    except EOFError:
        return "memory"
    finally:
        process.join()
