"Installation. Everything is read from settings.ini, the one place for name, version and requirements."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
readme = here / "README.md"

setup(
    name=settings["lib_name"], version=settings["version"], description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings.get("author"), author_email=settings.get("author_email"), url=settings.get("git_url") or None,
    keywords=settings.get("keywords", "").split(),
    classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3"],
    license="Apache-2.0", python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["dqe_cir", "dqe_cir.*"]),
    package_data={"dqe_cir": ["assets/**"]},
    install_requires=shlex.split(settings["requirements"]),
    extras_require={key.removesuffix("_requirements"): shlex.split(settings[key])
                    for key in settings if key.endswith("_requirements")},
    entry_points={"nbdev": ["dqe_cir=dqe_cir._modidx:d"],
                  "console_scripts": ["dqe-cir=dqe_cir.retriever.commands:main"]},
)
