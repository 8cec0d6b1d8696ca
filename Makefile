# Every target does its own set-up: it finds Python, makes a virtual environment in .venv/VERSION
# and installs what that target needs, once. Nothing outside this folder is changed, but for the
# cache of downloaded models (SOFTPROMPT_CACHE).
#
#   make test PYTHON=python3.11      another interpreter, with an environment of its own
#   make test ARGS="tests/data -x"   arguments for pytest

SUPPORTED := 3.11 3.12 3.13 3.14
CANDIDATES := python3.14 python3.13 python3.12 python3.11 python3 /usr/bin/python3
PARITY_VERSION := 3.11

# $(call find_python,VERSIONS,COMMANDS): the first command of these versions that has venv and pip.
SUITS := import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])
find_python = $(shell for p in $(2); do \
	$$p -c '$(SUITS)' $(1) 2>/dev/null && echo $$p && break; done)

INTERPRETER := $(call find_python,$(SUPPORTED),$(or $(PYTHON),$(CANDIDATES)))
VERSION := $(if $(INTERPRETER),$(shell \
	$(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV := .venv/$(or $(VERSION),none)
PARITY_INTERPRETER = $(call find_python,$(PARITY_VERSION),$(PYTHON) python$(PARITY_VERSION) \
	/usr/bin/python$(PARITY_VERSION) $(CANDIDATES))
PARITY_VENV := .venv/parity-$(PARITY_VERSION)

# pip is told not to compile some 12,000 files of which few are imported (about 20 seconds); Python
# then keeps what it does import, and every later start is quick.
export PYTHONDONTWRITEBYTECODE =
# Large pages for large arrays: a training step on a CPU takes about a tenth less (glibc 2.35 on).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PIP_INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

# Each worker begins with one part of the tests, and takes over tests of a slower one when it is done.
# It reads the real models for itself. PyTorch's threads would wait for one another on the same cores:
# a worker has one.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

# $(call require,PYTHON): stops a target that no Python here suits.
define require
	@$(if $(1),,echo "make: needs Python $(NEEDED) with venv and pip$(if $(PYTHON), (PYTHON=$(PYTHON))):" \
		"found none. Name one with PYTHON=/path/to/python (Debian packages them as python3-venv)" >&2; exit 1)
endef

# $(call install,PYTHON,VENV,WHAT PIP INSTALLS,HOW LONG). An environment whose installation was
# interrupted is rebuilt from nothing; the stamp, which is the target, is written last.
define install
	$(call require,$(1))
	@if [ -e $(2)/.installing ]; then rm -rf $(2); fi
	@mkdir -p $(2) && touch $(2)/.installing
	@$(2)/bin/python -m pip --version >/dev/null 2>&1 || $(1) -m venv $(2)
	@echo "installing into $(2) (about $(4)) ..."
	@$(2)/bin/python $(PIP_INSTALL) $(3)
	@rm $(2)/.installing
	@touch $@
endef

# $(call study,ARGUMENTS OF THE SWEEP,FURTHER COMMANDS): runs the study's trials and writes its report,
# also after trials that failed.
define study
	$(VENV)/bin/softprompt sweep paper/everything --workdir runs/paper $(1) $(ARGS); swept=$$?; \
	for further in $(2); do \
		$(VENV)/bin/python -m experiments.paper.$$further --workdir runs/paper || swept=$$?; done; \
	$(VENV)/bin/python -m experiments.paper.report --workdir runs/paper && exit $$swept
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart paper paper-full paper-smoke report test notebooks lint format parity docs bench bench-full lock version clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 - /p' Makefile

quickstart: $(VENV)/.base  ## train a few soft prompts on a real model, into runs/quickstart
	@$(VENV)/bin/softprompt sweep prompt_length --subset quickstart --workdir runs/quickstart

test: $(VENV)/.test  ## run the tests (ARGS="..." goes to pytest)
	@$(VENV)/bin/python -m pytest $(WORKERS) $(ARGS)

paper: $(VENV)/.base  ## run the study for a laptop (90 minutes on two cores) into runs/paper
	@$(call study,--subset laptop,continual)

paper-full: $(VENV)/.base  ## run the whole study (hours) into runs/paper (ARGS="--minutes 80")
	@$(call study,,continual style figure2)

paper-smoke: $(VENV)/.test  ## run the whole study on tiny models (minutes), as the tests do
	@$(VENV)/bin/python -m pytest tests/paper/test_smoke.py -m long $(ARGS)

report: $(VENV)/.base  ## write the study's report from the committed records, into runs/report
	@$(VENV)/bin/python -m experiments.paper.report

notebooks: $(VENV)/.notebooks  ## execute the notebooks and write each .ipynb (ARGS="scaling_laws")
	@$(VENV)/bin/python -m notebooks.render $(ARGS)

lint: $(VENV)/.test  ## check style, format and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.test  ## format the code and mend what ruff can mend
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

parity: $(PARITY_VENV)/.parity  ## compare with live PyTorch, transformers and peft (on Python 3.11)
	@OMP_NUM_THREADS=1 $(PARITY_VENV)/bin/python -m pytest -m parity $(WORKERS) $(ARGS)

# Without --quiet, which hides from --strict what it would count.
docs: $(VENV)/.docs  ## build the documentation into site/, its links checked
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "wrote site/index.html"

# What the benchmark measures goes on where it stopped; ARGS="--steps 2" and so on go to it.
BENCH = $(VENV)/bin/python -m experiments.bench --peft-python $(PARITY_VENV)/bin/python

bench: $(VENV)/.base $(PARITY_VENV)/.parity  ## time training against PEFT on PyTorch, into runs/bench
	@$(BENCH) --subset claimed $(ARGS)

bench-full: $(VENV)/.base $(PARITY_VENV)/.parity  ## the same for every model, method, length and saving
	@$(BENCH) --subset full $(ARGS)

lock: $(VENV)/.lock  ## resolve constraints.txt anew, for every Python at once
	@echo "resolving constraints.txt ..."
	@$(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --upgrade --quiet \
		--python-version $(firstword $(SUPPORTED)) --no-annotate --no-header --no-emit-index-url \
		--output-file $(VENV)/resolved.txt >/dev/null
	@{ echo '# Written by make lock. torch and the CUDA libraries are left free: CPU and CUDA machines'; \
		echo '# want their own.'; \
		grep -Ev '^(torch|triton|setuptools|nvidia-|cuda-)' $(VENV)/resolved.txt; } > constraints.txt

version:  ## print the Python version that the targets would use
	$(call require,$(INTERPRETER))
	@echo $(VERSION)

clean:  ## remove environments and caches (never runs/ or downloaded models)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

NEEDED = $(firstword $(SUPPORTED)) to $(lastword $(SUPPORTED))
$(PARITY_VENV)/.parity: NEEDED = $(PARITY_VERSION)

$(VENV)/.base: pyproject.toml constraints.txt
	$(call install,$(INTERPRETER),$(VENV),-e .,a minute)

$(VENV)/.test: pyproject.toml constraints.txt
	$(call install,$(INTERPRETER),$(VENV),-e '.[test]',a minute)

$(VENV)/.notebooks: pyproject.toml constraints.txt
	$(call install,$(INTERPRETER),$(VENV),-e '.[notebooks]',a minute)

$(VENV)/.docs: pyproject.toml constraints.txt
	$(call install,$(INTERPRETER),$(VENV),-e '.[docs]',a minute)

$(VENV)/.lock:
	$(call install,$(INTERPRETER),$(VENV),uv,10 seconds)

PARITY_EXTRAS := .[test,parity]
$(PARITY_VENV)/.parity: pyproject.toml constraints.txt
	$(call install,$(PARITY_INTERPRETER),$(PARITY_VENV),-e '$(PARITY_EXTRAS)',2 minutes)
