# Two commands matter: `make train` and `make test`. Both make .venv first if it is missing or out of date.
# All that they write stays in this folder: .venv/, .cache/, data/ and runs/.

# The first Python that is 3.11 or newer and can make environments. Another one: make train PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/installed
UNFINISHED := .cache/unfinished-install

# Jupyter, IPython, pip and Hugging Face would write to the home folder. A HF_HOME of your own is kept.
HF_HOME ?= $(CURDIR)/.cache/huggingface
export HF_HOME
export XDG_CACHE_HOME := $(CURDIR)/.cache
export IPYTHONDIR := $(CURDIR)/.cache/ipython
export JUPYTER_CONFIG_DIR := $(CURDIR)/.cache/jupyter/config
export JUPYTER_DATA_DIR := $(CURDIR)/.cache/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CURDIR)/.cache/jupyter/runtime
export NPM_CONFIG_CACHE := $(CURDIR)/.cache/npm
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train evaluate pretrain evidence leaderboard bench bench-gpu test test-faults test-stores test-browser browser lab app docs wheel clean constraints FORCE
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: ## train a retriever and show its results; parameters: make train ARGS="-p dataset cirr -p seed 1"
evaluate: ## evaluate a trained run: make evaluate ARGS="-p run_dir runs/NAME"
pretrain: ## train a small backbone like the one that ships, into runs/mini

train evaluate pretrain: $(INSTALLED)
	@$(BIN)/python -m dqe_cir nbs/$@.ipynb runs/$@.ipynb $(ARGS)

# Both make the recorded runs again, in one folder, so that a run that both ask for is made once.
evidence: ## make the evidence again and compare it with the record, row by row: make evidence ARGS="-p seeds 0"
leaderboard: ## the same for the leaderboard: make leaderboard ARGS="-p seeds 0"

evidence: REPEAT := nbs/ablate.ipynb
leaderboard: REPEAT := nbs/leaderboard.ipynb -p stage compare
evidence leaderboard: $(INSTALLED)
	@$(BIN)/python -m dqe_cir $(firstword $(REPEAT)) runs/$@.ipynb $(wordlist 2,9,$(REPEAT)) -p study runs/again -p seeds 0,1,2,3,4 \
		-p rates data/results/learning_rates.json -p against data/results/$@.json $(ARGS)
	@echo "every row agrees with data/results/$@.json"

# One thread for each row: what one core does can be compared with what one core can do.
bench: $(INSTALLED) ## measure every part beside what it must take: make bench ARGS="--part search"
	@OMP_NUM_THREADS=1 $(BIN)/python -m dqe_cir.studies bench $(ARGS)

bench-gpu: $(INSTALLED) ## steps and a whole run at real size on a GPU; without one projected from counted work
	@$(BIN)/python -m dqe_cir.studies bench-gpu $(ARGS)

test: $(INSTALLED) ## run every notebook and every test
	@$(BIN)/python tests/run.py

test-faults: $(INSTALLED) ## kill, fill the disk, feed what is malformed; 20 minutes: make test-faults ARGS="--every 5"
	PYTHONPATH=tests $(BIN)/python -m faults $(ARGS)

test-stores: $(INSTALLED) ## galleries beyond memory, with the embedded engine (installed where it is missing)
	@$(BIN)/python -c 'import qdrant_edge' 2>/dev/null || $(BIN)/python -m pip install --quiet 'qdrant-edge-py>=0.9,<0.10'
	$(BIN)/python -m pytest -q --basetemp .cache/pytest-stores tests/test_stores.py

test-browser: browser ## use the search page in JupyterLab with a real browser; screenshots: .cache/browser
	$(BIN)/python -m pytest -q -m browser --basetemp .cache/pytest-browser tests/test_browser.py

# Playwright brings no browser of its own: Debian's chromium or an installed Chrome does.
browser: $(INSTALLED)
	@for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do command -v $$name >/dev/null && exit 0; done; \
	echo "no browser: none of chromium, google-chrome is on PATH (Debian, Ubuntu: apt-get install chromium fonts-dejavu-core)"; exit 1
	@$(BIN)/python -m pip install --quiet -r requirements-browser.txt -c constraints.txt

# A server cuts the connection at a message of more than 10 MB; a photograph may have 25. Our page sends pieces, other widgets do not.
LARGE_MESSAGES := tornado_settings='{"websocket_max_message_size": 67108864}'

lab: $(INSTALLED) ## open JupyterLab on this folder
	$(BIN)/jupyter lab --ServerApp.$(LARGE_MESSAGES) --FileContentsManager.pre_save_hook=dqe_cir.terminal.clean_on_save $(ARGS)

# Bound to this machine; the address with its token is printed. voila is only needed here, and installed when first asked for.
app: $(INSTALLED) ## open the search page without code, with the model that ships: make app ARGS="--model runs/NAME"
	@$(BIN)/python -c 'import voila' 2>/dev/null || $(BIN)/python -m pip install voila==0.5.13 -c constraints.txt
	$(BIN)/python -m dqe_cir.retriever serve --model garments $(ARGS)

docs: $(INSTALLED) ## build the documentation in _docs/ from the notebooks; open _docs/index.html
	@$(BIN)/python docs/build.py _docs

wheel: $(INSTALLED) ## build the package as a wheel in dist/
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove .venv, the built site and every cache; data/ and runs/ stay
	rm -rf .venv .cache .pytest_cache .hypothesis _docs build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# A second run installs nothing. An environment left half-made, moved, or without its Python is made again.
ifneq "$(shell $(BIN)/python -c '' 2>/dev/null && cat $(INSTALLED) 2>/dev/null)" "$(CURDIR)"
$(INSTALLED): FORCE
endif
$(INSTALLED): requirements.txt constraints.txt settings.ini setup.py docs/jupyter_nbconvert_config.py
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with venv was found; name one: make PYTHON=/path/to/python"; exit 1; }
	@if test -e $(UNFINISHED) || { test -e $@ && test "$$(cat $@)" != "$(CURDIR)"; }; then rm -rf .venv; fi
	@mkdir -p .cache && touch $(UNFINISHED)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --no-deps -e .
	@mkdir -p .venv/etc/jupyter && cp docs/jupyter_nbconvert_config.py .venv/etc/jupyter/
	@echo "$(CURDIR)" > $@ && rm $(UNFINISHED)

# torch is left out of the pins because its builds, and what they need, differ by machine.
constraints: ## pin again what requirements.txt needs in turn (for maintainers; wants uv)
	@mkdir -p .cache
	uv pip compile --quiet --python-version 3.11 --no-emit-package torch --no-annotate --no-header requirements.txt -o .cache/pins
	@{ echo "# What requirements.txt needs in turn, without torch. Made by: make constraints"; \
	grep -vE '^(nvidia|cuda|triton)' .cache/pins; } > constraints.txt && rm .cache/pins
