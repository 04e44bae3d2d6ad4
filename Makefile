# On a fresh machine nothing else has to be typed before these two:
#
#   make demo    quantizes and trains a small network on free photos; shows a table and pictures
#   make test    runs the whole test suite
#
# Both first create .venv and install everything into it, once; later calls start at once. Needed: Python 3.10 to 3.12
# with venv, and an internet connection. For another interpreter or another torch (the two must belong together), on the
# first call:
#
#   make demo PYTHON=python3.12
#   make demo TORCH="torch torchvision"                    the newest pair instead of the one in constraints.txt
#   make demo TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
#                                                          on Linux without a GPU: a much smaller download
#
# To start over, delete .venv.

PYTHON ?= python3
TORCH ?= --requirement constraints.txt

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

define CHECK_PYTHON
import sys
found = sys.version_info[:2]
if not (3, 10) <= found <= (3, 12):
    sys.exit("error: %s is Python %d.%d, but 3.10 to 3.12 is needed (BasicSR 1.4.2 cannot be built by a later one).\n"
             "Name another one, for example: make demo PYTHON=python3.12" % ((sys.executable,) + found))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("error: %s comes without venv. On Debian and Ubuntu: sudo apt install python%d.%d-venv"
             % ((sys.executable,) + found))
endef
export CHECK_PYTHON

.PHONY: help install demo test

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/plugin-installed

demo: install
	@echo "== starting the demo"
	@$(VENV)/bin/python tools/demo.py

test: install
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile

# BasicSR comes before the package, and without build isolation, in which pip would download a second torch.
$(VENV)/host-installed:
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "error: '$(PYTHON)' is not found; install Python 3.10 to 3.12, or name one: make demo PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c "$$CHECK_PYTHON"
	@echo "== 1 of 4: virtual environment $(VENV)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP) install --upgrade pip setuptools
	@echo "== 2 of 4: torch and torchvision (the largest download)"
	@$(PIP) install $(TORCH)
	@echo "== 3 of 4: BasicSR"
	@$(PIP) install --no-build-isolation --no-deps basicsr==1.4.2
	@touch $@

$(VENV)/plugin-installed: $(VENV)/host-installed setup.py requirements.txt
	@echo "== 4 of 4: qsr_plugin and what it needs"
	@$(PIP) install --no-build-isolation --editable ".[test]"
	@touch $@
