"""How `jupyter nbconvert --to html` prints a notebook: as readers see it on the site. The Makefile puts this file into .venv.

Notebooks are committed without the numbers of their executions, so prompts would stand empty."""
import re

from nbconvert.preprocessors import Preprocessor

c = get_config()  # noqa: F821, given by jupyter


class AsRead(Preprocessor):
    "Leaves out cells that nbdev hides, the code of those whose result alone is meant, and directives."

    def preprocess(self, notebook, resources):
        kept = []
        for cell in notebook.cells:
            directives = set(re.findall(r"^#\s*\|\s*(\w+)", cell.source, re.M)) if cell.cell_type == "code" else set()
            if directives & {"hide", "default_exp"}: continue
            if directives & {"hide_input", "echo"}: cell.metadata["transient"] = {"remove_source": True}
            if directives: cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M)
            kept.append(cell)
        notebook.cells = kept
        return notebook, resources


c.HTMLExporter.preprocessors = [AsRead]
c.HTMLExporter.exclude_input_prompt = c.HTMLExporter.exclude_output_prompt = True
