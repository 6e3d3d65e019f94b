"Run every notebook, then every test, and say how many ran. `make test` calls this; it ends non-zero on any failure."
import os
import re
import subprocess
import sys
from pathlib import Path

from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
WORKERS = "2"  # processes, of one thread each
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}  # no test waits for a hub


def run_notebooks():
    "nbdev_test over nbs/. Returns its exit status and the notebooks it completed."
    command = [Path(sys.executable).parent / "nbdev_test", "--n_workers", WORKERS, "--do_print", "--timing"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    ran = set()
    for line in process.stdout:  # two workers write here, so two messages may share a line
        ran |= {Path(path).resolve() for path in re.findall(r"- Completed (.*?\.ipynb)", line)}
        if not re.search(r"Starting .*\.ipynb|- Completed |^\s*$", line): print("  " + line, end="", flush=True)
    return process.wait(), ran


def skip_reason(notebook):
    "Why nbdev passes over this notebook; empty when its front matter does not say so."
    if notebook.name.startswith("_"): return "a draft: its name starts with _"
    front_matter = getattr(NBProcessor(notebook, procs=FrontmatterProc, process=True).nb, "frontmatter_", {})
    return str(front_matter.get("skip_reason") or "")


def main():
    notebooks = {path.resolve() for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    print(f"nbdev_test: {len(notebooks)} notebooks", flush=True)
    status, ran = run_notebooks()
    failures = [] if status == 0 else ["nbdev_test"]
    for notebook in sorted(notebooks - ran):
        reason = skip_reason(notebook)
        print(f"  skipped {notebook.relative_to(ROOT)}: {reason or 'NO REASON GIVEN (write skip_reason in its front matter)'}")
        if not reason: failures += [f"{notebook.name} skipped without a reason"]
    if not ran: failures += ["no notebook ran"]
    print(f"notebooks: {len(ran)} ran, {len(notebooks - ran)} skipped", flush=True)
    (ROOT / ".cache").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", WORKERS, "--dist", "worksteal", "--basetemp", ".cache/pytest-tmp"]
    if subprocess.run(command, cwd=ROOT, env=ENVIRONMENT).returncode: failures += ["pytest"]
    if failures: sys.exit("make test FAILED: " + "; ".join(failures))


if __name__ == "__main__": main()
