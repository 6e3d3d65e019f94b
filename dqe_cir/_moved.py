"""Import paths of version 0.1 that still work, with a `DeprecationWarning` that names the new one.

`import dqe_cir.search_page` finds a module that hands on the names of the pages it was divided into, and
`from dqe_cir.trainer import SMOKE` finds a name that the package's table of contents does not list."""
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import warnings

MODULES = {
    "garments": ("data.garments.draw", "data.garments.requests", "data.garments.benchmark"),
    "checkpoints": ("encoder.checkpoints",),
    "pretraining": ("encoder.pretraining",),
    "clip_resnet": ("encoder.native.clip_resnet",),
    "native": ("encoder.native.base", "encoder.native.clip", "encoder.native.blip", "encoder.native.resnet"),
    "parts": ("methods.parts",),
    "methods.check": ("trainer.check",),
    "mining": ("trainer.mining",),
    "preference": ("data.hp_fashioniq", "evaluator.preference"),
    "attention": ("retriever.attention",),
    "lessons": ("retriever.lessons",),
    "search_page": ("retriever.session", "retriever.page"),
    "ablation": ("studies.ablation",),
    "leaderboard": ("studies.leaderboard",),
    "tables": ("studies.tables",),
    "inspection": ("studies.inspection",),
}
PACKAGES = {
    "data": ("pictures", "captions", "base", "fashioniq", "cirr", "circo", "hp_fashioniq", "garments.reader", "datasets", "verify"),
    "encoder": ("blip2", "tokens", "checkpoints"),
    "evaluator": ("protocols", "scoring", "reference_points", "submissions"),
    "trainer": ("config", "mining", "batches", "step", "runs", "loop", "evaluation_config"),
    "show": ("figures", "sheets"),
    "retriever": ("drawn", "index", "search", "explain", "share"),
}


def old_name(package: str, name: str):
    "The object that `dqe_cir.<package>` had under a name in version 0.1; `AttributeError` if it had none."
    if not name.startswith("__"):
        for part in PACKAGES[package]:
            module = importlib.import_module(f"dqe_cir.{package}.{part}")
            home = getattr(vars(module).get(name), "__module__", None) or module.__name__
            if home.startswith("dqe_cir") and name in vars(module) and not inspect.ismodule(vars(module)[name]):
                warn(f"dqe_cir.{package}.{name}", f"{home}.{name}")
                return vars(module)[name]
    raise AttributeError(f"module 'dqe_cir.{package}' has no attribute {name!r}")


def warn(old: str, new: str) -> None:
    warnings.warn(f"{old} has moved: import {new}", DeprecationWarning, stacklevel=3)


class OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Makes the modules of `MODULES` when somebody imports them."

    def find_spec(self, name, path=None, target=None):
        if name.removeprefix("dqe_cir.") in MODULES and name.startswith("dqe_cir."):
            return importlib.machinery.ModuleSpec(name, self)

    def exec_module(self, module):
        parts = MODULES[module.__name__.removeprefix("dqe_cir.")]
        warn(module.__name__, " and ".join(f"dqe_cir.{part}" for part in parts))
        for part in parts:
            found = vars(importlib.import_module(f"dqe_cir.{part}"))
            vars(module).update({name: value for name, value in found.items() if not name.startswith("__")})

    def get_code(self, name):
        "What `python -m dqe_cir.checkpoints` runs: the command of the package that the module moved into."
        package = MODULES[name.removeprefix("dqe_cir.")][0].split(".")[0]
        return compile(f"import runpy; runpy.run_module('dqe_cir.{package}', run_name='__main__')", name, "exec")


if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
    sys.meta_path.append(OldModules())
