"What several files of tests need: where the repository lies, vectors of length one, a notebook run from outside."
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent

# `dqe_cir` as it was before there were readings: the pairwise objective alone, on sub-queries with a gate
PAIRWISE = {"readings": "none", "attribute_mode": "learned", "preference_weight": 1.0, "ranking_weight": 0.5, "attribute_weight": 0.25, "contrastive_weight": 0.0, "batches": "plain"}


def unit(vectors):
    "Vectors (...,D) at length one, from a tensor or a stored array; half precision is widened first."
    vectors = torch.as_tensor(vectors)
    return torch.nn.functional.normalize(vectors.float() if vectors.dtype == torch.float16 else vectors, dim=-1)


def private_environment(folder, **more):
    "The environment of a subprocess: Jupyter's and IPython's files go into a folder; IN_TEST would silence nbdev_export."
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    kept = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    return {**kept, **{name: str(Path(folder) / name.lower()) for name in names}, **more}


def papermill(notebook, out, *parameters, cwd=ROOT, **more):
    "papermill NOTEBOOK OUT -p NAME VALUE ... for pairs of names and values; Jupyter's own files go beside OUT."
    words = [str(word) for name, value in parameters for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(out), *words]
    environment = private_environment(Path(out).parent, PYTHONPATH=str(ROOT), **more)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@contextlib.contextmanager
def data_in(folder):
    "With this folder as the folder of all data sets."
    with mock.patch.dict(os.environ, DQE_CIR_DATA=str(folder)): yield folder
